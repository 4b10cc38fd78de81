"""What sweep_nll and joint_nll compute in fp64: a program for each (ablation, position) or (pair, position).

That is the changes of a few tokens' logits, and all there is of rows whose bound is past the direct form, or that it is
not good enough for, or that are not finite. Those are rare: a program whose row is in bounds is done at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.effects import RAISED, SMALL, clean_means, clean_run, limit
from pyfastcircuits.kernels.exp_sums import capped, finite
from pyfastcircuits.kernels.sweep import existing
from pyfastcircuits.shapes import Four

TOKENS_OPTIONS = {"BLOCK_T": 32, "BLOCK_K": 8, "num_warps": 1, "maxnreg": 255}
FULL_OPTIONS = {"BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 4, "maxnreg": 255}


class Rows(NamedTuple):
    """What tells a row's logits: those of ablation p, or of ablations first[p] and second[p] at once."""

    base: Tensor  # [T, V]
    delta: Tensor  # [S, T, r]
    basis: Tensor  # [G, r, stride]
    group: Tensor  # [S]
    first: Tensor | None  # [P]
    second: Tensor | None  # [P]
    scale: Tensor | None  # [P, T]
    clean_lse: Tensor  # [T]


@triton.jit
def _product(
    delta,
    basis,
    group,
    single,
    t,  # of each entry, [N], or of all
    columns,  # [N]
    there,  # [N]
    positions,
    groups,
    stride,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Entries of the product of one ablation, [N]."""
    home, _poison = existing(tl.load(group + single), groups)
    total = tl.zeros([columns.shape[0]], tl.float64)
    rows = delta + (single * positions + t) * RANK + tl.zeros([columns.shape[0]], tl.int64)
    pointers = basis + home * RANK * stride + columns
    for first in range(0, RANK, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        left = tl.load(rows[:, None] + inner[None, :], (inner < RANK)[None, :], 0.0).to(tl.float64)
        here = pointers[:, None] + inner[None, :].to(tl.int64) * stride
        right = tl.load(here, there[:, None] & (inner < RANK)[None, :], 0.0).to(tl.float64)
        total += tl.sum(left * right, 1)
    return total


@triton.jit
def _products(
    delta,
    basis,
    group,
    first,
    second,
    p,
    t,
    columns,  # [N]
    there,  # [N]
    positions,
    groups,
    stride,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Entries of the product of a row, or the sums of those of a pair, [N]."""
    if first is None:
        return _product(delta, basis, group, p, t, columns, there, positions, groups, stride, RANK, BLOCK_K)
    else:  # a branch that is not compiled
        p, other = tl.load(first + p), tl.load(second + p)
        x = _product(delta, basis, group, p, t, columns, there, positions, groups, stride, RANK, BLOCK_K)
        return x + _product(delta, basis, group, other, t, columns, there, positions, groups, stride, RANK, BLOCK_K)


@triton.jit
def _changes(
    products,  # [N]
    base,
    stretch,
    t,
    lse,
    columns,  # [N]
    there,  # [N]
    vocabulary,
    CAP: tl.constexpr,
):
    """Logarithms of clean probabilities, and changes, of some logits; both [N]."""
    clean = tl.load(base + t * vocabulary + columns, there, float("-inf")).to(tl.float64)
    log_p = capped(clean, CAP) - lse
    x = products
    if stretch is not None:
        start = log_p if CAP is None else clean
        x = stretch * x + tl.where(clean == float("-inf"), 0.0, (stretch - 1) * start)
    if CAP is not None:
        x = tl.where(tl.abs(clean) == float("inf"), 0.0, capped(clean + x, CAP) - capped(clean, CAP))
    return log_p, x


@triton.jit
def tokens_kernel(
    base,  # [T, V]
    delta,  # [S, T, r]
    basis,  # [G, r, stride]
    group,  # [S]
    first,  # [P] or None
    second,  # [P] or None
    scale,  # [P, T] or None
    clean_lse,  # [T]
    tokens,  # [T, count]: those asked for, then the most probable ones
    probabilities,  # [T, count]: of the latter; 0 of those that are not to be summed
    mean_base,  # [T], or None under a cap, where means are not linear
    mean_basis,  # [G, r, T] or None
    gains,  # [P, T]
    totals,  # [P, T]
    picked,  # [P, T, asked]
    means,  # [P, T] or None
    positions,
    vocabulary,
    groups,
    stride,
    count,
    asked,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAP: tl.constexpr,
):
    """Changes of the tokens asked for, sums over the most probable ones, and means over all where those are linear."""
    blocks = tl.cdiv(positions, BLOCK_T)
    p = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < positions
    t = tl.minimum(t, positions - 1).to(tl.int64)
    row = p * positions + t
    lse = tl.load(clean_lse + t)
    stretch = None
    if scale is not None:
        stretch = tl.load(scale + row).to(tl.float64)
    gain = tl.zeros([BLOCK_T], tl.float64)
    total = tl.zeros([BLOCK_T], tl.float64)
    mean = tl.zeros([BLOCK_T], tl.float64)
    for k in range(count):
        token = tl.load(tokens + t * count + k)
        weight = tl.load(probabilities + t * count + k)
        there = inside & (token >= 0) & (token < vocabulary) & ((weight > 0) | (k < asked))
        if tl.max(there.to(tl.int32)) > 0:
            x = _products(
                delta, basis, group, first, second, p, t, token, there, positions, groups, stride, RANK, BLOCK_K
            )
            _log_p, x = _changes(x, base, stretch, t, lse, token, there, vocabulary, CAP)
            tl.store(picked + row * asked + k, x, there & (k < asked))
            x = tl.where(weight > 0, x, 0.0)
            grown = tl.exp(x)
            gain += weight * (grown - 1)
            total += weight * grown
            mean += weight * x
    tl.store(gains + row, gain, inside)
    tl.store(totals + row, total, inside)
    if means is not None:
        if mean_basis is not None:
            mean = _products(
                delta, mean_basis, group, first, second, p, t, t, inside, positions, groups, positions, RANK, BLOCK_K
            )
            if scale is not None:
                mean = stretch * mean + (stretch - 1) * tl.load(mean_base + t)
        tl.store(means + row, mean, inside)


@triton.jit
def full_kernel(
    base,  # [T, V]
    delta,  # [S, T, r]
    basis,  # [G, r, stride]
    group,  # [S]
    first,  # [P] or None
    second,  # [P] or None
    scale,  # [P, T] or None
    clean_lse,  # [T]
    bounds,  # [P, T]
    gain,  # [P, T]
    log_total,  # [P, T]
    mean,  # [P, T], or None where it is there already
    positions,
    vocabulary,
    groups,
    stride,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """All sums of a row that is out of bounds; each lane has a running maximum of its own."""
    row = tl.program_id(0).to(tl.int64)
    if not (tl.load(bounds + row) <= LIMIT):
        p, t = row // positions, row % positions
        lse = tl.load(clean_lse + t)
        stretch = None
        if scale is not None:
            stretch = tl.load(scale + row).to(tl.float64)
        highest = tl.full([BLOCK_N], float("-inf"), tl.float64)
        total = tl.zeros([BLOCK_N], tl.float64)
        mass = tl.zeros([BLOCK_N], tl.float64)
        moved = tl.zeros([BLOCK_N], tl.float64)
        for start in range(0, vocabulary, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            there = columns < vocabulary
            x = _products(
                delta, basis, group, first, second, p, t, columns, there, positions, groups, stride, RANK, BLOCK_K
            )
            log_p, x = _changes(x, base, stretch, t, lse, columns, there, vocabulary, CAP)
            weight = tl.where(there, tl.exp(log_p), 0.0)
            mass += weight
            moved += tl.where(weight == 0, 0.0, weight * x)
            x = tl.where(there, log_p + x, float("-inf"))
            tallest = tl.maximum(highest, x)
            level = finite(tallest)
            total = tl.where(total == 0, 0.0, total * tl.exp(highest - level)) + tl.exp(x - level)
            highest = tallest
        level = finite(tl.max(highest))
        total = tl.where(total == 0, 0.0, total * tl.exp(finite(highest) - level))
        found = level + tl.log(tl.sum(total))
        tl.store(log_total + row, found)
        tl.store(gain + row, tl.exp(found) - tl.sum(mass))
        if mean is not None:
            tl.store(mean + row, tl.sum(moved))


def effects(
    rows: Rows,
    bounds: Tensor,  # [P, T] on the changes of logits
    tokens: Tensor,  # [T, K]
    there: Tensor,  # [P]: whether the row's ablations and groups are
    mean: bool,
    cap: float | None,
    summed: Callable[[Tensor], tuple[Tensor, ...]],
) -> Four:
    """The results of sweep_nll or joint_nll.

    `summed` gives the partial sums [splits, P, T] of all that `sums_of` does (of gain alone where the form is small),
    and under a cap of p * change, over the tokens whose clean logit is below what it is given, [T].

    An ablation may raise tokens of little probability to much: then roundings are far more than the change that the
    clean run expects, and the row is made in fp64.
    """
    base, clean_lse = rows.base, rows.clean_lse
    bounds = torch.where(clean_lse.isfinite(), bounds, torch.inf)
    found, p, bar, mass = clean_run(base, clean_lse, cap)
    gains, totals, raised, sizes, *changes = summed(bar)
    gain, total, moved = bounds.new_empty(3, *bounds.shape, dtype=torch.float64)
    picked = gain.new_zeros(*gain.shape, tokens.shape[1])
    linear = clean_means(base, rows.basis[..., : base.shape[1]], clean_lse) if mean and cap is None else (None, None)
    several = torch.cat((tokens, found), 1)
    p = torch.cat((p.new_zeros(tokens.shape), p), 1)
    counts = (*base.shape, len(rows.basis), rows.basis.shape[2])
    constants = {"RANK": rows.delta.shape[2], "CAP": cap}
    blocks = triton.cdiv(len(base), TOKENS_OPTIONS["BLOCK_T"])
    tokens_kernel[(len(bounds) * blocks,)](
        *rows, several, p, *linear, gain, total, picked, moved if mean else None,
        *counts, several.shape[1], tokens.shape[1],
        **constants, **TOKENS_OPTIONS,
    )  # fmt: skip
    gain += gains.sum(0, dtype=torch.float64)
    total += totals.sum(0, dtype=torch.float64)
    if changes:
        moved += changes[0].sum(0, dtype=torch.float64)
    doubtful = (bounds > SMALL.value) & (raised.sum(0) > RAISED * total * sizes.sum(0))
    log_total = torch.where(bounds <= SMALL.value, mass + gain, total).log()
    bounds = torch.where(doubtful, torch.inf, bounds)
    full_kernel[(gain.numel(),)](
        *rows, bounds, gain, log_total, moved if changes else None,
        *counts, LIMIT=limit(cap), **constants, **FULL_OPTIONS,
    )  # fmt: skip
    poison = torch.where(there, 0.0, torch.nan).double()[:, None]
    means = moved + poison if mean else moved[:0].clone()
    return gain + poison, log_total + poison, picked + poison[..., None], means


def nothing(outputs: Four) -> Four:
    """The results of a vocabulary, or of a list of ablations, that is empty."""
    gain, log_total, picked, mean = outputs
    return gain.zero_(), log_total.fill_(-torch.inf), picked.zero_(), mean.zero_()
