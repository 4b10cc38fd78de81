"""The largest entries of a low-rank product that is never formed."""

from typing import NamedTuple

from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Screen, kernel_of, resolve_backend

shapes.register_outputs("factored_topk", shapes.factored_topk_outputs)
register_no_gradient("pyfastcircuits::factored_topk", "factored_topk")


class TopEntries(NamedTuple):
    """Entries of a matrix, best first; equal ones by row, then column."""

    values: Tensor
    rows: Tensor
    columns: Tensor


@public
def factored_topk(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    k: int,
    *,
    largest: bool = True,
    per_row: bool = False,
    shift: Tensor | None = None,  # [N]
    screen: Screen = "auto",
    backend: Backend = "auto",
) -> TopEntries:
    """The k largest (or smallest) entries of A @ B, or of each of its rows; no row of the product is stored.

    Exact: the same entries as of the materialised product, in the inputs' own arithmetic (float32 for bfloat16
    inputs); of equal entries those of the lowest row, then the lowest column. Deterministic. Not differentiable.

    Memory on the CPU, beyond factors and results: a packed copy of B (half as much again with a screen; at most 32 MiB,
    or 768 columns, at a time), 32 bytes for each of the k entries, and less than 2 MiB a thread; with `per_row`, 32 k
    bytes for each row that a thread works on, at most 16 MiB a thread.

    Args:
        A: [N, r]; float32, float64 or bfloat16, as is B.
        B: [r, M].
        k: how many, at least 1; at most N M (M with `per_row`) and the backend's limit: 2^24 (2^16 with `per_row`) on
            the CPU, 2^16 (1,024) on a GPU.
        largest: the largest; else the smallest, smallest first.
        per_row: k entries of each row instead of k of all.
        shift: [N], subtracted from the entries of each row, in the product's dtype.
        screen: "bf16" multiplies in bfloat16 first and again in full wherever an entry could be among the k, within
            a bound of the rounding: the result is the same. "none" multiplies in full. "auto" screens float32 factors
            where the machine has bfloat16 products and a whole matrix is searched (on the CPU: for fewer than one
            entry in 4,096).
        backend: see `pyfastcircuits.ops`.

    Returns:
        values in A's dtype (float32 for bfloat16), rows and columns int64; [k] each, [N, k] with `per_row`.

    Raises:
        ValueError: shapes, devices or a k that do not fit, named with both values; NaN or infinite factors.
        TypeError: dtypes that do not fit.
        RuntimeError: a backend or screen that is not there.
    """
    shapes.check_product(A=(A, "N r"), B=(B, "r M"), shift=(shift, "N", float))
    rows, columns = len(A), B.shape[1]
    if per_row and rows == 0:
        raise ValueError(f"A has shape {list(A.shape)}: no rows")
    entries, of = (columns, f"rows of {columns}") if per_row else (rows * columns, f"a {rows} x {columns} matrix")
    if not 1 <= k <= entries:
        raise ValueError(f"k is {k!r}, expected an integer from 1 to {entries} ({of})")
    chosen = resolve_backend(backend, A.device, "factored_topk")
    if chosen == "reference":
        return TopEntries(*reference.factored_topk(A, B, k, largest, per_row, shift))
    most = (shapes.MOST_PER_ROW if per_row else shapes.MOST)[chosen]
    if k > most:
        raise ValueError(f"k is {k}, but backend={chosen!r} finds at most {most} entries" + " a row" * per_row)
    shapes.check_finite(A=A, B=B, shift=shift)
    return TopEntries(*kernel_of("factored_topk", chosen)(A, B, k, largest, per_row, shift, screen))
