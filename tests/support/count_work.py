"""Counts what a computation multiplies, by watching every op that torch calls."""

from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Multiply-adds of matrix products, of the kernels' own, and the logits that the kernels change."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.change_products = self.changes = self.pair_changes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in ("mm", "bmm", "_linear_pointwise"):
            left, right = args[:2]
            columns = right.shape[0] if name == "_linear_pointwise" else right.shape[-1]
            self.products += prod(left.shape) * columns
        elif name == "addmm":
            self.products += prod(args[1].shape) * args[2].shape[-1]
        elif name in ("sweep_nll", "joint_nll"):
            base, delta, basis, pairs = args[0], args[1], args[2], args[5]
            singles, logits = len(delta), base.numel()
            self.change_products += singles * logits * delta.shape[-1]
            outer = args[-1] if name == "sweep_nll" and len(args) > 10 else None
            if outer is not None:  # made in the kernel
                self.products += outer.numel() * basis.shape[-1]
            if name == "joint_nll":
                self.pair_changes += len(pairs) * logits
            else:
                self.changes += singles * logits
        return func(*args, **(kwargs or {}))


def counted(function: Any) -> Counted:
    """What a call multiplies."""
    with torch.no_grad(), Counted() as seen:
        function()
    return seen
