"""What every launch does around its kernel: it chooses block sizes for the GPU, and lays the factors out for it."""

import torch
from torch import Tensor

from pyfastcircuits.kernels.configs import Config, arithmetic, choose

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


def laid_out(factor: Tensor, kind: str) -> Tensor:
    """The same with the last axis padded to a multiple of ALIGNMENT, at least one."""
    width = max(factor.shape[-1], 1)
    padding = width - factor.shape[-1] + -width % ALIGNMENT
    return rounded(torch.nn.functional.pad(factor, (0, padding)) if padding else factor, kind)
