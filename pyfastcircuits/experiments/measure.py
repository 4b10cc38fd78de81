"""From interventions to metrics, in bounded memory: every experiment measures its logits here.

What an intervention takes out of the final residual stream changes the clean logits by a low-rank term,
which goes through W_U or through W_O @ W_U of a head. Work is cut along sequences, experiments and the vocabulary.
Beyond the clean logits (one part of the sequences at a time; none with `low_memory`) the scratch is a few blocks of
run.memory's size, whatever the number of experiments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.learning import learned_losses
from pyfastcircuits.experiments.metrics import KL, Asked
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import final_norm_gain, norm_scale
from pyfastcircuits.ops import SweepPartial, rank_partial
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import CleanLogits, LogitBasis, Unembedding, basis_group, changed_partial, slices
from pyfastcircuits.run.trace import FrozenTrace


class _Part:
    """Some of the sequences: their clean logits at the positions measured."""

    def __init__(self, trace: FrozenTrace, asked: Asked, measurement: Measurement, unembedding: Unembedding) -> None:
        self.trace, self.asked, self.measurement = trace, asked, measurement
        self.unembedding, self.weights = unembedding, unembedding.weights
        self.final, self.scale = asked.rows(trace.final), asked.rows(trace.scales[-1][..., None])
        self.rows = final_norm_gain(self.final, self.weights) * self.scale
        self.tokens = asked.tokens()
        self.clean = CleanLogits(self.rows, unembedding, held=not measurement.low_memory)

    @cached_property
    def clean_lse(self) -> Tensor | None:
        """The logsumexp of the clean logits, fp64 [N], if the divergence is asked for."""
        if not any(isinstance(metric, KL) for metric in self.measurement.metrics):
            return None
        return _ChangedRows.unchanged(self).partial(clean_lse=None).lse[0]

    def narrow(self, intervention: Intervention) -> bool:
        """Whether making W_O @ W_U is less work than multiplying removals by W_O and then, wide, by W_U."""
        r, d, heads = self.weights.d_value, self.weights.d_model, len(intervention.write_heads)
        removals = len(intervention.places) * len(self.rows)
        return heads > 0 and heads * r * d <= removals * (d - r)

    def slices(self, basis: LogitBasis) -> list[slice]:
        """Slices of the vocabulary in which the bases, and clean logits that are not held, stay within two blocks."""
        heads = 1 if basis.outer is None else len(basis.outer)
        made = 0 if self.in_kernel(basis) else basis.width * heads
        clean = len(self.rows) if self.measurement.low_memory else 0
        return self.unembedding.slices(clean + made, self.measurement.low_memory or (heads > 1 and made > 0))

    def in_kernel(self, basis: LogitBasis) -> bool:
        """Whether W_O @ W_U of each experiment is left to the kernel; ranks and token logits need it made."""
        return basis.left_to_the_kernel and self.measurement.from_sums


@dataclass(eq=False)
class _ChangedRows:
    """The rows of some experiments: logits scale * (clean + delta @ basis), of which metrics ask sums (see Rows)."""

    part: _Part
    delta: Tensor  # [P, N, width], or [S, N, width] with pairs
    basis: LogitBasis
    columns: list[slice]
    scale: Tensor | None = None  # [P, N]
    pairs: Tensor | None = None  # [P, 2]

    @staticmethod
    def unchanged(part: _Part) -> "_ChangedRows":
        """The clean run as one experiment that changes nothing."""
        nothing = LogitBasis(part.unembedding)
        return _ChangedRows(part, part.rows.new_empty(1, len(part.rows), 0), nothing, part.slices(nothing))

    def partial(self, clean_lse: Tensor | None) -> SweepPartial:
        """The sums over the vocabulary."""
        how = self.part.measurement
        return changed_partial(
            self.part.clean, self.delta, self.basis, self.columns, self.part.tokens[:, 0], scale=self.scale,
            clean_lse=clean_lse, pairs=self.pairs, precision=how.precision, backend=how.backend,
        )  # fmt: skip

    @cached_property
    def _sums(self) -> SweepPartial:
        return self.partial(self.part.clean_lse)

    @cached_property
    def nll(self) -> Tensor:
        """See Rows."""
        return self._sums.lse - self._sums.picked[..., 0]

    @cached_property
    def divergence(self) -> Tensor:
        """See Rows."""
        assert self.part.clean_lse is not None
        return self._sums.lse - self.part.clean_lse - self._sums.change

    @cached_property
    def token_logits(self) -> tuple[Tensor, ...]:
        """See Rows."""
        cap = self.part.unembedding.cap
        logits = [self._uncapped(tokens) for tokens in self.part.tokens.unbind(-1)]
        logits = logits if self.scale is None else [x * self.scale for x in logits]
        return tuple(logits if cap is None else (cap * (x / cap).tanh() for x in logits))

    @cached_property
    def rank(self) -> Tensor:
        """See Rows. Scales and caps are increasing, and left out."""
        tokens, how = self.part.tokens[:, 0], self.part.measurement
        own = self._uncapped(tokens)
        total = torch.zeros_like(own)
        for part in self.columns:
            bases = self.basis(part)
            total += rank_partial(
                self.part.clean(part), self.delta, bases, tokens - part.start, own,
                group=basis_group(self.delta, bases), precision=how.precision, backend=how.backend,
            )  # fmt: skip
        return total

    def _uncapped(self, tokens: Tensor) -> Tensor:
        """The logits of one token [N] of each row before scale and cap, fp64 [P, N]."""
        changes = torch.einsum("pnr,prn->pn", self.delta.double(), self.basis(tokens).double())
        return self.part.clean.of_tokens(tokens) + changes


def measure(
    trace: FrozenTrace,
    interventions: Sequence[Intervention],
    how: Measurement,
    labels: Sequence[Label],
    shape: tuple[int, ...] | None = None,
    **setup: str | int | float,
) -> Result:
    """The result of every experiment of every intervention, labelled in the order of their places.

    Values are means over the positions measured, or with `per_token` each position's. They are [P], or `shape`, for as
    many labels. The losses of a measurement that learns have gradients.
    """
    first, *others = how.metrics
    count, found = len(labels), {}
    if how.learns:
        found[first.name] = learned_losses(trace, interventions, how, count)
        how = replace(how, metrics=tuple(others), progress=None)
    if how.metrics:
        found |= _measured(trace, interventions, how, count)
    values = {name: x.unflatten(0, shape or (count,)) for name, (x, _) in found.items()}
    extra = {metric.name: values[metric.name] for metric in others}
    return Result(labels, values[first.name], found[first.name][1], first.name, extra, setup, first.harm)


@torch.no_grad()
def _measured(
    trace: FrozenTrace, interventions: Sequence[Intervention], how: Measurement, count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """By metric: its values of `count` experiments, and its value of the clean run."""
    values = {metric.name: _Values(trace, how, (count,)) for metric in how.metrics}
    clean = {metric.name: _Values(trace, how, ()) for metric in how.metrics}
    with OneDnnMatmul(trace.weights.device):
        unembedding = Unembedding(trace.weights)
        for sequences in slices(len(trace.tokens), _sequences_at_once(trace, interventions, how)):
            asked = how.asked[sequences]
            if not asked.count:
                continue
            part = _Part(trace[sequences], asked, how, unembedding)
            unchanged = _ChangedRows.unchanged(part)
            for metric in how.metrics:
                clean[metric.name].put((), sequences, asked, metric.measure(unchanged)[0])
            for intervention in interventions:
                for members, rows in _changed_rows(intervention, part):
                    places = torch.tensor([intervention.places[i] for i in members], device=asked.where.device)
                    for metric in how.metrics:
                        values[metric.name].put(places, sequences, asked, metric.measure(rows))
                    if how.progress is not None:
                        how.progress(len(members) * asked.count / how.asked.count)
    return {name: (x.finished(), clean[name].finished()) for name, x in values.items()}


class _Values:
    """Values [..., B, T'] by position, or their mean over the positions, gathered part by part in fp64."""

    def __init__(self, trace: FrozenTrace, how: Measurement, shape: tuple[int, ...]) -> None:
        self.how, self.dtype = how, trace.weights.compute_dtype
        places = (len(trace.tokens), how.asked.width) if how.per_token else ()
        empty = torch.nan if how.per_token else 0.0
        self.total = torch.full((*shape, *places), empty, dtype=torch.float64, device=trace.tokens.device)

    def put(self, where: Any, sequences: slice, asked: Asked, values: Tensor) -> None:
        """Store the values [..., N] of a part's positions, or add their share of the mean."""
        if self.how.per_token:
            self.total[(where, sequences) if isinstance(where, Tensor) else sequences] = asked.placed(values)
        else:
            self.total[where] += values.mean(-1) * (asked.count / self.how.asked.count)

    def finished(self) -> Tensor:
        """In the computing dtype."""
        return self.total.to(self.dtype)


def _changed_rows(intervention: Intervention, part: _Part) -> Iterator[tuple[range, _ChangedRows]]:
    """Experiments that are worked on together, with their rows."""
    count = len(intervention.places)
    basis: LogitBasis | None = None
    columns: list[slice] = []
    if intervention.pairs is not None:
        if count:
            singles = range(1 + max(map(max, intervention.pairs)))
            pairs = torch.tensor(intervention.pairs, device=part.rows.device)
            delta, _, W_O = _delta(intervention, part, singles)
            basis, columns = _basis(part, W_O, delta.shape[-1])
            yield range(count), _ChangedRows(part, delta, basis, columns, pairs=pairs)
        return
    for some in slices(count, _experiments_at_once(intervention, part)):
        members = range(count)[some]
        delta, scale, W_O = _delta(intervention, part, members)
        if basis is None or intervention.has_own_heads:
            basis, columns = _basis(part, W_O, delta.shape[-1])
        yield members, _ChangedRows(part, delta, basis, columns, scale)


def _delta(
    intervention: Intervention, part: _Part, members: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The change of the normed rows [P, N, width]; the scale of the logits [P, N] that comes with it, if any; and the
    W_O [1 or P, r, d] that is still to be multiplied in, if any.
    """
    weights, W_O = part.weights, intervention.W_O(part.weights, members)
    removal = part.asked.rows(intervention.removal(part.trace, members))
    if W_O is not None and not part.narrow(intervention):
        removal, W_O = _times(removal, W_O), None
    scale: Tensor | None = None
    bias = torch.full_like(part.scale, -1) if intervention.removes_unembed_bias else None
    if part.measurement.final_norm == "frozen" or weights.norm is None:  # it multiplies by the clean run's scale
        delta = (final_norm_gain(removal, weights) if W_O is None else removal) * -part.scale
    else:
        left = part.final - (removal if W_O is None else _times(removal, W_O))
        anew = norm_scale(left, weights)[..., None]
        if W_O is None:
            delta = final_norm_gain(left, weights) * anew - part.rows
        else:
            # anew * (rows / scale - removal @ basis), with the bias of the logits, which no norm multiplies, put right
            delta, scale = removal * -part.scale, (anew / part.scale)[..., 0]
            bias = None if part.unembedding.bias is None else part.scale / anew - 1
    if bias is not None and part.unembedding.bias is not None:
        delta = torch.cat((delta, bias.expand(*delta.shape[:-1], 1)), -1)
    return delta, scale, W_O


def _times(removal: Tensor, W_O: Tensor) -> Tensor:
    """[P, N, r] times [1 or P, r, d]."""
    product: Tensor = removal @ (W_O[0] if len(W_O) == 1 else W_O)
    return product


def _basis(part: _Part, W_O: Tensor | None, width: int) -> tuple[LogitBasis, list[slice]]:
    """The basis of a change of such a width, and the slices of the vocabulary in which it is made."""
    basis = LogitBasis(part.unembedding, W_O, width)
    columns = part.slices(basis)
    if len(columns) == 1 and part.measurement.from_sums and not part.in_kernel(basis):
        basis.keep(columns[0])
    return basis, columns


def _experiments_at_once(intervention: Intervention, part: _Part) -> int:
    """The number of experiments whose deltas fill a block."""
    weights, narrow = part.weights, part.narrow(intervention)
    width = weights.d_value if narrow and part.measurement.final_norm == "frozen" else weights.d_model
    block = memory.block_bytes(part.rows.device)
    at_once = max(1, block // (len(part.rows) * max(width, 8) * part.rows.element_size()))
    if intervention.has_own_heads and narrow:  # their W_O together at most four times W_U's slice in depth
        at_once = min(at_once, max(1, 4 * weights.d_model // weights.d_value))
    return at_once


def _sequences_at_once(trace: FrozenTrace, interventions: Sequence[Intervention], how: Measurement) -> int:
    """The number of sequences whose removals fill a block, and whose clean logits are held at a time."""
    weights, size = trace.weights, trace.weights.compute_dtype.itemsize
    widths = [
        max(i.extra_floats_per_position, weights.d_value if i.write_heads else weights.d_model) for i in interventions
    ]
    rows = min(memory.block_bytes(weights.device) // (size * max(widths, default=1)), memory.ROWS)
    if not how.low_memory:
        rows = min(rows, memory.clean_logits_bytes(weights.device) // (size * weights.d_vocab_out))
    return max(1, rows // (trace.tokens.shape[1] - 1))
