"""What takes the place of an ablated value: nothing, a mean, or the value of another sequence."""

from collections.abc import Callable, Hashable
from typing import Literal, get_args

import torch
from torch import Tensor

from pyfastcircuits.run.trace import FrozenTrace

__all__ = ["Mode", "Over", "Replacement", "check_same_model"]

Mode = Literal["zero", "mean", "resample"]
Over = Literal["all", "positions", "batch"]
Values = Callable[[FrozenTrace], Tensor]  # [..., B, T, r] of each sequence by itself
PART_ROWS = 4096  # positions of the reference worked on at a time, at least one sequence's


class Replacement:
    """See `ablation.head_ablation` for mode, reference and over.

    Raises:
        ValueError: an unknown mode or over; a reference of another model or, where it matters, another shape; resample
            without a reference and with one sequence.
        TypeError: a reference that is no FrozenTrace.
    """

    def __init__(
        self, trace: FrozenTrace, mode: Mode = "zero", reference: FrozenTrace | None = None, over: Over = "all"
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        if over not in get_args(Over):
            raise ValueError(f"over is {over!r}, expected one of {', '.join(get_args(Over))}")
        if reference is not None:
            if mode == "zero":
                raise ValueError("reference is given, but mode is 'zero'")
            check_same_model("reference", reference, trace)
            theirs, ours = list(reference.tokens.shape), list(trace.tokens.shape)
            fixed = {"resample": slice(0, 2), "batch": slice(1, 2), "positions": slice(0, 1), "all": slice(0)}
            axes = fixed[over if mode == "mean" else mode]
            if theirs[axes] != ours[axes]:
                what = mode if mode == "resample" else f"mean over {over!r}"
                raise ValueError(f"reference has tokens of shape {theirs}, but the run {ours}: {what} needs them alike")
        self.mode, self.over = mode, over
        self.reference = trace if reference is None else reference
        self.order: Tensor | None = None
        if mode == "resample" and reference is None:
            count = len(trace.tokens)
            if count < 2:
                raise ValueError("mode is 'resample', but the run has one sequence: give a reference")
            self.order = torch.arange(count, device=trace.tokens.device).roll(1)
        self._means: dict[Hashable, Tensor] = {}
        self._other: tuple[slice, FrozenTrace] | None = None

    def __call__(self, values: Values, sequences: slice, key: Hashable) -> Tensor | float:
        """What stands in the place of `values` of a run's `sequences`; broadcasts to them.

        `key` names the values: means are kept under it.
        """
        if self.mode == "zero":
            return 0.0
        if self.mode == "resample":
            if self._other is None or self._other[0] != sequences:
                rows = sequences if self.order is None else self.order[sequences]
                self._other = sequences, self.reference[rows]
            return values(self._other[1])
        if key not in self._means:
            self._means[key] = self._mean(values)
        means = self._means[key]
        return means[..., sequences, :, :] if self.over == "positions" else means

    def removed(self, values: Values, part: FrozenTrace, sequences: slice, key: Hashable) -> Tensor:
        """`values` of a part of the run, less what takes their place: [..., B, T, r]."""
        return values(part) - self(values, sequences, key)

    def _mean(self, values: Values) -> Tensor:
        """Over real positions, sequences, or both: [..., 1 or B, 1 or T, r]."""
        sequences, length = self.reference.tokens.shape
        step = max(1, PART_ROWS // length)
        dims = {"all": (-3, -2), "positions": (-2,), "batch": (-3,)}[self.over]
        sums, counts = [], []
        for first in range(0, sequences, step):
            part = self.reference[first : first + step]
            real = torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask
            found = values(part)
            sums.append(found.double().where(real[..., None], 0).sum(dims, keepdim=True))
            counts.append(real[..., None].sum(list(dims), keepdim=True))
        if self.over == "positions":
            total, count = torch.cat(sums, -3), torch.cat(counts, -3)
        else:
            total, count = sum(sums, torch.zeros_like(sums[0])), sum(counts, torch.zeros_like(counts[0]))
        return (total / count.clamp(min=1)).to(self.reference.embedded.dtype)


def check_same_model(name: str, other: FrozenTrace, trace: FrozenTrace) -> None:
    """Raise if `other` is no run of the same model.

    Raises:
        TypeError: it is no FrozenTrace.
        ValueError: a model of another shape or with other weights.
    """
    if not isinstance(other, FrozenTrace):
        raise TypeError(f"{name} is a {type(other).__name__}, expected a FrozenTrace (see trace)")
    if other.weights is trace.weights:
        return
    for (kind, theirs), (also, ours) in zip(other.weights.tensors(), trace.weights.tensors(), strict=False):
        if kind != also or theirs.shape != ours.shape:
            raise ValueError(
                f"{name} is a run of another model: its {kind} is {list(theirs.shape)}, ours {also} {list(ours.shape)}"
            )
        if theirs.dtype != ours.dtype or not torch.equal(theirs[0], ours[0]):
            raise ValueError(f"{name} is a run of another model: its {kind} differs")
