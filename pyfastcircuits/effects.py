"""From changes of the residual stream to losses, in bounded memory.

Everything that an ablation does to the loss goes through here: low-rank changes of the logits, cut along sequences,
ablations and the vocabulary, and merged. Beyond the clean logits (one part of the sequences at a time; none with
`low_memory`) the scratch is a few blocks of at most `BLOCK` bytes, whatever the number of ablations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastcircuits.ops import Backend, Precision, sweep_statistics
from pyfastcircuits.trace import FrozenTrace
from pyfastcircuits.weights import CircuitWeights

__all__ = ["Change", "Losses", "Options", "change_losses", "stream_losses"]

BLOCK = 12 << 20  # bytes: one block of deltas; a vocabulary slice takes two
CLEAN_LOGITS = 512 << 20  # bytes of clean logits held at a time, at least one sequence's
PART_ROWS = 4096  # positions worked on at a time, at least one sequence's


@dataclass(frozen=True)
class Options:
    """How a sweep runs; none of it changes which ablations are meant.

    `progress` is called with the number of ablations finished since the last call, times the share of the positions
    they cover, so that a whole sweep adds up to the number of ablations.
    """

    kl: bool = False
    per_token: bool = False
    low_memory: bool = False
    precision: Precision = "ieee"
    backend: Backend = "auto"
    progress: Callable[[float], None] | None = None


@dataclass(frozen=True)
class Change:
    """Ablations that take something away from the final residual stream through the same rank-r map.

    Attributes:
        indices: which results these ablations are.
        rank: r.
        removed: (trace of some sequences, positions in `indices`) -> [P, B, T, r], before the final norm's scale.
        basis: columns of the vocabulary -> [r, columns].
    """

    indices: Sequence[int]
    rank: int
    removed: Callable[[FrozenTrace, Sequence[int]], Tensor]
    basis: Callable[[slice], Tensor]


@dataclass(frozen=True)
class Losses:
    """Mean over sequences and predicting positions, or each position's value with `per_token`."""

    loss: Tensor  # [P] or [P, B, T-1], there NaN where the trace's mask leaves nothing to predict
    kl: Tensor | None  # likewise
    baseline: Tensor  # [] or [B, T-1]


def _slices(size: int, width: int) -> Iterator[slice]:
    return (slice(first, min(first + width, size)) for first in range(0, size, width))


def _columns(weights: CircuitWeights, depth: int) -> list[slice]:
    """Slices of the vocabulary: a [depth, columns] block, with a converted slice of W_U, stays within two BLOCKs."""
    converted = weights.d_model if weights.W_U.dtype != weights.compute_dtype else 0
    width = 2 * BLOCK // (weights.compute_dtype.itemsize * max(depth + converted, 1))
    return list(_slices(weights.d_vocab, max(384, width // 384 * 384)))


def unembed_columns(weights: CircuitWeights, columns: slice) -> Tensor:
    """W_U[:, columns] in the computing dtype."""
    return weights.W_U[:, columns].to(weights.compute_dtype)


class _CleanLogits:
    """The clean logits of some rows: held, or made again for each slice of the vocabulary."""

    def __init__(self, rows: Tensor, weights: CircuitWeights, held: bool) -> None:
        self.rows, self.weights = rows, weights
        self.held: Tensor | None = None
        if held:
            self.held = rows.new_empty(len(rows), weights.d_vocab)
            for columns in _columns(weights, 1):
                torch.mm(rows, unembed_columns(weights, columns), out=self.held[:, columns])
                if weights.unembed_bias is not None:
                    self.held[:, columns] += weights.unembed_bias[columns]

    def __call__(self, columns: slice) -> Tensor:
        if self.held is not None:
            return self.held[:, columns]
        logits = self.rows @ unembed_columns(self.weights, columns)
        bias = self.weights.unembed_bias
        return logits if bias is None else logits + bias[columns]


def _merged(
    clean: _CleanLogits,
    delta: Tensor,  # [P, N, r]
    basis: Callable[[slice], Tensor],
    columns: list[slice],
    targets: Tensor,  # [N]
    clean_lse: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and expected change over the whole vocabulary, fp64 [P, N]."""
    group = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    total: tuple[Tensor, Tensor, Tensor] | None = None
    for part in columns:
        statistics = sweep_statistics(
            clean(part),
            delta,
            basis(part)[None],
            (targets - part.start)[:, None],
            group,
            None,
            clean_lse,
            options.precision,
            options.backend,
            clean.weights.logit_cap,
        )
        if total is None:
            total = statistics
        else:
            total = (torch.logaddexp(total[0], statistics[0]), total[1] + statistics[1], total[2] + statistics[2])
    assert total is not None
    return total[0], total[1][..., 0], total[2]


def _always(block: Tensor, columns: slice) -> Tensor:
    return block


def _nothing(rows: Tensor) -> Callable[[slice], Tensor]:
    return lambda columns: rows.new_empty(0, columns.stop - columns.start)


def _predicting(trace: FrozenTrace, stream: Tensor) -> Tensor:
    """[..., B, T, x] -> [..., N, x] of the N positions that predict: not the last, and what the mask leaves."""
    inner = stream[..., :-1, :]
    return inner.flatten(-3, -2) if trace.predicting is None else inner[..., trace.predicting, :]


def _targets(trace: FrozenTrace) -> Tensor:
    """Tokens to predict, [N]."""
    return trace.tokens[:, 1:].flatten() if trace.predicting is None else trace.tokens[:, 1:][trace.predicting]


def _placed(trace: FrozenTrace, values: Tensor) -> Tensor:
    """[..., N] -> [..., B, T-1], NaN where nothing is predicted."""
    if trace.predicting is None:
        whole: Tensor = values.unflatten(-1, (len(trace.tokens), -1))
        return whole
    out = values.new_full((*values.shape[:-1], *trace.predicting.shape), torch.nan)
    out[..., trace.predicting] = values
    return out


def stream_losses(trace: FrozenTrace, streams: Tensor, backend: Backend = "auto") -> Tensor:
    """NLL [K, B, T-1] when each of `streams` [K, B, T, d] is the final residual stream. No [T, V] is stored."""
    weights = trace.weights
    rows = _predicting(trace, trace.normed(streams, weights.n_layers)).flatten(0, 1)
    targets = _targets(trace).repeat(len(streams))
    losses: Tensor = _RowLosses.apply(rows, weights.W_U, weights.whole_unembed_bias(), targets, weights, backend)
    return _placed(trace, losses.view(len(streams), -1))


class _RowLosses(torch.autograd.Function):
    """NLL [N] of rows [N, d] of the normed final stream; backward forms the logits of a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        W_U: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: CircuitWeights,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(rows, W_U, bias, targets)
        ctx.cap = weights.logit_cap
        out = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        for part in _slices(len(rows), PART_ROWS):
            clean = _CleanLogits(rows[part], weights, held=False)
            columns = _columns(weights, len(rows[part]))
            empty = rows.new_empty(1, len(rows[part]), 0)
            options = Options(backend=backend)
            lse, target, _ = _merged(clean, empty, _nothing(rows), columns, targets[part], None, options)
            out[part] = (lse - target)[0].to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, W_U, bias, targets = ctx.saved_tensors
        wide = W_U.to(rows.dtype)
        into_rows, into_W_U = torch.empty_like(rows), torch.zeros_like(wide)
        into_bias = None if bias is None else torch.zeros_like(bias)
        for part in _slices(len(rows), max(1, 4 * BLOCK // (wide.shape[1] * rows.element_size()))):
            logits = rows[part] @ wide
            if bias is not None:
                logits += bias
            capped = logits if ctx.cap is None else ctx.cap * (logits / ctx.cap).tanh()
            changes = capped.softmax(-1)
            changes[torch.arange(len(changes), device=rows.device), targets[part]] -= 1
            changes *= gradient[part, None]
            if ctx.cap is not None:
                changes *= 1 - (capped / ctx.cap).square()
            into_rows[part] = changes @ wide.mT
            into_W_U += rows[part].mT @ changes
            if into_bias is not None:
                into_bias += changes.sum(0)
        return into_rows, into_W_U.to(W_U.dtype), into_bias, None, None, None


@torch.no_grad()
def change_losses(trace: FrozenTrace, changes: Sequence[Change], options: Options) -> Losses:
    """Losses of every ablation of every change, in the order their `indices` give."""
    weights, (sequences, length) = trace.weights, trace.tokens.shape
    count = sum(len(change.indices) for change in changes)
    sizes = (count, sequences, length - 1) if options.per_token else (count,)
    loss = torch.full(sizes, torch.nan if options.per_token else 0.0, dtype=torch.float64, device=weights.device)
    kl = loss.clone() if options.kl else None
    baseline = torch.full((sequences, length - 1), torch.nan, dtype=torch.float64, device=weights.device)
    total = sequences * (length - 1) if trace.predicting is None else int(trace.predicting.sum())

    step = _sequences_at_once(weights, length, max((c.rank for c in changes), default=1), options.low_memory)
    for part in _slices(sequences, step):
        here = trace[part]
        rows, targets = _predicting(here, here.normed(here.final, weights.n_layers)), _targets(here)
        if not len(rows):
            continue
        share = len(rows) / total
        scale = here.scales[-1][..., None]
        clean = _CleanLogits(rows, weights, held=not options.low_memory)
        depth = len(rows) if options.low_memory else 1
        lse, target, _ = _merged(
            clean, rows.new_empty(1, len(rows), 0), _nothing(rows), _columns(weights, depth), targets, None, options
        )
        clean_lse = lse[0] if options.kl else None
        baseline[part] = _placed(here, (lse - target)[0])

        for change in changes:
            columns = _columns(weights, change.rank + (len(rows) if options.low_memory else 0))
            basis = change.basis
            if len(columns) == 1:
                whole = basis(columns[0])
                basis = partial(_always, whole)
            at_once = max(1, BLOCK // (len(rows) * max(change.rank, 8) * rows.element_size()))
            for chunk in _slices(len(change.indices), at_once):
                members = range(len(change.indices))[chunk]
                delta = _predicting(here, change.removed(here, members) * -scale)
                lse, target, moved = _merged(clean, delta, basis, columns, targets, clean_lse, options)
                where = torch.tensor([change.indices[i] for i in members], device=weights.device)
                _put(loss, where, part, here, lse - target, share)
                if kl is not None and clean_lse is not None:
                    _put(kl, where, part, here, lse - clean_lse - moved, share)
                if options.progress is not None:
                    options.progress(len(members) * share)
    dtype = weights.compute_dtype
    clean_loss = baseline if options.per_token else trace.mean(baseline)
    return Losses(loss.to(dtype), None if kl is None else kl.to(dtype), clean_loss.to(dtype))


def _sequences_at_once(weights: CircuitWeights, length: int, rank: int, low_memory: bool) -> int:
    row = weights.compute_dtype.itemsize
    rows = BLOCK // (row * rank)
    rows = min(rows, PART_ROWS)
    if not low_memory:
        rows = min(rows, CLEAN_LOGITS // (row * weights.d_vocab))
    return max(1, rows // (length - 1))


def _put(out: Tensor, where: Tensor, part: slice, trace: FrozenTrace, values: Tensor, share: float) -> None:
    """Store the values [P, N] of a part's positions, or add their mean's share of the whole."""
    if out.dim() == 1:
        out[where] += values.mean(1) * share
    else:
        out[where, part] = _placed(trace, values)
