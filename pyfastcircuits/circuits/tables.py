"""Vocabulary-sized tables read without forming them: largest entries, ranks, skip-trigrams, copying.

A circuit is a `FactoredMatrix` over the vocabulary [V, V] (`bigrams`, `ov_circuit`, `qk_circuit`). Weights are read as
they are: with a layernorm, `center` them first. `normed=True` there sends each embedding through the norm.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits import ops
from pyfastcircuits.circuits.composition import Head, checked_head
from pyfastcircuits.circuits.positions import qk_tables
from pyfastcircuits.circuits.vocabulary import ov_circuit
from pyfastcircuits.model.factored import FactoredMatrix, computable
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, TopEntries
from pyfastcircuits.shapes import check_finite, check_range

__all__ = [
    "CopyingAccuracy",
    "SkipTrigram",
    "SkipTrigrams",
    "copying_accuracy",
    "diagonal_ranks",
    "skip_trigrams",
    "top_entries",
    "top_per_row",
]

Indices = Sequence[int] | Tensor
Normalize = Literal["center", "log_softmax"] | None
NORMALIZE = (None, "center", "log_softmax")
POSITIONS = 16  # a block of the sweep on a GPU has as many at least; their clean logits take memory


@torch.no_grad()
def top_entries(
    matrix: FactoredMatrix,
    k: int,
    largest: bool = True,
    *,
    rows: Indices | None = None,
    columns: Indices | None = None,
    row_weights: Tensor | None = None,
    normalize: Normalize = None,
    screen: str = "auto",
    backend: Backend = "auto",
) -> TopEntries:
    """The k largest (or smallest) of the entries row_weight * (entry - shift) of a factored matrix, never formed.

    Args:
        matrix: [N, M]. 16-bit factors are computed in float32.
        k: how many.
        largest: the largest; else the smallest, smallest first.
        rows, columns: only these, distinct; results name them by their place in the whole matrix.
        row_weights: [N], each row's factor, of any sign: 1 if None. Given for all rows, also where `rows` picks some.
        normalize: what shift is, of each row over ALL its columns: "center" its mean (logits are defined up to a
            constant), "log_softmax" its logsumexp (entries become log-probabilities); zero if None.
        screen, backend: of the kernel; see pyfastcircuits.ops.factored_topk.

    Returns:
        values, rows and columns, [k] each, best first; equal ones by row, then column, as given.

    Raises:
        ValueError: a k that is out of range; empty or repeated rows or columns; leading dimensions; row_weights of
            another shape; NaN or infinite factors; an unknown normalize, screen or backend.
        TypeError: rows or columns that are no integers.
        IndexError: a row or column that is not there.
        RuntimeError: a backend or screen that is not there.
    """
    part = _searched(matrix, rows, columns, row_weights, normalize, backend, repeated_rows=False)
    found = ops.factored_topk(part.A, part.B, k, largest=largest, shift=part.shift, screen=screen, backend=backend)
    return part.mapped(found)


@torch.no_grad()
def top_per_row(
    matrix: FactoredMatrix,
    k: int,
    rows: Indices | None = None,
    *,
    largest: bool = True,
    columns: Indices | None = None,
    row_weights: Tensor | None = None,
    normalize: Normalize = None,
    backend: Backend = "auto",
) -> TopEntries:
    """The k largest (or smallest) entries of each row: each token's strongest continuations.

    Args:
        matrix, k, largest, columns, row_weights, normalize, backend: as in top_entries.
        rows: only these, in this order, R of them; a row may come twice. All if None.

    Returns:
        values, rows and columns, [R, k] each, best first.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as top_entries.
    """
    part = _searched(matrix, rows, columns, row_weights, normalize, backend, repeated_rows=True)
    found = ops.factored_topk(
        part.A, part.B, k, largest=largest, per_row=True, shift=part.shift, screen="none", backend=backend
    )
    return part.mapped(found)


@torch.no_grad()
def diagonal_ranks(matrix: FactoredMatrix, *, rows: Indices | None = None, backend: Backend = "auto") -> Tensor:
    """How many entries of row i are greater than entry (i, i): 0 where a token's own is its largest, [N].

    Args:
        matrix: [N, N].
        rows: only these, in this order.
        backend: see pyfastcircuits.ops.

    Raises:
        ValueError: a matrix that is not square, or has leading dimensions; empty rows; NaN or infinite factors.
        TypeError, IndexError: as top_entries.
        RuntimeError: a backend that is not there.
    """
    part = _searched(matrix, rows, None, None, None, backend, repeated_rows=True)
    if matrix.ldim != matrix.rdim:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected a square one")
    return ops.diagonal_ranks(part.A, part.B, columns=part.rows, backend=backend)


class _Searched(NamedTuple):
    """Factors whose product is searched, and where its rows and columns stand in the whole matrix."""

    A: Tensor
    B: Tensor
    shift: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    def mapped(self, found: TopEntries) -> TopEntries:
        rows = found.rows if self.rows is None else self.rows[found.rows]
        return TopEntries(found.values, rows, found.columns if self.columns is None else self.columns[found.columns])


def _searched(
    matrix: FactoredMatrix,
    rows: Indices | None,
    columns: Indices | None,
    row_weights: Tensor | None,
    normalize: Normalize,
    backend: Backend,
    *,
    repeated_rows: bool,
) -> _Searched:
    if matrix.has_leading_dims:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected [N, M]: index its leading dimensions")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}, expected None, 'center' or 'log_softmax'")
    A, B = (computable(factor.to(matrix.dtype)) for factor in matrix.pair)
    row_index = checked_indices("rows", rows, matrix.ldim, A.device, repeated=repeated_rows)
    column_index = checked_indices("columns", columns, matrix.rdim, A.device)
    if row_weights is not None and row_weights.shape != (matrix.ldim,):
        raise ValueError(f"row_weights has shape {list(row_weights.shape)}, expected {[matrix.ldim]}")
    check_finite(A=A, B=B, row_weights=row_weights)
    if row_index is not None:
        A = A[row_index]
    shift = None
    if normalize == "center":
        shift = A @ B.mean(-1, dtype=torch.float64).to(A.dtype)
    elif normalize == "log_softmax":
        shift = row_logsumexp(A, B, backend).to(A.dtype)
    if row_weights is not None:
        weights = row_weights.to(A)[slice(None) if row_index is None else row_index]
        A, shift = A * weights[:, None], None if shift is None else shift * weights
    return _Searched(A, B if column_index is None else B[:, column_index], shift, row_index, column_index)


def row_logsumexp(A: Tensor, B: Tensor, backend: Backend) -> Tensor:
    """Of each row of A @ B, in fp64: as ablations of a few positions whose clean logits are zero."""
    rows = torch.nn.functional.pad(A, (0, 0, 0, -len(A) % POSITIONS)).view(-1, POSITIONS, A.shape[1])
    base = A.new_zeros(POSITIONS, B.shape[1])
    none = torch.zeros(POSITIONS, 0, dtype=torch.long, device=A.device)
    group = torch.zeros(len(rows), dtype=torch.long, device=A.device)
    return ops.sweep_partial(base, rows, B[None], none, group=group, backend=backend).lse.flatten()[: len(A)]


def checked_indices(
    name: str, indices: Indices | None, end: int, device: torch.device, *, repeated: bool = False
) -> Tensor | None:
    """Indices below `end` as int64 on `device`.

    Raises:
        ValueError: none at all, or one twice.
        TypeError: no integers.
        IndexError: one outside [0, end).
    """
    if indices is None:
        return None
    index = torch.as_tensor(indices, device=device)
    if index.dim() != 1 or not len(index):
        raise ValueError(f"{name} has shape {list(index.shape)}, expected at least one index")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {index.dtype}, expected integers")
    check_range(name, index, end)
    if not repeated:
        values, counts = index.unique(return_counts=True)
        if len(values) < len(index):
            raise ValueError(f"{name} holds {int(values[counts.argmax()])} {int(counts.max())} times")
    return index.long()


class SkipTrigram(NamedTuple):
    """A source token seen before, the token now, and the one the head then raises."""

    source: int
    destination: int
    output: int
    attention: float  # how much more the destination attends to the source than to the mean token, in score
    logit: float  # how much more attending to the source raises the output than the mean token, in logits

    @property
    def score(self) -> float:
        """attention * logit."""
        return self.attention * self.logit


@dataclass(frozen=True, eq=False)
class SkipTrigrams:
    """For each of S source tokens, the k destinations that favour it and the k outputs it raises, best first.

    Attributes:
        head: (layer, head).
        sources: [S] tokens.
        destinations: [S, k] tokens; attention: [S, k], how much more each attends to the source than to the mean token,
            as a difference of attention scores.
        outputs: [S, k] tokens; logits: [S, k], how much more each is raised than the mean token is.
        text: shows tokens.
    """

    head: Head
    sources: Tensor
    destinations: Tensor
    attention: Tensor
    outputs: Tensor
    logits: Tensor
    text: Callable[[list[int]], str] | None = None

    def top(self, n: int) -> list[SkipTrigram]:
        """The n triples (source, destination, output) of largest attention * logit, both positive, best first.

        Exact: of one source, none of these can lie outside its n best destinations and n best outputs. Fewer than n
        where no more are positive.

        Raises:
            ValueError: n above k: triples that were not kept might be among them.
        """
        k = self.logits.shape[1]
        if not 0 <= n <= k:
            raise ValueError(f"n is {n}, expected 0 to k = {k}: of each source no more were kept")
        best = self.attention[:, 0].clamp_min(0) * self.logits[:, 0].clamp_min(0)
        kept = best.sort(descending=True, stable=True).indices[:n]
        attention, logits = self.attention[kept, :n, None], self.logits[kept, None, :n]
        scores = torch.where((attention > 0) & (logits > 0), attention * logits, -torch.inf)
        ordered = scores.flatten().sort(descending=True, stable=True)
        found = []
        for place in ordered.indices[:n][ordered.values[:n] > 0].tolist():
            i, j, m = place // n**2, place // n % n, place % n
            s = int(kept[i])
            source, destination, output = (
                int(x) for x in (self.sources[s], self.destinations[s, j], self.outputs[s, m])
            )
            strengths = float(self.attention[s, j]), float(self.logits[s, m])
            found.append(SkipTrigram(source, destination, output, *strengths))
        return found

    def table(self) -> Any:
        """A pyarrow table: a row for each source and rank, with text columns where `text` is given.

        Raises:
            ImportError: pyarrow is missing.
        """
        import pyarrow as pa

        S, k = self.logits.shape
        columns: dict[str, Any] = {
            "layer": pa.array([self.head[0]] * (S * k), pa.int32()),
            "head": pa.array([self.head[1]] * (S * k), pa.int32()),
            "source": self.sources.repeat_interleave(k),
            "rank": torch.arange(k).repeat(S),
            "destination": self.destinations.flatten(),
            "attention": self.attention.flatten(),
            "output": self.outputs.flatten(),
            "logit": self.logits.flatten(),
        }
        for name in ("source", "destination", "output"):
            if self.text is not None:
                columns[f"{name}_text"] = [self.text([token]) for token in columns[name].tolist()]
        return pa.table({name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in columns.items()})

    def __str__(self) -> str:
        """A line for each source: its destinations, its outputs."""
        show = self.text or (lambda ids: str(ids[0]))
        lines = [f"head {self.head[0]}.{self.head[1]}: source | destinations that attend to it | outputs it raises"]
        for s, source in enumerate(self.sources.tolist()):
            cells = [
                ", ".join(f"{show([t])!r} {v:+.2f}" for t, v in zip(tokens[s].tolist(), x[s].tolist(), strict=True))
                for tokens, x in ((self.destinations, self.attention), (self.outputs, self.logits))
            ]
            lines.append(" | ".join((repr(show([source])), *cells)))
        return "\n".join(lines)


@torch.no_grad()
def skip_trigrams(
    weights: CircuitWeights,
    head: Sequence[int],
    source_tokens: Indices | None = None,
    k: int = 10,
    *,
    among: Indices | None = None,
    normed: bool = False,
    offset: int = 0,
    text: Callable[[list[int]], str] | None = None,
    backend: Backend = "auto",
) -> SkipTrigrams:
    """A head's skip-trigrams [source] ... [destination] -> [output], from its QK and OV circuits.

    A destination attends to a source by its attention score less its mean over all sources: what is the same for all
    sources changes no pattern. An output is raised by its logit less the mean over all outputs. Neither mean depends on
    `among`. Positions are left out (`qk_tables` has them); b_Q is in it, b_V is not.

    Args:
        weights: the model.
        head: (layer, head).
        source_tokens: S tokens; all if None.
        k: destinations and outputs of each source, and the most that `.top` finds.
        among: only these tokens as destinations and outputs; all if None.
        normed: each embedding goes through the norm first; see ov_circuit.
        offset: with rotary positions, how far the destination stands behind the source.
        text: shows tokens in the result, e.g. a tokenizer's `decode`.
        backend: see pyfastcircuits.ops.

    Raises:
        ValueError: no such head, k out of range, no tokens, or one twice in `among`; an offset that does not fit.
        IndexError: no such head or token.
        TypeError: tokens that are no integers.
        RuntimeError: a backend that is not there.

    Source: "Skip-Trigram tables", section "One-Layer Attention-Only Transformers", Elhage et al. 2021.
    """
    head = checked_head(weights, head)
    V, device = weights.d_vocab, weights.device
    sources = checked_indices("source_tokens", source_tokens, V, device, repeated=True)
    columns = checked_indices("among", among, V, device)
    scores = qk_tables(weights, head, normed=normed, offset=offset).token_token
    keys = scores.B - scores.B.mean(-1, dtype=torch.float64, keepdim=True).to(scores.dtype)
    seen = top_per_row(FactoredMatrix(keys.mT, scores.A.mT), k, sources, columns=columns, backend=backend)
    raised = top_per_row(
        ov_circuit(weights, head, normed=normed), k, sources, columns=columns, normalize="center", backend=backend
    )
    if sources is None:
        sources = torch.arange(V, device=device)
    return SkipTrigrams(head, sources, seen.columns, seen.values, raised.columns, raised.values, text)


class CopyingAccuracy(NamedTuple):
    """How far heads raise the very token they attend to: shares of the vocabulary, [L, H], or [N] for N heads."""

    top1: Tensor  # its logit is the largest of its row of the OV circuit
    top5: Tensor  # among the five largest
    positive: Tensor  # above zero


@torch.no_grad()
def copying_accuracy(
    weights: CircuitWeights,
    heads: Iterable[Sequence[int]] | None = None,
    *,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> CopyingAccuracy:
    """How often the diagonal of a head's OV circuit is the largest of its row, among its five largest, and positive.

    Args:
        weights: the model.
        heads: N of (layer, head); all, [L, H], if None.
        backend: see pyfastcircuits.ops.
        progress: called with the number of heads finished since the last call.

    Raises:
        ValueError, IndexError: no such head.
        RuntimeError: a backend that is not there.

    Source: "Copying heads", "Detecting copying behavior", Elhage et al. 2021.
    """
    shape: tuple[int, ...] = (weights.n_layers, weights.n_heads)
    wanted: list[Sequence[int]] = [*itertools.product(*map(range, shape))] if heads is None else [*heads]
    if heads is not None:
        shape = (len(wanted),)
    found = torch.empty(len(wanted), 3, dtype=weights.compute_dtype, device=weights.device)
    for i, head in enumerate(wanted):
        circuit = ov_circuit(weights, head)
        ranks = diagonal_ranks(circuit, backend=backend)
        diagonal = (circuit.A * circuit.B.mT).sum(-1)
        found[i] = torch.stack([x.to(found.dtype).mean() for x in (ranks == 0, ranks < 5, diagonal > 0)])
        if progress is not None:
            progress(1)
    return CopyingAccuracy(*(column.view(shape) for column in found.unbind(-1)))
