"""Tables over the vocabulary searched without forming them: largest entries, ranks on the diagonal, copying.

A table is a `FactoredMatrix` [V, V] or [V, V'], such as `bigrams`, `ov_circuit` and `qk_circuit` give. The kernels
stream through its tiles and keep only the answer.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits import ops
from pyfastcircuits.arguments import as_integers, public
from pyfastcircuits.circuits.vocabulary import ov_circuit
from pyfastcircuits.model.factored import FactoredMatrix, computable
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, Screen, TopEntries
from pyfastcircuits.shapes import check_finite, check_range

Indices = Sequence[int] | Tensor
Normalize = Literal["center", "log_softmax"] | None
POSITIONS = 16  # the least that a block of the sweep kernel has on a GPU; the clean logits of each take memory


@public
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
    screen: Screen = "auto",
    backend: Backend = "auto",
) -> TopEntries:
    """The k largest (or smallest) of the entries row_weight * (entry - shift) of a factored matrix, never formed.

    Args:
        matrix: [N, M]. 16-bit factors are computed in float32.
        k: the number of entries.
        largest: whether to find the largest; else the smallest, smallest first.
        rows, columns: only these, distinct; results name them by their place in the whole matrix.
        row_weights: [N], each row's factor, of any sign: 1 if None. Given for all rows, also where `rows` picks some.
        normalize: the shift of each row, over ALL its columns: "center" is the mean (logits are defined up to a
            constant), "log_softmax" the logsumexp (entries become log-probabilities), None no shift.
        screen, backend: of the kernel; see pyfastcircuits.ops.factored_topk.

    Returns:
        values, rows and columns, [k] each, best first; equal ones by row, then column, as given.

    Raises:
        ValueError: k is out of range; rows or columns are empty or repeated; the matrix has leading dimensions;
            row_weights has another shape; factors hold NaN or infinity; normalize, screen or backend is unknown.
        TypeError: rows or columns are not integers.
        IndexError: the matrix has no such row or column.
        RuntimeError: the backend or screen is not there.
    """
    part = _searched(matrix, rows, columns, row_weights, normalize, backend, repeated_rows=False)
    found = ops.factored_topk(part.A, part.B, k, largest=largest, shift=part.shift, screen=screen, backend=backend)
    return part.mapped(found)


@public
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


@public
@torch.no_grad()
def diagonal_ranks(matrix: FactoredMatrix, *, rows: Indices | None = None, backend: Backend = "auto") -> Tensor:
    """How many entries of row i are greater than entry (i, i), [N]: 0 where that is the largest of its row.

    Args:
        matrix: [N, N].
        rows: only these, in this order.
        backend: see pyfastcircuits.ops.

    Raises:
        ValueError: the matrix is not square, or has leading dimensions; rows are empty; factors hold NaN or infinity.
        TypeError, IndexError: as top_entries.
        RuntimeError: the backend is not there.
    """
    part = _searched(matrix, rows, None, None, None, backend, repeated_rows=True)
    if matrix.ldim != matrix.rdim:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected a square one")
    return ops.diagonal_ranks(part.A, part.B, columns=part.rows, backend=backend)


class _Searched(NamedTuple):
    """The factors whose product is searched, and the places of its rows and columns in the whole matrix."""

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
    if not matrix.dtype.is_floating_point:
        raise TypeError(f"matrix has dtype {matrix.dtype}, expected floating point")
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
    """The logsumexp of each row of A @ B, fp64 [N], by the sweep kernel: rows are ablations from logits of zero."""
    rows = torch.nn.functional.pad(A, (0, 0, 0, -len(A) % POSITIONS)).view(-1, POSITIONS, A.shape[1])
    base = A.new_zeros(POSITIONS, B.shape[1])
    group = torch.zeros(len(rows), dtype=torch.long, device=A.device)
    return ops.logits_lse(base, rows, B[None], group=group, backend=backend).flatten()[: len(A)]


def checked_indices(
    name: str, indices: Indices | None, end: int, device: torch.device, *, repeated: bool = False
) -> Tensor | None:
    """Indices below `end` as int64 on `device`.

    Raises:
        ValueError: there is no index, or one comes twice without `repeated`.
        TypeError: the indices are not integers.
        IndexError: an index is outside [0, end).
    """
    if indices is None:
        return None
    index = as_integers(name, indices, device)
    if index.dim() != 1 or not len(index):
        raise ValueError(f"{name} has shape {list(index.shape)}, expected at least one index")
    check_range(name, index, end)
    if not repeated:
        values, counts = index.unique(return_counts=True)
        if len(values) < len(index):
            raise ValueError(f"{name} holds {int(values[counts.argmax()])} {int(counts.max())} times")
    return index.long()


class CopyingAccuracy(NamedTuple):
    """The share of tokens that a head raises when it attends to them, [L, H], or [N] for N heads."""

    top1: Tensor  # the token's own logit is the largest of its row of the OV circuit
    top5: Tensor  # it is among the five largest
    positive: Tensor  # it is above zero


@public
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
        ValueError: the model predicts other tokens than it reads, so that nothing is copied; else as ov_circuit.
        IndexError: as ov_circuit.
        RuntimeError: the backend is not there.

    Source: "Copying heads", "Detecting copying behavior", Elhage et al. 2021.
    """
    weights.check_one_vocabulary("no head can raise the token it attends to")
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
