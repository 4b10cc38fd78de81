"""The largest entries of a low-rank product that is never formed."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import DTYPES, Backend, resolve_backend

SCREENS = ("auto", "none", "bf16")
MOST = {"cpu": 1 << 24, "triton": 1 << 16, "cuda": 1 << 16}  # k of a whole matrix
MOST_PER_ROW = {"cpu": 1 << 16, "triton": 1024, "cuda": 1024}


class TopEntries(NamedTuple):
    """Entries of a matrix, best first; equal ones by row, then column."""

    values: Tensor
    rows: Tensor
    columns: Tensor


def factored_topk(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    k: int,
    *,
    largest: bool = True,
    per_row: bool = False,
    shift: Tensor | None = None,  # [N]
    screen: str = "auto",
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
    _check(A, B, k, per_row, shift)
    chosen = resolve_backend(backend, A.device)
    if screen not in SCREENS:
        raise ValueError(f"screen is {screen!r}, expected one of {', '.join(SCREENS)}")
    if chosen == "reference":
        return TopEntries(*reference.factored_topk(A, B, k, largest, per_row, shift))
    most = (MOST_PER_ROW if per_row else MOST)[chosen]
    if k > most:
        raise ValueError(f"k is {k}, but backend={chosen!r} finds at most {most} entries" + " a row" * per_row)
    check_finite(A=A, B=B, shift=shift)
    if chosen == "triton":
        from pyfastcircuits.kernels.factored_topk import factored_topk_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.factored_topk
    return TopEntries(*kernel(A, B, k, largest, per_row, shift, screen))


@torch.library.register_fake("pyfastcircuits::factored_topk")  # type: ignore[untyped-decorator]
def factored_topk_fake(
    A: Tensor, B: Tensor, k: int, largest: bool, per_row: bool, shift: Tensor | None, screen: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    shape = (len(A), k) if per_row else (k,)
    values = A.new_empty(shape, dtype=torch.float32 if A.dtype == torch.bfloat16 else A.dtype)
    return values, values.new_empty(shape, dtype=torch.long), values.new_empty(shape, dtype=torch.long)


def check_product(A: Tensor, B: Tensor) -> None:
    """Raise unless A @ B is a product of two matrices that the kernels take."""
    for name, tensor, shape in (("A", A, "[N, r]"), ("B", B, "[r, M]")):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if A.shape[1] != B.shape[0]:
        raise ValueError(f"A has shape {list(A.shape)} and B {list(B.shape)}: their inner dimensions r differ")
    if A.dtype not in DTYPES:
        raise TypeError(f"A has dtype {A.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if B.dtype != A.dtype:
        raise TypeError(f"B has dtype {B.dtype}, but A has {A.dtype}")
    if B.device != A.device:
        raise ValueError(f"B is on {B.device}, but A is on {A.device}")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise ValueError, with the first offender and its place, unless all entries are finite."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            place = (~tensor.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{place} is {tensor[tuple(place)].item()}, expected finite values")


def _check(A: Tensor, B: Tensor, k: int, per_row: bool, shift: Tensor | None) -> None:
    check_product(A, B)
    rows, columns = len(A), B.shape[1]
    if per_row and rows == 0:
        raise ValueError(f"A has shape {list(A.shape)}: no rows")
    most, of = (columns, f"rows of {columns}") if per_row else (rows * columns, f"a {rows} x {columns} matrix")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ValueError(f"k is {k!r}, expected an integer from 1 to {most} ({of})")
    if shift is None:
        return
    if shift.shape != A.shape[:1]:
        raise ValueError(f"shift has shape {list(shift.shape)}, expected {[rows]}")
    if not shift.is_floating_point():
        raise TypeError(f"shift has dtype {shift.dtype}, expected floating point")
    if shift.device != A.device:
        raise ValueError(f"shift is on {shift.device}, but A is on {A.device}")
