"""Inputs of factored_topk and diagonal_ranks whose products fp32 has exactly, with many equal entries; and others."""

import torch
from torch import Tensor

from support.accuracy import assert_as_accurate


def whole_numbers(
    N: int, M: int, r: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """A [N, r], B [r, M] and shift [N] of small integers."""
    generator = torch.Generator().manual_seed(N + 10 * M + 100 * r)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)

    return numbers(N, r), numbers(r, M), numbers(N)


def normal(
    N: int, M: int, r: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of normal numbers."""
    generator = torch.Generator().manual_seed(N + 10 * M + 100 * r)
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in ((N, r), (r, M), (N,)))


def close_calls(N: int, M: int, r: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Entries that bfloat16 cannot tell apart, of rows and columns whose norms span most of fp32's range."""
    A, B, shift = normal(N, M, r, device=device)
    A = A[:1] * (1 + 1e-4 * A)
    A[::3] *= 1e-25
    A[1::3] *= 1e12
    B[:, ::5] *= 1e-20
    B[:, 1::5] = B[:, 1:2]
    return A, B, 1e-3 * shift


Entries = tuple[Tensor, Tensor, Tensor]


def torch_entries(A: Tensor, B: Tensor, shift: Tensor | None) -> Tensor:
    """What a user of torch writes: the whole product, in the inputs' dtype (float32 for bfloat16)."""
    work = torch.promote_types(A.dtype, torch.float32)
    product = A.to(work) @ B.to(work)
    return product if shift is None else product - shift.to(work)[:, None]


def assert_best(ours: Entries, A: Tensor, B: Tensor, largest: bool, per_row: bool, shift: Tensor | None) -> None:
    """Fail unless `ours` are best entries in order, as far as rounding lets anyone tell: values are those of their
    places, no two places are the same, and the n-th value is the n-th best of the product in fp64.
    """
    values, rows, columns = ours
    k = values.shape[-1]
    exact = torch_entries(A.double(), B.double(), shift)
    rounded = torch_entries(A, B, shift)
    found = rounded.to(values.dtype).index_put((rows, columns), values)
    _as_accurate_for_its_size(found, rounded, exact)
    sort = {"dim": -1, "descending": largest}
    best, near = (x if per_row else x.flatten() for x in (exact, rounded))
    best, near = (x.sort(**sort).values[..., :k] for x in (best, near))
    _as_accurate_for_its_size(values, near, best)
    places = (rows * B.shape[1] + columns).flatten()
    assert len(places.unique()) == len(places)
    assert torch.equal(values, values.sort(**sort).values)
    if per_row:
        assert torch.equal(rows, torch.arange(len(A), device=A.device)[:, None].expand(-1, k))


def _as_accurate_for_its_size(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Every row, or the list, scaled to numbers of at most 1: rows that are small have small errors."""
    size = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    assert_as_accurate(ours / size, (theirs / size).to(theirs.dtype), exact / size, tiny=0)
