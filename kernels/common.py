"""What every launch does around its kernel: it chooses block sizes for the GPU, and lays the factors out for it."""

import torch
from torch import Tensor

from pyfastcircuits.kernels.configs import BY_COLUMNS, Config, arithmetic, choose

ALIGNMENT = 16  # elements between rows of a factor, so that loads are wide and can run ahead


def architecture(x: Tensor) -> int:
    """Compute capability of the tensor's GPU, as 90; 90 for the interpreter's CPU tensors."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def configure(op: str, sizes: dict[str, int], x: Tensor, precision: str = "ieee") -> tuple[Config, str]:
    """The launch of `op` on tensors like x, and what multiplies, as `arithmetic` names it."""
    kind = arithmetic(op, str(x.dtype).removeprefix("torch."), precision)
    return choose(op, sizes, kind, architecture(x)), kind


def rounded(factor: Tensor, kind: str) -> Tensor:
    """A contiguous factor with the digits that `kind` multiplies: it is rounded once, here, to the nearest.

    Tensor cores read 10 bits of a TF32 factor's fraction and cut the others off, which errs twice as much, and to the
    same side always.
    """
    if kind == "bf16":
        return factor.bfloat16().contiguous()
    factor = factor.contiguous()
    if kind != "tf32":
        return factor
    nearest = ((factor.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)
    return torch.where(factor.isnan(), factor, nearest)  # some NaN would be carried over into a number


def for_products(delta: Tensor, basis: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Contiguous factors [P, T, r] and [G, r, V], rounded for `kind`, as `tile.multiply_basis` takes them.

    For TF32 the basis is [G, V, r], because tensor cores read it from shared memory only where its inner index is
    contiguous; for "tf32x3" rows of both are parted.
    """
    if kind not in BY_COLUMNS:
        return delta, laid_out(basis, kind)
    turned = laid_out(basis.mT, "fp32")
    return (parted(delta), parted(turned)) if kind == "tf32x3" else (delta, turned)


def parted(factor: Tensor) -> Tensor:
    """An fp32 factor [..., r] as [..., 2 r] of TF32: it rounded, and what that left, rounded."""
    high = rounded(factor, "tf32")
    return torch.cat((high, rounded(torch.where(high.isfinite(), factor - high, 0.0), "tf32")), -1)


def laid_out(factor: Tensor, kind: str) -> Tensor:
    """The same with the last axis padded to a multiple of ALIGNMENT, at least one."""
    width = max(factor.shape[-1], 1)
    padding = width - factor.shape[-1] + -width % ALIGNMENT
    return rounded(torch.nn.functional.pad(factor, (0, padding)) if padding else factor, kind)
