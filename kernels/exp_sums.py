"""Sums of exponentials of rows of logits (online softmax), and means under the clean run's probabilities.

Exponentials are powers of 2: logits are multiplied by log2(e) first. Sums are relative to the largest logit so far, and
what was summed before is rescaled when a larger one comes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
MEAN_ELEMENTS = 1 << 22  # of a slice's fp64 copies


@triton.jit
def finite(highest):
    """What a sum is relative to: the largest logit, or 0 where that is infinite (the sum is then 0 or inf itself)."""
    return tl.where(tl.abs(highest) < float("inf"), highest, 0.0)


@triton.jit
def reference(highest):
    """The same in powers of 2."""
    return tl.where(tl.abs(highest) < float("inf"), highest * LOG2E, 0.0)


@triton.jit
def online_sum(
    highest,  # [M]
    total,  # [M]
    logits,  # [M, N]
    SUBTRACT_FIRST: tl.constexpr = False,
):
    """The running maximum and the sum of exponentials relative to it, after one tile of logits more.

    One fused multiply-add scales a logit and subtracts the maximum. To SUBTRACT_FIRST takes an instruction more, and
    rounds no huge product where multiply-adds are not fused.
    """
    tallest = tl.maximum(highest, tl.max(logits, 1))
    if SUBTRACT_FIRST:
        level = finite(tallest)
        total = tl.where(total == 0, 0.0, total * tl.exp2((highest - level) * LOG2E))
        total += tl.sum(tl.exp2((logits - level[:, None]) * LOG2E), 1)
    else:
        level = reference(tallest)
        total = tl.where(total == 0, 0.0, total * tl.exp2(reference(highest) - level))
        total += tl.sum(tl.exp2(logits * LOG2E - level[:, None]), 1)
    return tallest, total


@triton.jit
def capped(x, CAP: tl.constexpr):
    """The soft cap CAP * tanh(x / CAP), or x where CAP is None.

    Near zero, where 1 - 2 / (e^2x + 1) cancels, tanh is Cephes' polynomial or, in fp64, rational function.
    """
    if CAP is None:
        return x
    else:  # a branch that is not compiled
        x = x / CAP
        z = x * x
        if x.dtype == tl.float64:
            p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
            q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
            near = x * (z * p / q) + x
        else:
            p = ((z * -5.70498872745e-3 + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
            near = (p * z - 3.33332819422e-1) * z * x + x
        far = 1 - 2 / (tl.exp2(tl.minimum(tl.abs(x), 40.0) * (2 * LOG2E)) + 1)
        out = tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
        return CAP * tl.where(x == x, out, x)


@triton.jit
def expected(
    logits,  # [M, N] capped
    clean,  # [M, N] as given, without the cap
    lse,  # [M] of the clean ones, capped
    there,  # [1, N]
    CAP: tl.constexpr,
):
    """What a tile adds to the means of logits - clean logits under the clean run's probabilities, [M]."""
    clean = capped(clean.to(logits.dtype), CAP)
    probability = tl.where(there, tl.exp2((clean - lse[:, None]) * LOG2E), 0.0)
    return tl.sum(tl.where(probability > 0, probability * (logits - clean), 0.0), 1)


def logsumexp(references: Tensor, totals: Tensor) -> Tensor:
    """Joins the sums of powers of 2 of all splits [S, ...], each relative to its reference, into a logsumexp in fp64.

    The references are divided by the same rounded log2(e) that the kernels multiplied by, so that a row's largest logit
    comes back as it was.
    """
    log2e = torch.tensor(LOG2E.value, dtype=references.dtype, device="cpu").item()
    return ((references.double() + totals.double().log2()) / log2e).logsumexp(0)


def clean_means(base: Tensor, basis: Tensor, clean_lse: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of the clean logits [T], and of every row of the basis [G, T, r], under the clean run's probabilities.

    They are summed in fp64, so that no setting of torch's matrix products matters, and by slices of the vocabulary, so
    that the fp64 copies stay small.
    """
    (groups, rank, _), (positions, vocabulary) = basis.shape, base.shape
    mean_base = base.new_zeros(positions, dtype=torch.float64)
    mean_basis = base.new_zeros(positions, groups * rank, dtype=torch.float64)
    width = max(1, MEAN_ELEMENTS // (groups * rank + positions))
    for first in range(0, vocabulary, width):
        here = slice(first, min(first + width, vocabulary))
        logits = base[:, here].double()
        probability = (logits - clean_lse.double()[:, None]).exp()
        seen = probability > 0
        probability = torch.where(seen, probability, 0.0)
        mean_base += torch.where(seen, probability * logits, 0.0).sum(-1)
        mean_basis += probability @ basis[..., here].flatten(0, 1).double().T
    return mean_base.to(work), mean_basis.view(positions, groups, rank).transpose(0, 1).to(work).contiguous()
