"""From interventions to metrics, in bounded memory: every experiment measures its logits here.

What an intervention takes out of the final residual stream changes the clean logits by a low-rank term,
which goes through W_U or through W_O @ W_U of a head. Work is cut along sequences, experiments and the vocabulary.
Beyond the clean logits (one part of the sequences at a time; none with `low_memory`) the scratch is a few blocks of
run.memory's size, whatever the number of experiments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.experiments import cuts
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.learning import learned_losses
from pyfastcircuits.experiments.metrics import KL, Asked
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import final_norm_gain, norm_stretch
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
        self.rows = asked.rows(trace.read_by_unembedding(trace.final))
        self.tokens = asked.tokens()
        self.clean = CleanLogits(self.rows, unembedding, held=not measurement.low_memory)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.clean.sums(self.tokens, self.measurement.backend)

    @property
    def clean_lse(self) -> Tensor:
        """The logsumexp of the clean logits, fp64 [N]."""
        return self._sums[0]

    @property
    def token_logits(self) -> tuple[Tensor, ...]:
        """See CleanRows."""
        return self._sums[1].unbind(-1)

    @cached_property
    def token_shares(self) -> tuple[Tensor, ...]:
        """See CleanRows."""
        return self.asked.shares().unbind(-1)

    @property
    def nll(self) -> Tensor:
        """See CleanRows."""
        return self.clean_lse - self.token_logits[0]

    @cached_property
    def rank(self) -> Tensor:
        """See CleanRows."""
        return _ChangedRows.unchanged(self).rank[0]

    @property
    def asks_divergence(self) -> bool:
        """Whether the divergence from the clean run is measured."""
        return any(isinstance(metric, KL) for metric in self.measurement.metrics)

    @cached_property
    def starts(self) -> list[Tensor]:
        """The clean logits of the tokens asked about, before a cap, fp64 [N] each."""
        return [self.clean.of_tokens(tokens) for tokens in self.tokens.unbind(-1)]

    def narrow(self, intervention: Intervention) -> bool:
        """Whether making W_O @ W_U is less work than multiplying removals by W_O and then, wide, by W_U."""
        removals = len(intervention.places) * len(self.rows)
        return cuts.narrow(self.weights.d_value, self.weights.d_model, len(intervention.write_heads), removals)

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
    """The rows of some experiments: logits scale * (clean + delta @ basis), of which metrics ask (see ChangedRows)."""

    clean: _Part
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

    @cached_property
    def _sums(self) -> SweepPartial:
        part, how = self.clean, self.clean.measurement
        return changed_partial(
            part.clean, part.clean_lse, self.delta, self.basis, self.columns, part.tokens[:, :1], scale=self.scale,
            pairs=self.pairs, mean=part.asks_divergence, precision=how.precision, backend=how.backend,
        )  # fmt: skip

    @property
    def nll_rise(self) -> Tensor:
        """See ChangedRows."""
        return self._sums.nll

    @property
    def divergence(self) -> Tensor:
        """See ChangedRows."""
        return self._sums.divergence

    @cached_property
    def token_changes(self) -> tuple[Tensor, ...]:
        """See ChangedRows."""
        return tuple(
            self._change_of(*pair) for pair in zip(self.clean.tokens.unbind(-1), self.clean.starts, strict=True)
        )

    def _change_of(self, tokens: Tensor, start: Tensor) -> Tensor:
        """What is added to the logits of tokens [N], whose clean ones before a cap are `start`: [P, N]."""
        cap, change = self.clean.unembedding.cap, self._products(tokens)
        if self.scale is not None:
            change = self.scale * change + (self.scale - 1) * start
        return change if cap is None else cap * (((start + change) / cap).tanh() - (start / cap).tanh())

    @cached_property
    def rank(self) -> Tensor:
        """See ChangedRows. Scales and caps are increasing, and left out."""
        tokens, how = self.clean.tokens[:, 0], self.clean.measurement
        own = self.clean.starts[0] + self._products(tokens)
        total = torch.zeros_like(own)
        for part in self.columns:
            bases = self.basis(part)
            total += rank_partial(
                self.clean.clean(part), self.delta, bases, tokens - part.start, own,
                group=basis_group(self.delta, bases), precision=how.precision, backend=how.backend,
            )  # fmt: skip
        return self.clean.unembedding.processes.summed(total)

    def _products(self, tokens: Tensor) -> Tensor:
        """The entries of delta @ basis at one token [N] of each row, fp64 [P, N]."""
        return torch.einsum("pnr,prn->pn", self.delta.double(), self.basis(tokens).double())


def measure(
    trace: FrozenTrace,
    interventions: Sequence[Intervention],
    how: Measurement,
    labels: Sequence[Label],
    shape: tuple[int, ...] | None = None,
    **setup: str | int | float,
) -> Result:
    """The result of every experiment of every intervention, labelled in the order of their places.

    Values are means over the positions measured, or with `per_token` each position's, with `per_sequence` each
    sequence's mean. They are [P], or `shape`, for as many labels. The losses of a measurement that learns have
    gradients.
    """
    first, *others = how.metrics
    count, found = len(labels), {}
    if how.learns:
        losses, clean = learned_losses(trace, interventions, how, count)
        found[first.name] = _Found(losses, clean, losses - clean)
        how = replace(how, metrics=tuple(others), progress=None)
    if how.metrics:
        found |= _measured(trace, interventions, how, count)
    values = {name: x.values.unflatten(0, shape or (count,)) for name, x in found.items()}
    extra = {metric.name: values[metric.name] for metric in others}
    rise = found[first.name].rise.unflatten(0, shape or (count,))
    return Result(labels, values[first.name], found[first.name].clean, first.name, extra, setup, first.harm, rise)


class _Found(NamedTuple):
    """A metric's values of all experiments, [P], [P, B] or [P, B, T'], of the clean run, and what lies between."""

    values: Tensor
    clean: Tensor
    rise: Tensor


@torch.no_grad()
def _measured(
    trace: FrozenTrace, interventions: Sequence[Intervention], how: Measurement, count: int
) -> dict[str, _Found]:
    """What is found of `count` experiments, by metric."""
    rises = {metric.name: _Values(trace, how, (count,)) for metric in how.metrics}
    clean = {metric.name: _Values(trace, how, ()) for metric in how.metrics}
    with OneDnnMatmul(trace.weights.device):
        unembedding = Unembedding(trace.weights)
        for sequences in slices(len(trace.tokens), _sequences_at_once(interventions, how, unembedding)):
            asked = how.asked[sequences]
            if not asked.count:
                continue
            part = _Part(trace[sequences], asked, how, unembedding)
            for metric in how.metrics:
                clean[metric.name].put((), sequences, asked, metric.of_clean(part))
            for intervention in interventions:
                for members, rows in _changed_rows(intervention, part):
                    places = torch.tensor([intervention.places[i] for i in members], device=asked.where.device)
                    for metric in how.metrics:
                        rises[metric.name].put(places, sequences, asked, metric.rise(rows))
                    if how.progress is not None:
                        how.progress(len(members) * asked.count / how.asked.count)
    dtype = trace.weights.compute_dtype
    return {
        name: _Found((clean[name].total + x.total).to(dtype), clean[name].total.to(dtype), x.total.to(dtype))
        for name, x in rises.items()
    }


class _Values:
    """Values [..., B, T'] by position, or their means over a sequence's or all positions, gathered in fp64."""

    def __init__(self, trace: FrozenTrace, how: Measurement, shape: tuple[int, ...]) -> None:
        self.how = how
        places = (len(trace.tokens), how.asked.width)[: how.apart + how.per_token]
        empty = torch.nan if how.apart else 0.0
        self.total = torch.full((*shape, *places), empty, dtype=torch.float64, device=trace.tokens.device)

    def put(self, where: Any, sequences: slice, asked: Asked, values: Tensor) -> None:
        """Store the values [..., N] of a part's positions, or add their share of the mean."""
        if self.how.apart:
            here = (where, sequences) if isinstance(where, Tensor) else sequences
            self.total[here] = self.how.placed(asked, values)
        else:
            self.total[where] += values.mean(-1) * (asked.count / self.how.asked.count)


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
    removal = intervention.removal(part.trace, members, part.asked.where)
    if W_O is not None and not part.narrow(intervention):
        removal, W_O = _times(removal, W_O), None
    scale: Tensor | None = None
    bias = torch.full_like(part.scale, -1) if intervention.removes_unembed_bias else None
    if part.measurement.final_norm == "frozen" or weights.norm is None:  # it multiplies by the clean run's scale
        delta = (final_norm_gain(removal, weights) if W_O is None else removal) * -part.scale
    else:
        gone = removal if W_O is None else _times(removal, W_O)
        stretch = norm_stretch(part.final, gone, weights)[..., None]
        if W_O is None:
            more = part.final * (stretch - 1).to(gone.dtype) - gone * stretch.to(gone.dtype)
            delta = final_norm_gain(more, weights) * part.scale
        else:
            # stretch * (rows - scale * removal @ basis); the bias of the logits, which no norm multiplies, is put right
            delta, scale = removal * -part.scale, stretch[..., 0]
            bias = None if part.unembedding.bias is None else (1 / stretch - 1).to(gone.dtype)
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
    row, block = width * part.rows.element_size(), memory.block_bytes(part.rows.device)
    at_once = cuts.experiments_at_once(len(part.rows), row, block)
    if intervention.has_own_heads and narrow:  # their W_O together at most four times W_U's slice in depth
        at_once = min(at_once, max(1, 4 * weights.d_model // weights.d_value))
    return at_once


def _sequences_at_once(interventions: Sequence[Intervention], how: Measurement, unembedding: Unembedding) -> int:
    """The number of sequences whose removals fill a block, and whose clean logits are held at a time."""
    weights, size = unembedding.weights, unembedding.dtype.itemsize
    widths = [
        max(i.extra_floats_per_position, weights.d_value if i.write_heads else weights.d_model) for i in interventions
    ]
    shared = ceil(weights.d_vocab_out / unembedding.processes.size)
    clean = 0 if how.low_memory else size * shared
    bounds = memory.block_bytes(weights.device), memory.clean_logits_bytes(weights.device)
    return cuts.sequences_at_once(how.asked.where.shape[1], size * max(widths, default=1), clean, *bounds)
