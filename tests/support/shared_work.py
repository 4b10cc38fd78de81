"""What the processes of tests/test_distributed.py run: everything that they share, against one process alone."""

import gc
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import torch._dynamo  # (likewise, for DTensor)
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

import pyfastcircuits as fc
from pyfastcircuits.command import processes
from pyfastcircuits.sweeps import sharing, work
from support.command import run
from support.random_models import random_tokens, random_weights
from support.sharded_calls import outcomes

WEIGHTS = random_weights(3, norm="rmsnorm")
GAIN, SHIFT = random_weights(1, seed=5).W_E[:2]
CAPPED = replace(WEIGHTS, norm="layernorm", ln_final_w=GAIN, ln_final_b=SHIFT, logit_cap=3.0)
TOKENS = random_tokens(5, 11)
SWEEPS = {
    "path": {},
    "direct recomputed": {"scope": "direct", "attention": "recomputed"},
    "joint mean": {"scope": "joint", "mode": "mean"},
    "head resample": {"scope": "head", "mode": "resample"},
    "rank": {"scope": "layer", "metric": "rank"},
}
MORE = {
    "logit difference": {"scope": "head", "metric": "logit_difference", "against": 3, "final_norm": "recomputed"},
    "low memory": {"scope": "edge", "low_memory": True},
}
CASES = {kind: (WEIGHTS, options) for kind, options in SWEEPS.items()}
CASES |= {kind: (CAPPED, options) for kind, options in MORE.items()}
ALONE = {kind: fc.sweep(weights, TOKENS, split="none", **options) for kind, (weights, options) in CASES.items()}


def apart(found: fc.Sweep, alone: fc.Sweep) -> float:
    """The largest difference of any number of two sweeps."""
    pairs = [(found.result.delta, alone.result.delta), (found.result.kl, alone.result.kl)]
    pairs += [
        (found.orders, alone.orders),
        (found.loss, alone.loss),
        *zip(found.marginals, alone.marginals, strict=True),
    ]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def everything(folder: Path) -> dict[str, float | bool | str]:
    """By what was compared: the largest difference from one process alone."""
    splits = ("sequences", "experiments", "vocabulary")
    found: dict[str, float | bool | str] = {}
    for name, options in SWEEPS.items():
        for split in splits:
            found[f"{name} by {split}"] = apart(fc.sweep(WEIGHTS, TOKENS, split=split, **options), ALONE[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(work.WORK, "cpu", 1.0)  # so that each sequence is cut into several chunks
        patch.setattr(work, "_WIDE", 1)
        pieces = fc.sweep(WEIGHTS, TOKENS, split="sequences")
    found["pieces by sequences"] = apart(pieces, ALONE["path"])
    found |= by_columns(folder)
    kinds = ["Q", "K", "V"]
    one = [(2, 1), (1, 0)]
    scores = fc.composition_scores(WEIGHTS, kinds), fc.composition_scores(WEIGHTS, "K", destinations=one)
    for split in splits:  # stored, and read again by all
        out = folder / split
        stored = fc.sweep(WEIGHTS, TOKENS, out=out, split=split)
        again = fc.sweep(WEIGHTS, TOKENS, out=out, resume=True, split=split)
        found[f"stored by {split}"] = apart(again, stored)
    try:
        fc.sweep(WEIGHTS, TOKENS, out=folder / "vocabulary")
    except ValueError as error:
        found["refused"] = str(error)
    settled = fc.sweep(WEIGHTS, random_tokens(40, 11), "layer", settle=1, confidence=0.5)
    found["settled alike"] = len(set(map(str, _told((settled.sequences, settled.result.top(3)))))) == 1
    found["composition alike"] = len(set(map(str, _told([x.tolist() for x in scores])))) == 1
    dist.barrier()
    size = dist.get_world_size()
    dist.destroy_process_group()
    whole = fc.composition_scores(WEIGHTS, kinds), fc.composition_scores(WEIGHTS, "K", destinations=one)
    found["composition"] = max(float((a - b).abs().max()) for a, b in zip(scores, whole, strict=True))
    found["size"] = size
    return found


def by_columns(folder: Path) -> dict[str, float | bool | str]:
    """As `everything`, of processes that hold their own columns of W_U each."""
    found: dict[str, float | bool | str] = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = {x: replace(x, W_U=distribute_tensor(x.W_U, mesh, [Shard(1)])) for x in (WEIGHTS, CAPPED)}
    for kind, (weights, options) in CASES.items():
        found[f"{kind} by columns"] = apart(fc.sweep(sharded[weights], TOKENS, **options), ALONE[kind])
    for name, whole in (("rmsnorm", WEIGHTS), ("capped", CAPPED)):
        runs = [fc.trace(x, TOKENS[:1]) for x in (whole, sharded[whole])]
        found[f"loss of {name} by columns"] = float((runs[0].loss - runs[1].loss).abs())
        one, other = (fc.head_ablation(run, per_token=True, metric="probability").values for run in runs)
        found[f"ablation of {name} by columns"] = float((one - other).abs().nan_to_num().max())
    examples = [fc.sweep(x, TOKENS[:1], "head").examples(4) for x in (CAPPED, sharded[CAPPED])]
    found["examples by columns"] = max(abs(a.ablated - b.ablated) for a, b in zip(*examples, strict=True))
    out = folder / "columns"
    stored = fc.sweep(CAPPED, TOKENS, "head", out=out)
    if dist.get_world_size() == 2:
        found |= {f"called {name}": value for name, value in outcomes(folder, mesh).items()}
        found |= of_command(folder / "command")
    if dist.get_world_size() > 1:
        tied = replace(WEIGHTS, W_U=WEIGHTS.W_E.mT)
        found |= refusals(mesh) | {"tied stays whole": sharing.sharded(tied) is tied}
    found["stored by columns"] = apart(fc.sweep(sharded[CAPPED], TOKENS, "head", out=out, resume=True), stored)
    return found


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of sharded weights that are no good, by what is wrong."""
    sharded = replace(WEIGHTS, W_U=distribute_tensor(WEIGHTS.W_U, mesh, [Shard(1)]))
    broken = WEIGHTS.W_U.clone()
    broken[3, 96] = torch.nan
    learns = replace(sharded, W_O=WEIGHTS.W_O.clone().requires_grad_())
    calls = {
        "not finite": lambda: replace(WEIGHTS, W_U=distribute_tensor(broken, mesh, [Shard(1)])),
        "split is": lambda: fc.sweep(sharded, TOKENS, split="sequences"),
        "placed": lambda: replace(WEIGHTS, W_U=distribute_tensor(WEIGHTS.W_U, mesh, [Shard(0)])),
        "moved": lambda: sharded.to("cuda"),
        "learns": lambda: fc.order_losses(fc.trace(learns, TOKENS)),
        "left": lambda: fc.ops.pair_norms(sharded.W_U[None], WEIGHTS.W_E[None]),
        "W_E": lambda: replace(WEIGHTS, W_E=distribute_tensor(WEIGHTS.W_E, mesh, [Shard(1)])),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"W_[UE]|left") as error:
            call()
        said[name] = str(error.value)
    return said


def of_command(out: Path) -> dict[str, object]:
    """How large what the command holds while its sweep runs is beside W_U; and how far its table is from one process'."""
    weights = fc.load_weights("induction-2l")
    whole, size, swept = fc.sweep, 4 * weights.W_U.numel(), {}

    def sweep(model: fc.CircuitWeights, tokens: torch.Tensor, *args: object, **options: object) -> fc.Sweep:
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
        stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        swept["held"] = sorted(held / size for held in stored.values() if held >= size / 2)
        swept["alone"] = whole(fc.load_weights("induction-2l"), tokens, *args[:3], split="none").result.delta
        return whole(model, tokens, *args, **options)

    del weights
    given = ["induction-2l", "--scope", "head", "--sequences", 2, "--length", 16, "--split", "vocabulary", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "rank", dist.get_rank)
        patch.setattr(fc, "sweep", sweep)
        done = run("sweep", *given)
    assert done.exit_code == 0, done.output
    dist.barrier()
    table = torch.tensor(pyarrow.parquet.read_table(out / "sweep.parquet")["delta_nll"].to_pylist())
    return {"held": swept["held"], "command": float((table - swept["alone"].flatten()).abs().max())}


def _told(mine: object) -> list[object]:
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _process(folder: Path, rank: int, size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    (folder / f"{rank}.json").write_text(json.dumps(everything(folder) if size > 1 else by_columns(folder)))


def main(folder: Path, sizes: list[int]) -> None:
    """Forks processes, so that each costs no start of an interpreter; one thread has run so far."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for size in sizes:
        here = folder / str(size)
        here.mkdir()
        children = [context.Process(target=_process, args=(here, rank, size)) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
