"""Sums of exponentials of rows of logits (online softmax), and soft caps.

Exponentials are powers of 2: logits are multiplied by log2(e) first. Sums are relative to the largest logit so far, and
what was summed before is rescaled when a larger one comes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


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


def logsumexp(references: Tensor, totals: Tensor) -> Tensor:
    """Joins the sums of powers of 2 of all splits [S, ...], each relative to its reference, into a logsumexp in fp64.

    The references are divided by the same rounded log2(e) that the kernels multiplied by, so that a row's largest logit
    comes back as it was.
    """
    log2e = torch.tensor(LOG2E.value, dtype=references.dtype, device="cpu").item()
    return ((references.double() + totals.double().log2()) / log2e).logsumexp(0)
