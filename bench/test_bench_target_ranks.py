"""`target_ranks` on the CPU, beside torch's one-liner and `sweep_nll` on the same inputs."""

import statistics

import torch

import pyfastcircuits as fc
from bench.sweep_inputs import P, R, T, V, sweep_inputs
from bench.timing import interleaved, ratio


def torch_ranks(base, delta, basis, targets):
    out = []
    for z in delta:
        logits = torch.addmm(base, z, basis[0])
        out.append((logits > logits.gather(-1, targets[:, None])).sum(-1))
    return torch.stack(out)


def test_target_ranks(found):
    inputs = sweep_inputs()
    functions = {
        "ours": lambda: fc.ops.target_ranks(*inputs),
        "sweep_nll": lambda: fc.ops.sweep_nll(*inputs),
        "torch": lambda: torch_ranks(*inputs),
    }
    times = interleaved(functions, rounds=5)
    shape = f"target_ranks fp32, T={T} V={V} r={R} P={P}"
    found(f"{shape}: time", f"{statistics.median(times['ours']) / P * 1e3:.1f} ms a pair")
    found(f"{shape}: ours / sweep_nll", f"{ratio(times, 'ours', 'sweep_nll'):.2f}", "<= 1")
    found(f"{shape}: torch addmm and compare, pair by pair / ours", f"{ratio(times, 'torch', 'ours'):.2f}")
    off = (functions["ours"]() - functions["torch"]()).abs()
    found("  ranks that torch's rounding changes", f"{int((off > 0).sum())} of {P * T}, by at most {int(off.max())}")
