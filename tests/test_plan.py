"""Plans count what sweeps do, at rates that are measured; and say what splitting over processes does."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.command import refused, run
from support.count_work import counted
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.run import memory
from pyfastcircuits.sweeps import machines
from pyfastcircuits.sweeps.architectures import ARCHITECTURES, Architecture
from pyfastcircuits.sweeps.costs import Task, Work

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
}  # fmt: skip
RATES = machines.GPUS["H100"].machine("H100", "ieee").rates


def test_architectures_have_as_many_parameters_as_the_models():
    assert {name: model.parameters for name, model in ARCHITECTURES.items()} == PUBLISHED


def test_gpt2_is_the_default_of_transformers():
    transformers = pytest.importorskip("transformers")
    config, gpt2 = transformers.GPT2Config(), ARCHITECTURES["gpt2"]
    theirs = config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.n_positions
    assert (gpt2.layers, gpt2.heads, gpt2.d_model, gpt2.vocabulary, gpt2.context) == theirs


def test_sizes_of_weights():
    sizes = Architecture.of(random_weights(3, norm="layernorm"), "mine")
    assert (sizes.layers, sizes.heads, sizes.kv_heads, sizes.d_model, sizes.d_head) == (3, 4, 2, 20, 6)
    assert (sizes.vocabulary, sizes.d_mlp) == (97, 0)


CASES = [
    (scope, attention, low_memory)
    for scope in ("path", "direct", "edge", "joint", "head", "layer")
    for attention in ("frozen", "recomputed")
    for low_memory in (False, True)
    if (scope, attention) != ("path", "recomputed") and not (low_memory and attention == "recomputed")
]


@pytest.mark.parametrize(("scope", "attention", "low_memory"), CASES)
def test_what_is_counted_is_what_is_multiplied(scope, attention, low_memory):
    """An independent count watches every op that torch calls. Sequences are so many that they are cut."""
    weights = random_weights(3, 5, 5, 48, 12, 900, norm="rmsnorm", positional="none", biases=False, dtype=torch.float32)
    tokens = random_tokens(3, 40, 900)
    seen = counted(lambda: fc.sweep(weights, tokens, scope, attention=attention, low_memory=low_memory))
    task = Task(
        Architecture.of(weights, ""), scope, "zero", attention, low_memory, 3, 40, share=1.0, columns=900, orders=1.0,
        block=memory.BLOCK_BYTES, clean_block=memory.CLEAN_LOGITS_BYTES,
    )  # fmt: skip
    work = sum(task.steps.values(), Work())
    assert work.change_products == seen.change_products
    assert (work.changes, work.pair_changes) == (seen.changes, seen.pair_changes)
    assert work.products + work.plain_products + work.patterns == pytest.approx(seen.products, rel=0.05)


def test_the_rates_of_gpus_are_those_that_are_predicted():
    """The package does not read bench/: what it keeps of the predictions is theirs."""
    predicted = json.loads((ROOT / "bench" / "predictions.json").read_text())
    for gpu, sheet in machines.GPUS.items():
        for precision in ("ieee", "tf32", "bf16"):
            _, in_turn = predicted[f"sweep: triton {precision}"][gpu]
            _, of_pairs = predicted[f"joint: r=64: triton {precision}"][gpu]
            assert sheet.sweep[precision] == pytest.approx(in_turn, rel=0.01)
            assert sheet.joint[precision] == pytest.approx(of_pairs, rel=0.01)
            rates = sheet.machine(gpu, precision).rates
            assert min(asdict(rates).values()) >= 0
            logits = 72 * 1024 * 50257
            took = machines.Machine(gpu, "", rates, 0, 1.0).seconds(Work(changes=logits, change_products=64 * logits))
            assert took == pytest.approx(in_turn / 1e3, rel=1e-6)


def test_gpt2_on_an_h200_takes_what_its_kernel_is_predicted_to_take():
    """9,504 pairs of 1,024 positions, 132 times the 72 pairs of which the prediction is: 0.93 s; and what is around."""
    plan = fc.plan("gpt2", length=1025, machine="H200")
    assert plan.experiments == 9504
    assert 0.9 < plan.chosen.seconds["ablations"] / (132 * 7.069e-3) < 1.5
    assert "not measured" in plan.machine.source


@pytest.mark.parametrize("split", ["sequences", "experiments", "vocabulary"])
def test_processes_share_the_work(split):
    alone = fc.plan("pythia-160m", sequences=64, machine="H100")
    shared = fc.plan("pythia-160m", sequences=64, machine="H100", processes=4, split=split)
    assert shared.chosen.split == split
    assert 0.95 / 4 < shared.chosen.steps["ablations"].changes / alone.chosen.steps["ablations"].changes < 1.1 / 4
    assert shared.seconds > 0.95 * alone.seconds / 4
    assert shared.chosen.sent > 0


def test_processes_that_share_the_vocabulary_hold_their_columns_of_an_unembedding_alone():
    """Where circuits are the whole model, and W_U is not W_E."""
    weights = random_weights(vocabulary=97, d=20)
    tied, with_mlps = replace(weights, W_U=weights.W_E.mT), replace(weights, attention_only=False)

    def held(model, split):
        processes = 1 if split == "none" else 4
        plan = fc.plan(model, processes=processes, split=split, sequences=4, length=8, machine="laptop")
        return plan.chosen.memory["weights"]

    whole = held(weights, "none")
    assert held(weights, "sequences") == held(weights, "experiments") == whole
    assert held(weights, "vocabulary") == whole - 4 * 20 * (97 - 25)
    assert held(tied, "none") == whole - 4 * 20 * 97
    for model in (tied, with_mlps, "pythia-70m"):
        assert held(model, "vocabulary") == held(model, "none")


def test_the_plan_chooses_a_split_that_can_be():
    assert fc.plan("gpt2", sequences=64, machine="H100", processes=4).chosen.split == "sequences"
    one = fc.plan("gpt2", sequences=1, machine="H100", processes=4)
    assert one.chosen.split == "experiments"
    assert next(x for x in one.splits if x.split == "sequences").why_not == "there are 1 sequences for 4 processes"
    few = fc.plan("gpt2", "layer", sequences=1, machine="H100", processes=16)
    assert few.chosen.split == "vocabulary"
    with pytest.raises(ValueError, match="split is 'experiments', but there are 12 experiments for 16 processes"):
        fc.plan("gpt2", "layer", machine="H100", processes=16, split="experiments")
    with pytest.raises(ValueError, match="split is 'vocabulary', but the vocabulary has 9 tokens, too few for 6 proc"):
        fc.plan(random_weights(vocabulary=9), machine="H100", processes=6, split="vocabulary")


def test_processes_on_one_cpu_share_its_cores():
    plans = [fc.plan("gpt2", sequences=64, machine="laptop", processes=n) for n in (1, 8)]
    assert plans[1].seconds == pytest.approx(plans[0].seconds, rel=0.2)


def test_chunks_hold_less():
    whole, chunks = (fc.plan("gpt2", sequences=256, machine="H100", chunks=x) for x in (False, True))
    assert chunks.memory < whole.memory / 4
    assert chunks.seconds < 1.6 * whole.seconds


BAD = {
    "a model": ({"model": "gpt5"}, "model is 'gpt5', expected weights, or one of gpt2"),
    "a machine": ({"machine": "abacus"}, "machine is 'abacus', expected one of here, A100"),
    "no sequence": ({"sequences": 0}, "sequences is 0, expected at least 1"),
    "one token": ({"length": 1}, "length is 1, expected at least 2"),
    "no process": ({"processes": 0}, "processes is 0, expected at least 1"),
    "paths": ({"attention": "recomputed"}, "attention is 'recomputed', but scope is 'path'"),
    "a split": ({"split": "vocabulary"}, "split is 'vocabulary', but processes is 1"),
    "no split": ({"split": "none", "processes": 2}, "split is 'none', but processes is 2"),
    "a precision": ({"precision": "tf32x3", "machine": "H100"}, "precision is 'tf32x3', expected one of ieee"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fc.plan(**{"model": "gpt2", **given})


def test_rates_are_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(machines, "measured_rates", lambda precision: measured.append(precision) or RATES)
    for _ in range(2):
        assert machines.machine("here").rates == RATES
    assert measured == ["ieee"]
    file = tmp_path / "pyfastcircuits" / "rates.json"
    file.write_text("{torn")
    assert machines.machine("here").source == machines.MEASURED
    assert len(measured) == 2
    file.unlink()
    file.parent.chmod(0o500)  # a home that cannot be written (root writes all the same)
    assert machines.machine("here").rates == RATES
    file.parent.chmod(0o700)


def test_the_command():
    result = run("plan", "llama-3-8b", "--machine", "H100", "--processes", 8, "--dtype", "bfloat16", columns=80)
    assert result.exit_code == 0, result.output
    assert "H100: from data sheets, not measured" in result.output
    for word in ("clean run", "orders", "ablations", "exponentials", "weights", "chosen", "vocabulary"):
        assert word in result.output
    found = json.loads(run("plan", "gpt2", "--machine", "A100", "--sequences", 4, "--json").output)
    plan = fc.plan("gpt2", sequences=4, machine="A100")
    assert (found["seconds"], found["memory"], found["flops"]) == (plan.seconds, plan.memory, plan.flops)
    assert "machine is 'abacus'" in refused("plan", "--machine", "abacus")
    assert "MODEL is 'gpt5'" in refused("plan", "gpt5")


HELD = """
import sys, time
sys.path.extend({paths})
import torch
from bench.timing import peak_bytes
from support.random_models import random_weights
import pyfastcircuits as fc
from pyfastcircuits.sweeps import machines

torch.set_num_threads(1)
sizes, (scope, attention), (sequences, length) = {case}
weights = random_weights(*sizes, norm="rmsnorm", positional="none", biases=False, dtype=torch.float32)
for _, tensor in weights.tensors():
    tensor.mul_(0.25)  # effects of a trained model's size
tokens = torch.randint(0, sizes[-1], (sequences, length))
fc.sweep(weights, tokens[:1, :9], scope, attention=attention)
start = time.process_time()
peak = peak_bytes(lambda: fc.sweep(weights, tokens, scope, attention=attention))
seconds = time.process_time() - start
rates = machines.measured_rates(clock=time.process_time)
machines.machine = lambda name, precision: machines.this_machine(rates)
plan = fc.plan(weights, scope, attention=attention, sequences=sequences, length=length, chunks=False)
held = sum(size for part, size in plan.chosen.memory.items() if part != "weights")
print(seconds, plan.seconds, peak, held)
"""
SWEEPS = {
    "paths": ((2, 6, 6, 128, 64, 50257), ("path", "frozen"), (4, 256)),
    "heads": ((3, 4, 4, 128, 32, 40000), ("head", "frozen"), (5, 256)),
    "direct edges": ((2, 5, 5, 128, 64, 50257), ("direct", "frozen"), (8, 250)),
}


@pytest.mark.alone
@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_takes_what_was_planned(case):
    """Within 30% of its time (of one thread, so that neighbours do not count) and 10% of its memory."""
    code = HELD.format(paths=[str(ROOT), str(ROOT / "tests")], case=SWEEPS[case])
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, planned, peak, held = map(float, out.split())
    assert planned == pytest.approx(seconds, rel=0.3)
    assert held == pytest.approx(peak, rel=0.1)
