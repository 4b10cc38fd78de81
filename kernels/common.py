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
    """The launch of `op` on tensors like x, and the arithmetic that multiplies: "fp64", "fp32", "tf32" or "bf16"."""
    kind = arithmetic(str(x.dtype).removeprefix("torch."), precision)
    return choose(op, sizes, kind, architecture(x)), kind


def rounded(factor: Tensor, kind: str) -> Tensor:
    """A contiguous factor in the dtype that `kind` multiplies: for bfloat16 products factors are rounded once, here."""
    return (factor.bfloat16() if kind == "bf16" else factor).contiguous()


def laid_out(factor: Tensor, kind: str) -> Tensor:
    """The same with the last axis padded to a multiple of ALIGNMENT, at least one."""
    width = max(factor.shape[-1], 1)
    padding = width - factor.shape[-1] + -width % ALIGNMENT
    return rounded(torch.nn.functional.pad(factor, (0, padding)) if padding else factor, kind)
