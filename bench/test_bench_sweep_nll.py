"""`sweep_nll` on the CPU, beside torch's one-liner and the machine's multiply-add and exponential rates."""

import statistics

import pytest
import torch

import pyfastcircuits as fc
from bench.sweep_inputs import P, R, T, V, sweep_inputs
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio


@pytest.fixture(scope="module")
def inputs():
    return sweep_inputs()


def torch_pair_by_pair(base, delta, basis, targets):
    out = []
    for z in delta:
        logits = torch.addmm(base, z, basis[0])
        out.append(torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0])
    return torch.stack(out)


def test_sweep_nll(inputs, benchmark, found):
    rates = {"fma": [], "exp": [], "bf16": []}

    def measure_rates():
        for kind, values in rates.items():
            values.append(cpu_rate(kind))

    has_bf16 = cpu_rate("bf16") > 0
    functions = {
        "rates": measure_rates,
        "ours": lambda: fc.ops.sweep_nll(*inputs),
        "ours with kl": lambda: fc.ops.sweep_nll(*inputs, kl=True),
        "torch": lambda: torch_pair_by_pair(*inputs),
    }
    if has_bf16:
        functions["ours bf16"] = lambda: fc.ops.sweep_nll(*inputs, precision="bf16")
    times = interleaved(functions, rounds=7)
    fma, exp, bf16 = (statistics.median(values) for values in rates.values())
    flops, exps = 2.0 * P * T * V * R, float(P * T * V)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    limit = statistics.median(
        t / (flops / f + exps / e) for t, f, e in zip(times["ours"], rates["fma"][1:], rates["exp"][1:], strict=True)
    )
    shape = f"sweep_nll fp32, T={T} V={V} r={R} P={P}"
    found(f"{shape}: rates", f"{fma / 1e9:.0f} GFLOP/s fp32, {bf16 / 1e9:.0f} bf16, {exp / 1e9:.1f} Gexp/s")
    found(f"{shape}: time", f"{seconds['ours'] / P * 1e3:.1f} ms a pair, {flops / seconds['ours'] / 1e9:.0f} GFLOP/s")
    found(f"{shape}: torch addmm and logsumexp, pair by pair / ours", f"{ratio(times, 'torch', 'ours'):.2f}", ">= 5")
    found(f"{shape}: ours / (FMA time + exp time)", f"{limit:.3f}", "<= 1.15")
    found(f"{shape}: with KL / without", f"{ratio(times, 'ours with kl', 'ours'):.3f}")
    exact = fc.ops.sweep_nll(*inputs)
    if has_bf16:
        rounded = fc.ops.sweep_nll(*inputs, precision="bf16")
        found(f"{shape}: ours fp32 / ours bf16", f"{ratio(times, 'ours', 'ours bf16'):.2f}", ">= 1.5")
        error = (rounded - exact).abs()
        found("  error of bf16", f"max {error.max():.2e}, mean {error.mean():.2e} nats")
    theirs, few = torch_pair_by_pair(*inputs), [x[:, :64] if i == 1 else x for i, x in enumerate(inputs)]
    few = (inputs[0][:64], few[1], inputs[2], inputs[3][:64])
    truth = fc.ops.sweep_nll(*(x.double() if x.is_floating_point() else x for x in few))
    ours_error, torch_error = ((x[:, :64].double() - truth).abs().max() for x in (exact, theirs))
    found("  error against fp64, first 64 positions", f"ours {ours_error:.1e}, torch {torch_error:.1e} nats")
    found(
        "  memory",
        f"{peak_bytes(functions['ours']) / 2**20:.1f} MiB, torch {peak_bytes(functions['torch']) / 2**20:.0f}",
    )
    benchmark.pedantic(functions["ours"], rounds=3)
