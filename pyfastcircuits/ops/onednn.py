"""Large fp32 matrix products on a CPU, by the faster of the two libraries that torch brings.

torch.mm asks MKL, which on AMD processors leaves AVX-512 alone; oneDNN uses it wherever it is: twice as fast there.
torch has no public way to ask oneDNN, so inside `OneDnnMatmul` torch's own products are handed to a private operator of
its compiler. Where this torch has no such operator, or with the environment variable PYFASTCIRCUITS_ONEDNN=0 (read when
an OneDnnMatmul is entered), products stay torch's.
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 1 << 21  # multiply-adds: below, finding out costs more than it brings
COPIED = 32 << 20  # bytes: of larger matrices with gaps no copy is made for oneDNN, and torch multiplies them
SCHEMA = (  # of torch 2.11 to 2.13
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_MM, _ADDMM, _BMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default


@cache
def available() -> bool:
    """Whether this torch has oneDNN, and its operator with the arguments that this module passes."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return torch.backends.mkldnn.is_available() and operator is not None and str(operator.default._schema) == SCHEMA


class OneDnnMatmul(TorchDispatchMode):
    """Inside, oneDNN multiplies fp32 matrices on a CPU, whoever asks for the product; all else is as it was.

    It has full fp32 precision, as torch.mm; sums are taken in another order. Work on another `device` is left alone: to
    look at each of its calls takes time.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.here = torch.device(device).type == "cpu"

    def __enter__(self) -> "OneDnnMatmul":
        """Take over products, unless oneDNN is switched off or not there."""
        self.entered = self.here and os.environ.get("PYFASTCIRCUITS_ONEDNN") != "0" and available()
        if self.entered:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Give them back."""
        if self.entered:
            super().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch keeps torch.compile out of modes by importing it whole, which takes a second; nothing compiles here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if func is _MM and _worthwhile(*args):
            return _linear(args[0], args[1], None)
        if func is _BMM and len(args[0]) == 1 and _worthwhile(args[0][0], args[1][0]):
            return _linear(args[0][0], args[1][0], None)[None]
        if func is _ADDMM and not kwargs and args[0].dim() == 1 and _worthwhile(*args[1:3]):
            return _linear(args[1], args[2], args[0])
        return func(*args, **kwargs)


def _worthwhile(left: Tensor, right: Tensor) -> bool:
    fitting = left.dtype == right.dtype == torch.float32 and left.device.type == "cpu"
    fitting = fitting and (left.is_contiguous() or 4 * left.numel() <= COPIED)
    fitting = fitting and (right.is_contiguous() or right.mT.is_contiguous() or 4 * right.numel() <= COPIED)
    return fitting and len(left) * right.numel() >= SMALLEST


def _linear(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN has kernels for matrices without gaps alone (else its slow reference): copies of others cost less."""
    if not right.mT.is_contiguous():
        right = right.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), right.mT, bias, "none", [], "")
    return out
