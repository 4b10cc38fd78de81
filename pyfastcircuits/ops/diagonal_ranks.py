"""Where one entry of each row stands among the others, without the rows."""

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, check_range, resolve_backend
from pyfastcircuits.ops.factored_topk import check_finite, check_product


def diagonal_ranks(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    *,
    columns: Tensor | None = None,  # [N]
    backend: Backend = "auto",
) -> Tensor:
    """How many entries of row i of A @ B are greater than its entry (i, i): 0 where the diagonal is the largest.

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
    check_product(A, B)
    if columns is None:
        if len(A) != B.shape[1]:
            raise ValueError(f"A has shape {list(A.shape)} and B {list(B.shape)}: not square, so say which `columns`")
        columns = torch.arange(len(A), device=A.device)
    if columns.shape != A.shape[:1]:
        raise ValueError(f"columns has shape {list(columns.shape)}, expected {[len(A)]}")
    if columns.is_floating_point() or columns.dtype == torch.bool:
        raise TypeError(f"columns has dtype {columns.dtype}, expected integers")
    if columns.device != A.device:
        raise ValueError(f"columns is on {columns.device}, but A is on {A.device}")
    chosen = resolve_backend(backend, A.device)
    check_finite(A=A, B=B)
    if not torch.compiler.is_compiling():
        check_range("columns", columns, B.shape[1])
    columns = columns.long()
    if chosen == "reference":
        return reference.diagonal_ranks(A, B, columns)
    if chosen == "triton":
        from pyfastcircuits.kernels.diagonal_ranks import diagonal_ranks_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.diagonal_ranks
    return kernel(A, B, columns)  # type: ignore[no-any-return]


@torch.library.register_fake("pyfastcircuits::diagonal_ranks")  # type: ignore[untyped-decorator]
def diagonal_ranks_fake(A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
    """Shape alone, for torch.compile."""
    return A.new_empty(len(A), dtype=torch.long)
