"""The value that takes an ablated output's place: zero, a mean, or the output in another sequence."""

from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.modes import kept_for_backward
from pyfastcircuits.run import memory
from pyfastcircuits.run.nodes import Outputs
from pyfastcircuits.run.trace import FrozenTrace

Mode = Literal["zero", "mean", "resample"]
AverageOver = Literal["all", "positions", "batch"]


class AblationValue:
    """See `ablation.head_ablation` for mode, reference and over.

    `at` [B, T]: the positions where it takes the place of outputs; None: everywhere.

    Raises:
        ValueError: an unknown mode or over; a reference of another model or, where it matters, another shape; resample
            without a reference and with one sequence.
        TypeError: a reference that is no FrozenTrace.
    """

    def __init__(
        self,
        trace: FrozenTrace,
        mode: Mode = "zero",
        reference: FrozenTrace | None = None,
        over: AverageOver = "all",
        at: Tensor | None = None,
    ) -> None:
        if reference is not None:
            if mode == "zero":
                raise ValueError("reference is given, but mode is 'zero'")
            check_same_model("reference", reference, trace)
            _check_shape(reference, trace, mode, over)
        self.mode, self.average_over, self.at = mode, over, at
        self.reference = trace if reference is None else reference
        self.order: Tensor | None = None  # the sequence that each sequence is resampled from; None: its own number
        if mode == "resample" and reference is None:
            count = len(trace.tokens)
            if count < 2:
                raise ValueError("mode is 'resample', but the run has one sequence: give a reference")
            self.order = torch.arange(count, device=trace.tokens.device).roll(1)
        self._means = self.reference.means if over == "all" else {}  # those over all are small: any ablation finds them
        self._resampled: tuple[slice | Tensor, FrozenTrace] | None = None  # the last part asked about, and its source

    def value(self, outputs: Outputs, part: FrozenTrace) -> Tensor | float:
        """The value that takes the place of outputs in a part of the run; it broadcasts to them."""
        if self.mode == "zero":
            return 0.0
        if self.mode == "resample":
            return outputs(self._source(part.sequences))
        if outputs not in self._means:
            with kept_for_backward():
                self._means[outputs] = self._mean(outputs)
        means = self._means[outputs]
        return means[..., part.sequences, :, :] if self.average_over == "positions" else means

    def removal(self, outputs: Outputs, part: FrozenTrace) -> Tensor:
        """The outputs in a part of the run, less the value that takes their place: [n, B, T, x]."""
        gone, mask = outputs(part) - self.value(outputs, part), self.mask(part)
        return gone if mask is None else gone.masked_fill(~mask[..., None], 0)

    def mask(self, part: FrozenTrace) -> Tensor | None:
        """The positions [B, T] of a part of the run where outputs are replaced; None: all of them."""
        return None if self.at is None else self.at[part.sequences]

    def _source(self, sequences: slice | Tensor) -> FrozenTrace:
        """The part of the reference that some sequences of the run are resampled from."""
        if self._resampled is None or self._resampled[0] is not sequences:
            with kept_for_backward():
                source = self.reference[sequences if self.order is None else self.order[sequences]]
            self._resampled = sequences, source
        return self._resampled[1]

    def _mean(self, outputs: Outputs) -> Tensor:
        """The mean over real positions, sequences, or both: [n, 1 or B, 1 or T, x]."""
        sequences, length = self.reference.tokens.shape
        step = max(1, memory.ROWS // length)
        dims = {"all": (-3, -2), "positions": (-2,), "batch": (-3,)}[self.average_over]
        sums, counts = [], []
        for first in range(0, sequences, step):
            part = self.reference[first : first + step]
            real = torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask
            sums.append(outputs(part).double().where(real[..., None], 0).sum(dims, keepdim=True))
            counts.append(real[..., None].sum(list(dims), keepdim=True))
        if self.average_over == "positions":
            total, count = torch.cat(sums, -3), torch.cat(counts, -3)
        else:
            total, count = sum(sums, torch.zeros_like(sums[0])), sum(counts, torch.zeros_like(counts[0]))
        return (total / count.clamp(min=1)).to(self.reference.embedded.dtype)


def _check_shape(reference: FrozenTrace, trace: FrozenTrace, mode: Mode, over: AverageOver) -> None:
    """Raise ValueError unless the reference has the axes that are taken from it one by one."""
    theirs, ours = list(reference.tokens.shape), list(trace.tokens.shape)
    fixed = {"resample": slice(0, 2), "batch": slice(1, 2), "positions": slice(0, 1), "all": slice(0)}
    axes = fixed[over if mode == "mean" else mode]
    if theirs[axes] != ours[axes]:
        which = mode if mode == "resample" else f"mean over {over!r}"
        raise ValueError(f"reference has tokens of shape {theirs}, but the run {ours}: {which} needs them alike")


def check_same_model(name: str, other: FrozenTrace, trace: FrozenTrace) -> None:
    """Raise unless `other` is a run of the same model as `trace`.

    Raises:
        TypeError: it is no FrozenTrace.
        ValueError: a model with other weights or options, in whatever layer.
    """
    if not isinstance(other, FrozenTrace):
        raise TypeError(f"{name} is a {type(other).__name__}, expected a FrozenTrace (see trace)")
    trace.guard.check_same(other.guard, name)
