"""The rank of one entry of each row of a low-rank product among the others of the row; no row is formed."""

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, kernel_of, resolve_backend
from pyfastcircuits.shapes import check_finite, check_product, diagonal_ranks_outputs, in_range, register_outputs

register_outputs("diagonal_ranks", diagonal_ranks_outputs)


@public
def diagonal_ranks(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    *,
    columns: Tensor | None = None,  # [N]
    backend: Backend = "auto",
) -> Tensor:
    """The number of entries of row i of A @ B greater than its entry (i, i): 0 where the diagonal is the largest.

    Exact in the inputs' own arithmetic (float32 for bfloat16 inputs): the diagonal entry is made as all others are, so
    that equal entries never count. No row of the product is stored.

    Args:
        A: [N, r]; float32, float64 or bfloat16, as is B.
        B: [r, M]; M = N unless `columns` is given.
        columns: [N] integers below M: the entry of each row to compare with, instead of the diagonal one.
        backend: see `pyfastcircuits.ops`.

    Returns:
        [N] int64.

    Raises:
        ValueError: shapes or devices that do not fit, named with both values; NaN or infinite factors.
        TypeError: dtypes that do not fit.
        IndexError: a column outside [0, M).
        RuntimeError: a backend that is not there.
    """
    check_product(A=(A, "N r"), B=(B, "r M"), columns=(columns, "N", int))
    if columns is None:
        if len(A) != B.shape[1]:
            raise ValueError(f"A has shape {list(A.shape)} and B {list(B.shape)}: not square, so say which `columns`")
        columns = torch.arange(len(A), device=A.device)
    chosen = resolve_backend(backend, A.device, "diagonal_ranks")
    check_finite(A=A, B=B)
    columns = in_range("columns", columns, B.shape[1]).long()
    if chosen == "reference":
        return reference.diagonal_ranks(A, B, columns)
    ranks: Tensor = kernel_of("diagonal_ranks", chosen)(A, B, columns)
    return ranks
