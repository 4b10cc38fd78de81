"""`joint_nll` on the CPU: the cost of pairs beyond their single ablations, beside torch and the rate of multiply-adds."""

import statistics
import time

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio

DEGREE = 5  # of the polynomial that is exp(x) - 1 where changes are small
T, V, HEADS = 256, 50257, 12  # a layer of GPT-2 small


def torch_joint(base, delta, basis, group, targets, pairs):
    singles = [z @ basis[g] for z, g in zip(delta, group.tolist(), strict=True)]
    out = []
    for i, j in pairs.tolist():
        logits = base + singles[i] + singles[j]
        out.append(torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize(("rank", "groups"), [(768, 1), (64, HEADS)])
def test_joint_nll(rank, groups, found):
    """The cost of the pairs beyond their single ablations, in the time that their polynomials take."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(T, V, generator=g) * 3
    delta = torch.randn(HEADS, T, rank, generator=g) / rank**0.5
    basis = torch.randn(groups, rank, V, generator=g)
    targets, group = torch.randint(0, V, (T,), generator=g), torch.arange(HEADS) % groups
    pairs = torch.combinations(torch.arange(HEADS))
    rates = []
    functions = {
        "rate": lambda: rates.append(cpu_rate("fma")),
        "singles": lambda: fc.ops.sweep_nll(base, delta, basis, targets, group=group),
        "pairs": lambda: fc.ops.joint_nll(base, delta, basis, targets, pairs, group=group),
        "pairs with kl": lambda: fc.ops.joint_nll(base, delta, basis, targets, pairs, group=group, kl=True),
    }
    times = interleaved(functions, rounds=5)
    flops = 2.0 * len(pairs) * T * V * (DEGREE + 3)
    beyond = statistics.median(
        (pair - single) * rate / flops
        for pair, single, rate in zip(times["pairs"], times["singles"], rates[1:], strict=True)
    )
    seconds = statistics.median(times["pairs"])
    shape = f"joint_nll fp32, {len(pairs)} pairs of {HEADS} heads, T={T} V={V} r={rank} G={groups}"
    found(f"{shape}: time", f"{seconds:.3f} s, sweep_nll of the heads {statistics.median(times['singles']):.3f} s")
    found(
        f"{shape}: (ours - sweep_nll of the heads) / FMA time of {DEGREE + 3} a logit of the pairs",
        f"{beyond:.2f}",
        "<= 2",
    )
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
