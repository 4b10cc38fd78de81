"""From changes of the residual stream to losses, in bounded memory.

Everything that an experiment does to the logits goes through here: low-rank changes of the clean ones, cut along
sequences, experiments and the vocabulary, and merged. Beyond the clean logits (one part of the sequences at a time;
none with `low_memory`) the scratch is a few blocks of at most `BLOCK` bytes, whatever the number of experiments.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastcircuits.experiments.metrics import WORSE, Metric, Positions, Scoring, next_tokens, scoring
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, Precision, SweepPartial, joint_partial, rank_partial, sweep_partial
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.forward import norm_scale, toward_logits
from pyfastcircuits.run.trace import FrozenTrace

__all__ = [
    "Change",
    "FinalNorm",
    "Measured",
    "Measuring",
    "Options",
    "measure",
    "options_of",
    "row_losses",
    "stream_losses",
]

BLOCK = 11 << 20  # bytes: one block of deltas; a vocabulary slice takes two
CLEAN_LOGITS = 512 << 20  # bytes of clean logits held at a time, at least one sequence's
PART_ROWS = 4096  # positions worked on at a time, at least one sequence's
FinalNorm = Literal["frozen", "recomputed"]
Columns = slice | Tensor  # of the vocabulary


class Measuring(TypedDict, total=False):
    """What every experiment can be told about its measuring.

    Attributes:
        metric, targets, against, positions, kl: what is measured and where; see `metrics.scoring`.
        per_token: each position's values instead of means.
        low_memory: recompute the clean logits for each slice of the vocabulary, so that nothing of size [T, V] exists.
        precision, backend: of the kernel; see pyfastcircuits.ops.
        progress: called with the number of experiments finished since the last call, times the share of the positions
            they cover, so that a whole sweep adds up to the number of experiments.
    """

    metric: Metric
    targets: Tensor | int | None
    against: Tensor | int | None
    positions: Positions | None
    kl: bool
    per_token: bool
    low_memory: bool
    precision: Precision
    backend: Backend
    progress: Callable[[float], None] | None


@dataclass(frozen=True)
class Options:
    """How a sweep runs; only the scoring and the final norm change what its numbers mean."""

    score: Scoring
    final_norm: FinalNorm = "frozen"
    per_token: bool = False
    low_memory: bool = False
    precision: Precision = "ieee"
    backend: Backend = "auto"
    progress: Callable[[float], None] | None = None


def options_of(
    trace: FrozenTrace,
    final_norm: FinalNorm = "frozen",
    *,
    metric: Metric = "nll",
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    kl: bool = False,
    per_token: bool = False,
    low_memory: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Options:
    """Check the keywords of `Measuring`; errors as `metrics.scoring`.

    Raises:
        ValueError: an unknown final_norm.
    """
    if final_norm not in ("frozen", "recomputed"):
        raise ValueError(f"final_norm is {final_norm!r}, expected 'frozen' or 'recomputed'")
    score = scoring(trace, metric, targets=targets, against=against, positions=positions, kl=kl)
    return Options(score, final_norm, per_token, low_memory, precision, backend, progress)


@dataclass(frozen=True)
class Change:
    """Experiments that take something away from the final residual stream, through W_O of heads or as it is.

    Attributes:
        indices: which results these experiments are.
        removed: (trace of some sequences, which they are, positions in `indices`) -> [P, B, T, r], or [P, B, T, d].
        through: what is removed goes through W_O of this head, or of each experiment's own; empty: it is of size d.
        bias: whether the unembedding bias is taken away too.
        pairs: each experiment takes away two things together, which share few: `removed` is asked for all of these,
            [S, B, T, r], and these are positions among them. See `can_share`.
        scratch: numbers for each position that `removed` needs besides.
    """

    indices: Sequence[int]
    removed: Callable[[FrozenTrace, slice, Sequence[int]], Tensor]
    through: Sequence[tuple[int, int]] = ()
    bias: bool = False
    pairs: Sequence[tuple[int, int]] | None = None
    scratch: int = 0

    @property
    def own(self) -> bool:
        """Whether each experiment has a head of its own."""
        return len(self.through) > 1

    def W_O(self, weights: CircuitWeights, members: Sequence[int]) -> Tensor:
        """Of the heads of some experiments: [P, r, d], or [1, r, d] where it is one for all."""
        heads = [self.through[i] for i in members] if self.own else self.through
        return torch.stack([weights.head("W_O", *head) for head in heads])


@dataclass(frozen=True)
class Measured:
    """By metric: means over the positions measured, or with `per_token` each position's value."""

    values: dict[Metric, Tensor]  # [P] or [P, B, T'], there NaN where nothing is measured
    baselines: dict[Metric, Tensor]  # [] or [B, T']

    def result(self, what: Sequence[Label], shape: Sequence[int], score: Scoring, **setup: str) -> Result:
        """With [P] as `shape`."""
        first, *others = score.names
        values = {name: x.view(*shape, *x.shape[1:]) for name, x in self.values.items()}
        also: dict[str, Tensor] = {name: values[name] for name in others}
        return Result(what, values[first], self.baselines[first], first, also, setup, WORSE[first])


def _slices(size: int, width: int) -> Iterator[slice]:
    return (slice(first, min(first + width, size)) for first in range(0, size, width))


def _columns(weights: CircuitWeights, depth: int, multiplied: bool) -> list[slice]:
    """Slices of the vocabulary: a [depth, columns] block stays within two BLOCKs, and with it the copies of W_U's slice
    that a product with it makes, see products, and converting it.
    """
    copies = 2 * multiplied + (weights.W_U.dtype != weights.compute_dtype)
    width = 2 * BLOCK // (weights.compute_dtype.itemsize * max(depth + copies * weights.d_model, 1))
    return list(_slices(weights.d_vocab, max(384, width // 384 * 384)))


def unembed_columns(weights: CircuitWeights, columns: Columns) -> Tensor:
    """W_U[:, columns] in the computing dtype."""
    return weights.W_U[:, columns].to(weights.compute_dtype)


class _CleanLogits:
    """The clean logits of some rows: held, or made again for each slice of the vocabulary."""

    def __init__(self, rows: Tensor, weights: CircuitWeights, held: bool) -> None:
        self.rows, self.weights = rows, weights
        self.held: Tensor | None = None
        if held and weights.W_U.dtype == weights.compute_dtype:
            self.held = rows @ weights.W_U
        elif held:
            self.held = rows.new_empty(len(rows), weights.d_vocab)
            for columns in _columns(weights, 1, multiplied=True):
                self.held[:, columns] = rows @ unembed_columns(weights, columns)
        if self.held is not None and weights.unembed_bias is not None:
            self.held += weights.unembed_bias

    def __call__(self, columns: slice) -> Tensor:
        if self.held is not None:
            return self.held[:, columns]
        logits = self.rows @ unembed_columns(self.weights, columns)
        bias = self.weights.unembed_bias
        return logits if bias is None else logits + bias[columns]

    def of(self, tokens: Tensor) -> Tensor:
        """The logits of one token [N] of each row, fp64 [N]."""
        columns = unembed_columns(self.weights, tokens).double()
        bias = self.weights.unembed_bias
        logits = torch.einsum("nd,dn->n", self.rows.double(), columns)
        return logits if bias is None else logits + bias[tokens].double()


def can_share(options: Options, weights: CircuitWeights) -> bool:
    """Whether experiments can be `pairs` of a Change: what they take away must add up to what they measure."""
    return {"nll", "kl", "probability"}.issuperset(options.score.names) and (
        options.final_norm == "frozen" or weights.norm is None
    )


class _Basis:
    """What changes of the logits go through: W_U, or W_O [1 or P, r, d] of heads times it; nothing where width is 0.

    Where `fused`, the kernel multiplies W_O and W_U, a stripe of the vocabulary at a time.
    """

    def __init__(self, weights: CircuitWeights, W_O: Tensor | None, width: int, fused: bool = False) -> None:
        self.weights, self.width = weights, width
        self.outer = None if W_O is None else toward_logits(W_O, weights)
        self.rank = min(width, weights.d_model if W_O is None else W_O.shape[1])
        self.fused = fused and W_O is not None and width == self.rank
        self.depth = 0 if self.fused else width * (1 if W_O is None else len(W_O))
        self.kept: Tensor | None = None

    def __call__(self, columns: Columns) -> Tensor:
        """[1 or P, width, columns]; the unembedding bias is the last row where width is more than the rank."""
        if self.kept is not None:
            return self.kept
        block = unembed_columns(self.weights, columns)
        block = block[None, : self.rank] if self.outer is None else _through(self.outer, block)
        bias = self.weights.unembed_bias
        if self.width > self.rank and bias is not None:
            block = torch.cat((block, bias[columns].expand(len(block), 1, -1)), 1)
        return block

    def factors(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Basis and outer of `sweep_partial`."""
        return (unembed_columns(self.weights, columns)[None], self.outer) if self.fused else (self(columns), None)


def _through(W_O: Tensor, block: Tensor) -> Tensor:
    """[P, r, d] times [d, columns], as one product."""
    products: Tensor = (W_O.flatten(0, 1) @ block).unflatten(0, W_O.shape[:2])
    return products


def _times(removed: Tensor, W_O: Tensor) -> Tensor:
    """[P, N, r] times [1 or P, r, d]."""
    product: Tensor = removed @ (W_O[0] if len(W_O) == 1 else W_O)
    return product


def _groups(delta: Tensor, basis: Tensor) -> Tensor:
    """Which basis each experiment goes through: the one there is, or its own."""
    return torch.arange(len(delta), device=delta.device) % len(basis)


def _merged(
    clean: _CleanLogits,
    delta: Tensor,  # [P, N, r]
    basis: _Basis,
    columns: list[slice],
    targets: Tensor,  # [N]
    ratio: Tensor | None,  # [P, N]
    clean_lse: Tensor | None,
    precision: Precision,
    backend: Backend,
    pairs: Tensor | None = None,  # [P, 2] where delta is [S, N, r]
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and expected change over the whole vocabulary, fp64 [P, N]."""
    cap = clean.weights.logit_cap
    total: SweepPartial | None = None
    for part in columns:
        base, (through, outer), tokens = clean(part), basis.factors(part), (targets - part.start)[:, None]
        group = _groups(delta, through if outer is None else outer)
        if pairs is None:
            partial = sweep_partial(
                base, delta, through, tokens, group=group, scale=ratio, clean_lse=clean_lse, cap=cap, outer=outer,
                precision=precision, backend=backend,
            )  # fmt: skip
        else:
            partial = joint_partial(
                base, delta, through, tokens, pairs, group=group, clean_lse=clean_lse, cap=cap,
                precision=precision, backend=backend,
            )  # fmt: skip
        total = partial if total is None else total.merged(partial)
    assert total is not None
    return total.lse, total.picked[..., 0], total.change


class _Part:
    """Some of the sequences: their clean logits, and what changes of them measure."""

    def __init__(self, trace: FrozenTrace, sequences: slice, options: Options) -> None:
        self.trace, self.sequences, self.options, self.weights = trace[sequences], sequences, options, trace.weights
        self.score = score = options.score[sequences]
        trace = self.trace
        self.final, self.scale = score.rows(trace.final), score.rows(trace.scales[-1][..., None])
        self.rows = toward_logits(self.final, self.weights) * self.scale
        self.tokens = score.tokens()
        self.clean = _CleanLogits(self.rows, self.weights, held=not options.low_memory)
        self.depth = len(self.rows) if options.low_memory else 0
        self.clean_lse: Tensor | None = None
        nothing, none = self.rows.new_empty(1, len(self.rows), 0), _Basis(self.weights, None, 0)
        columns = _columns(self.weights, self.depth + 1, options.low_memory)
        if "kl" in score.names:
            self.clean_lse = _merged(
                self.clean, nothing, none, columns, self.tokens[:, 0], None, None, options.precision, options.backend
            )[0][0]
        self.baselines = {name: x[0] for name, x in self.measure(nothing, none, columns).items()}

    def narrow(self, change: Change) -> bool:
        """Whether W_O @ W_U is less work than what is removed times W_O, and that times W_U."""
        r, d = self.weights.d_head, self.weights.d_model
        products = len(change.indices) * len(self.rows)
        return bool(change.through) and len(change.through) * r * d <= products * (d - r)

    def delta(self, change: Change, members: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the clean logits change by, through `basis` [P, N, width]; what they are multiplied by then [P, N]; the
        W_O [1 or P, r, d] that the basis has to bring, if any.
        """
        removed = self.score.rows(change.removed(self.trace, self.sequences, members))
        W_O = change.W_O(self.weights, members) if change.through else None
        if W_O is not None and not self.narrow(change):
            removed, W_O = _times(removed, W_O), None
        ratio: Tensor | None = None
        bias = torch.full_like(self.scale, -1) if change.bias else None
        if self.options.final_norm == "frozen" or self.weights.norm is None:
            linear = toward_logits(removed, self.weights) if W_O is None else removed
            delta = linear * -self.scale
        else:
            left = self.final - (removed if W_O is None else _times(removed, W_O))
            scale = norm_scale(left, self.weights)[..., None]
            if W_O is None:
                delta = toward_logits(left, self.weights) * scale - self.rows
            else:
                delta, ratio = removed * -self.scale, (scale / self.scale)[..., 0]
                bias = None if self.weights.unembed_bias is None else self.scale / scale - 1
        if bias is not None and self.weights.unembed_bias is not None:
            delta = torch.cat((delta, bias.expand(*delta.shape[:-1], 1)), -1)
        return delta, ratio, W_O

    def basis(self, change: Change, W_O: Tensor | None, width: int) -> tuple[_Basis, list[slice]]:
        """And the slices of the vocabulary in which it is made."""
        cpu = self.options.backend in ("auto", "cpu") and self.rows.device.type == "cpu"
        fused = cpu and change.own and len(change.through) >= torch.get_num_threads()
        basis = _Basis(self.weights, W_O, width, fused and not {"rank", "top1"} & set(self.score.names))
        multiplied = self.options.low_memory or (change.own and W_O is not None and not basis.fused)
        columns = _columns(self.weights, self.depth + basis.depth, multiplied)
        if len(columns) == 1 and {"nll", "kl", "probability"}.issuperset(self.score.names) and not basis.fused:
            basis.kept = basis(columns[0])
        return basis, columns

    def measure(
        self,
        delta: Tensor,  # [P, N, r]
        basis: _Basis,
        columns: list[slice],
        ratio: Tensor | None = None,  # [P, N]
        pairs: Tensor | None = None,  # [P, 2] where delta is [S, N, r]
    ) -> dict[Metric, Tensor]:
        """Every metric asked for, fp64 [P, N]."""
        out: dict[Metric, Tensor] = {}
        names = self.score.names
        if {"nll", "probability", "kl"} & set(names):
            options, targets = self.options, self.tokens[:, 0]
            lse, target, moved = _merged(
                self.clean,
                delta,
                basis,
                columns,
                targets,
                ratio,
                self.clean_lse,
                options.precision,
                options.backend,
                pairs,
            )
            out["nll"] = lse - target
            out["probability"] = (target - lse).exp()
            if self.clean_lse is not None:
                out["kl"] = lse - self.clean_lse - moved
        if "logit_difference" in names:
            first, second = (self._picked(delta, basis, tokens, ratio) for tokens in self.tokens.unbind(-1))
            out["logit_difference"] = first - second
        if {"rank", "top1"} & set(names):
            out["rank"] = self._ranks(delta, basis, columns)
            out["top1"] = (out["rank"] == 0).double()
        return {name: out[name] for name in names}

    def _picked(self, delta: Tensor, basis: _Basis, tokens: Tensor, ratio: Tensor | None) -> Tensor:
        """The logits of one token of each row, fp64 [P, N]."""
        logits = self.clean.of(tokens) + torch.einsum("pnr,prn->pn", delta.double(), basis(tokens).double())
        logits = logits if ratio is None else logits * ratio
        cap = self.weights.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def _ranks(self, delta: Tensor, basis: _Basis, columns: list[slice]) -> Tensor:
        """How many logits are larger than the target's, fp64 [P, N]: scales and caps are monotonic, and left out."""
        tokens = self.tokens[:, 0]
        own = self.clean.of(tokens) + torch.einsum("pnr,prn->pn", delta.double(), basis(tokens).double())
        options, total = self.options, torch.zeros_like(own)
        for part in columns:
            through = basis(part)
            total += rank_partial(
                self.clean(part), delta, through, tokens - part.start, own, group=_groups(delta, through),
                precision=options.precision, backend=options.backend,
            )  # fmt: skip
        return total


@torch.no_grad()
def measure(trace: FrozenTrace, changes: Sequence[Change], options: Options) -> Measured:
    """Every experiment of every change, in the order their `indices` give."""
    with OneDnnMatmul():
        return _measure(trace, changes, options)


def _measure(trace: FrozenTrace, changes: Sequence[Change], options: Options) -> Measured:
    weights, (sequences, length) = trace.weights, trace.tokens.shape
    score, device = options.score, weights.device
    count = sum(len(change.indices) for change in changes)
    places = (sequences, score.width)
    shape = (count, *places) if options.per_token else (count,)
    values: dict[Metric, Tensor] = {}
    clean: dict[Metric, Tensor] = {}
    for name in score.names:
        values[name] = torch.full(shape, torch.nan if options.per_token else 0.0, dtype=torch.float64, device=device)
        clean[name] = torch.full(places if options.per_token else (), 0.0, dtype=torch.float64, device=device)
    total = score.count

    rank = max((max(c.scratch, weights.d_head if c.through else weights.d_model) for c in changes), default=1)
    for part in _slices(sequences, _sequences_at_once(weights, length, rank, options.low_memory)):
        scored = score[part]
        share = scored.count / total
        if not share:
            for name in score.names if options.per_token else ():
                clean[name][part] = torch.nan
            continue
        work = _Part(trace, part, options)
        for name, x in work.baselines.items():
            _put(clean[name], (), part, scored, x, share)
        for change in changes:
            basis: _Basis | None = None
            for members, formed, pairs in _chunks(change, work):
                delta, ratio, W_O = work.delta(change, formed)
                if basis is None or change.own:
                    basis, columns = work.basis(change, W_O, delta.shape[-1])
                where = torch.tensor([change.indices[i] for i in members], device=device)
                for name, x in work.measure(delta, basis, columns, ratio, pairs).items():
                    _put(values[name], where, part, scored, x, share)
                if options.progress is not None:
                    options.progress(len(members) * share)
    dtype = weights.compute_dtype
    return Measured({n: x.to(dtype) for n, x in values.items()}, {n: x.to(dtype) for n, x in clean.items()})


def _chunks(change: Change, work: _Part) -> Iterator[tuple[range, range, Tensor | None]]:
    """Experiments worked on at a time; what `removed` is asked for; the pairs of it that they are."""
    count, weights = len(change.indices), work.weights
    if change.pairs is not None:
        if count:
            yield (
                range(count),
                range(1 + max(map(max, change.pairs))),
                torch.tensor(change.pairs, device=weights.device),
            )
        return
    wide = weights.d_head if work.narrow(change) and work.options.final_norm == "frozen" else weights.d_model
    at_once = max(1, BLOCK // (len(work.rows) * max(wide, 8) * work.rows.element_size()))
    if change.own and work.narrow(change):  # deep enough to hide what it costs to copy a slice of W_U
        at_once = min(at_once, max(1, 4 * weights.d_model // weights.d_head))
    for chunk in _slices(count, at_once):
        yield range(count)[chunk], range(count)[chunk], None


def _sequences_at_once(weights: CircuitWeights, length: int, rank: int, low_memory: bool) -> int:
    row = weights.compute_dtype.itemsize
    rows = BLOCK // (row * rank)
    rows = min(rows, PART_ROWS)
    if not low_memory:
        rows = min(rows, CLEAN_LOGITS // (row * weights.d_vocab))
    return max(1, rows // (length - 1))


def _put(out: Tensor, where: Any, part: slice, score: Scoring, values: Tensor, share: float) -> None:
    """Store the values [..., N] of a part's positions, or add their mean's share of the whole."""
    if out.dim() > 1:
        out[(where, part) if isinstance(where, Tensor) else part] = score.placed(values)
    else:
        out[where] += values.mean(-1) * share


def stream_losses(trace: FrozenTrace, streams: Tensor, backend: Backend = "auto") -> Tensor:
    """NLL [K, B, T-1] when each of `streams` [K, B, T, d] is the final residual stream. No [T, V] is stored."""
    weights = trace.weights
    predicted = next_tokens(trace)
    rows = predicted.rows(trace.normed(streams, weights.n_layers)).flatten(0, 1)
    targets = predicted.tokens()[:, 0].repeat(len(streams))
    return predicted.placed(row_losses(rows, targets, weights, backend).view(len(streams), -1))


def row_losses(rows: Tensor, targets: Tensor, weights: CircuitWeights, backend: Backend = "auto") -> Tensor:
    """NLL [N] of targets [N] for rows [N, d] of the normed final stream; differentiable."""
    losses: Tensor = _RowLosses.apply(rows, weights.W_U, weights.whole_unembed_bias(), targets, weights, backend)
    return losses


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
            columns = _columns(weights, len(rows[part]), multiplied=True)
            empty = rows.new_empty(1, len(rows[part]), 0)
            nothing = _Basis(weights, None, 0)
            lse, target, _ = _merged(clean, empty, nothing, columns, targets[part], None, None, "ieee", backend)
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
