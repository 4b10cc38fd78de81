"""sweep_nll, target_ranks and joint_nll on the CPU against torch's one-liners and against what the machine can do."""

import statistics
import time

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio

T, V, R, P = 512, 50257, 64, 12
HEADS, SHORT = 12, 256  # of one layer of GPT-2 small


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(T, V, generator=g) * 3
    delta = torch.randn(P, T, R, generator=g)
    basis = torch.randn(1, R, V, generator=g) * 0.2
    return base, delta, basis, torch.randint(0, V, (T,), generator=g)


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
    found(f"{shape}: torch addmm + logsumexp, pair by pair / ours", f"{ratio(times, 'torch', 'ours'):.2f}", ">= 5")
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


def torch_ranks(base, delta, basis, targets):
    out = []
    for z in delta:
        logits = torch.addmm(base, z, basis[0])
        out.append((logits > logits.gather(-1, targets[:, None])).sum(-1))
    return torch.stack(out)


def test_target_ranks(inputs, found):
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


def torch_joint(base, delta, basis, group, targets, pairs):
    singles = [z @ basis[g] for z, g in zip(delta, group.tolist(), strict=True)]
    out = []
    for i, j in pairs.tolist():
        logits = base + singles[i] + singles[j]
        out.append(torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize(("rank", "groups"), [(768, 1), (64, HEADS)])
def test_joint_nll(rank, groups, found):
    """What the pairs cost beyond their single ablations, in the time that their exponentials take."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(SHORT, V, generator=g) * 3
    delta = torch.randn(HEADS, SHORT, rank, generator=g) / rank**0.5
    basis = torch.randn(groups, rank, V, generator=g)
    targets, group = torch.randint(0, V, (SHORT,), generator=g), torch.arange(HEADS) % groups
    pairs = torch.combinations(torch.arange(HEADS))
    rates = []
    functions = {
        "rate": lambda: rates.append(cpu_rate("exp")),
        "singles": lambda: fc.ops.sweep_nll(base, delta, basis, targets, group=group),
        "pairs": lambda: fc.ops.joint_nll(base, delta, basis, targets, pairs, group=group),
        "pairs with kl": lambda: fc.ops.joint_nll(base, delta, basis, targets, pairs, group=group, kl=True),
    }
    times = interleaved(functions, rounds=5)
    exps = float(len(pairs) * SHORT * V)
    beyond = statistics.median(
        (pair - single) * rate / exps
        for pair, single, rate in zip(times["pairs"], times["singles"], rates[1:], strict=True)
    )
    seconds = statistics.median(times["pairs"])
    shape = f"joint_nll fp32, {len(pairs)} pairs of {HEADS} heads, T={SHORT} V={V} r={rank} G={groups}"
    found(f"{shape}: time", f"{seconds:.3f} s, sweep_nll of the heads {statistics.median(times['singles']):.3f} s")
    found(f"{shape}: (ours - sweep_nll) / exp time of the pairs", f"{beyond:.2f}", "<= 2")
    found(f"{shape}: with KL / without", f"{ratio(times, 'pairs with kl', 'pairs'):.3f}")
    start = time.perf_counter()
    theirs = torch_joint(base, delta, basis, group, targets, pairs)
    found(f"{shape}: torch, heads once, pair by pair / ours", f"{(time.perf_counter() - start) / seconds:.1f}")
    found("  largest difference", f"{(theirs - functions['pairs']()).abs().max():.1e} nats")
    found(
        "  memory",
        f"{peak_bytes(functions['pairs']) / 2**20:.1f} MiB, torch "
        f"{peak_bytes(lambda: torch_joint(base, delta, basis, group, targets, pairs[:1])) / 2**20:.0f}",
    )
