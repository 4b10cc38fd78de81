"""Attention that calls no interface, observed and changed at its two products: scores, and mixtures of values."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm)
_WITH_BASE = (torch.baddbmm, Tensor.baddbmm)


class Products(TorchFunctionMode):
    """Within it an attention stops at one of its products of two activations, which have three dimensions or more.

    The first is of queries [N, H, T, r] and keys [N, H, r, T], the second of patterns [N, H, T, T] and values
    [N, H, T, s]; N and H may be one dimension.

    Args:
        last: which product it stops at, 1 or 2; `Reached` has the factors of those up to there.
        given: queries and keys (transposed) that the first product multiplies instead; then projections, of which
            nothing is used, are not computed.
    """

    def __init__(self, last: int, *given: Tensor) -> None:
        super().__init__()
        self._last, self._given = last, given
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch."""
        kwargs = kwargs or {}
        if self._given and called is torch.nn.functional.linear:
            read, weight = args[:2]
            return read.new_zeros(*read.shape[:-1], len(weight))
        if called not in _PRODUCTS:
            return called(*args, **kwargs)
        if called in _WITH_BASE:
            batches = [kwargs.pop("batch1", None), kwargs.pop("batch2", None)]
            left, right = batches if batches[0] is not None else args[1:3]
            base: tuple[Any, ...] = (args[0],)
        else:
            (left, right), base = args, ()
        if left.dim() < 3 or left.dim() != right.dim():
            return called(*args, **kwargs)
        self._seen.append((left, right))
        if len(self._seen) == self._last:
            raise Reached(self._seen)
        if self._given:
            left, right = (_shaped(new, old) for new, old in zip(self._given, (left, right), strict=True))
        return called(*base, left, right, **kwargs)


def _shaped(new: Tensor, old: Tensor) -> Tensor:
    """A factor [N, n, ...] in the shape of the one it replaces, with key/value heads repeated if those were."""
    return new.repeat_interleave(old.numel() // new.numel(), 1).reshape(old.shape)


class Reached(Exception):
    """Leaves an attention at one of its products.

    Attributes:
        factors: of each product up to there.
    """

    def __init__(self, factors: list[tuple[Tensor, Tensor]]) -> None:
        self.factors = factors
