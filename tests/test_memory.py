"""Scratch stays bounded: of a sweep, whatever the number of ablations, and what is kept between calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "tests")]  # at the end: the installed package comes first


def printed(code):
    """The numbers that a process of its own prints."""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return [int(number) for number in out.split()]


MEASURED = """
import sys
sys.path.extend({paths})
import torch
from bench.timing import peak_bytes
from support.random_models import random_weights
import pyfastcircuits as fc

w = random_weights(3, 4, 4, 256, 32, 50257, norm="rmsnorm", positional="none", dtype=torch.{dtype})
run = fc.trace(w, torch.randint(0, 50257, (1, 101)))
fc.path_ablation(run, [((0, 0), (1, 0))])
for low_memory in (True, False):
    for ablation in (fc.head_ablation, fc.pair_ablation):
        print(peak_bytes(lambda: ablation(run, kl=True, low_memory=low_memory)))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_most_128_mib(dtype):
    """Of 12 heads and 48 pairs, whose logits would be 0.2 and 0.9 GiB; without low_memory beside the clean logits."""
    *low, heads, pairs = printed(MEASURED.format(paths=PATHS, dtype=dtype))
    clean_logits = 100 * 50257 * 4
    assert max(*low, heads - clean_logits, pairs - clean_logits) <= 128 << 20


LEARNED = """
import sys
sys.path.extend({paths})
import torch
from bench.timing import peak_bytes
from support.random_models import random_weights
import pyfastcircuits as fc

w = random_weights(2, 16, 16, 64, 4, 20000, norm="rmsnorm", positional="none", dtype=torch.float32)
for _, tensor in w.tensors():
    tensor.requires_grad_()
run = fc.trace(w, torch.randint(0, 20000, (1, 65)))
fc.path_ablation(run, [((0, 0), (1, 0))]).values.sum().backward(retain_graph=True)
print(peak_bytes(lambda: fc.pair_ablation(run).values.sum().backward(retain_graph=True)))
"""


def test_gradients_of_many_ablations_take_the_memory_of_a_few():
    """Of 256 paths, whose logits would be 1.2 GiB."""
    [peak] = printed(LEARNED.format(paths=PATHS))
    assert peak <= 256 * 64 * 20000 * 4 // 4


SEARCHED = """
import sys
sys.path.extend({paths})
import torch
from bench.timing import peak_bytes
from pyfastcircuits import ops

A, B = torch.randn(20000, 64), torch.randn(64, 20000)
ops.diagonal_ranks(A[:50], B[:, :50])
for call in {calls}:
    print(peak_bytes(lambda: eval(call)))
"""
RESULTS = {  # bytes of each
    "ops.factored_topk(A, B, 100)": 0,
    "ops.factored_topk(A, B, 100, screen='none')": 0,
    "ops.factored_topk(A, B, 10, per_row=True)": 20000 * 10 * 20,
    "ops.diagonal_ranks(A, B)": 20000 * 8,
}


def test_searching_a_vocabulary_takes_at_most_64_mib():
    """The table of all entries would be 1.5 GiB."""
    for peak, (call, results) in zip(
        printed(SEARCHED.format(paths=PATHS, calls=[*RESULTS])), RESULTS.items(), strict=True
    ):
        assert peak - results <= 64 << 20, call


KEPT = """
import sys
sys.path.extend({paths})
from pathlib import Path
import torch
from bench.timing import peak_bytes
from pyfastcircuits import ops

def kept():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith("LazyFree"))

calls = []
for heads in (2, 125, 225, 75, 175):
    factors = torch.randn(heads, 256, 768)
    call = lambda: ops.pair_norms(factors, factors.mT, route="gram")
    calls.append(([call() for _ in range(2)], call))
assert all(torch.equal(*results) for results, _ in calls)
again = peak_bytes(calls[-1][1])
print(kept(), again)
"""


def test_scratch_is_kept_within_bounds_and_counted():
    kept, again = printed(KEPT.format(paths=PATHS))
    packed = 2 * 175 * 256 * 768 * 4  # of the last call, taken again
    assert kept <= 256 << 20
    assert again >= packed


SCORED = """
import sys
sys.path.extend({paths})
import torch
from bench.timing import peak_bytes
from support.random_models import random_weights
import pyfastcircuits as fc
from pyfastcircuits.experiments import edge_gradients, outside
from pyfastcircuits.sweeps.architectures import Architecture
from pyfastcircuits.sweeps.footprint import scores_footprint

outside.HELD, edge_gradients.GRADIENTS = 0, 4 << 20
w = random_weights({layers}, 16, 4, 1024, 64, 500, norm="rmsnorm", positional="rotary", dtype=torch.float32)
runs = [fc.trace(w, torch.randint(0, 500, (1, 256)), store="qk") for _ in range(2)]
asked = dict(metric=fc.LogitDifference(3, 5), positions=-1)
fc.edge_scores(*runs, **asked)
planned = scores_footprint(Architecture.of(w, "weights"), 1, 256)
print(peak_bytes(lambda: fc.edge_scores(*runs, **asked)), sum(planned.values()) - planned["runs"])
"""


def test_scores_of_all_edges_hold_what_is_planned():
    """Of each layer a stream, and what its heads have mixed: 1 MiB each here. Every tensor has pages of its own."""
    found = []
    for layers in (2, 4):
        code = SCORED.format(paths=PATHS, layers=layers)
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        ).stdout  # fmt: skip
        found.append([*map(int, out.split())])
    (few, planned), (many, _) = found
    assert many - few <= 2 * 5 << 19
    assert planned / 2 <= few <= planned


GIVEN_BACK = """
from pathlib import Path
import torch
from pyfastcircuits.run import memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith("VmRSS"))

large, small = torch.empty(1, 512, 512), torch.empty(1, 511, 512)
torch.ones(1 << 20), torch.ones(1 << 20)  # from now on the C library keeps what is freed of tensors smaller than that
tensors = [torch.ones(1 << 18) for _ in range(128)]
del tensors[:-1:2]
for stream in (small, large):
    before = resident()
    memory.give_back(stream)
    print(before - resident())
"""


def test_gaps_between_tensors_are_given_back():
    kept, given = printed(GIVEN_BACK)
    assert kept < 8 << 20
    assert given > 48 << 20
