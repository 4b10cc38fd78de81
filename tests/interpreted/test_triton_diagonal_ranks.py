"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.topk_cases import normal, torch_entries, whole_numbers

from pyfastcircuits import ops
from pyfastcircuits.kernels.diagonal_ranks import diagonal_ranks_triton
from pyfastcircuits.ops import reference

SHAPES = [(70, 200, 5), (1, 333, 20), (150, 1, 3), (131, 259, 70), (3, 5, 0), (1, 1, 1), (0, 4, 2)]


def columns_of(N: int, M: int) -> torch.Tensor:
    return torch.randint(M, (N,), generator=torch.Generator().manual_seed(N))


@pytest.mark.matrix(shape=SHAPES, dtype=[torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_ties(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    A, B, _ = whole_numbers(*shape, dtype)
    columns = columns_of(*shape[:2])
    ours = diagonal_ranks_triton(A, B, columns)
    assert ours.dtype == torch.long
    assert torch.equal(ours, reference.diagonal_ranks(A, B, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_numbers(dtype: torch.dtype) -> None:
    """Between the ranks that rounding allows: numpy does not make all tiles' entries by the same sums, GPUs do."""
    A, B, _ = normal(130, 300, 70, dtype)
    columns = columns_of(130, 300)
    ours = diagonal_ranks_triton(A, B, columns)
    entries = torch_entries(A.double(), B.double(), None)
    bar = entries.gather(1, columns[:, None])
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    assert (ours >= (entries > bar + rounding).sum(1)).all()
    assert (ours <= (entries > bar - rounding).sum(1)).all()


def test_not_contiguous() -> None:
    A, B, _ = whole_numbers(40, 150, 6)
    wide = torch.full((80, 12), torch.nan)
    wide[::2, ::2] = A
    columns = columns_of(40, 150)
    ours = diagonal_ranks_triton(wide[::2, ::2], B.T.contiguous().T, columns.repeat_interleave(2)[::2])
    assert torch.equal(ours, reference.diagonal_ranks(A, B, columns))


def test_a_column_that_is_not_there_gives_minus_one() -> None:
    A, B, _ = whole_numbers(4, 9, 3)
    assert (diagonal_ranks_triton(A, B, torch.tensor([0, 9, -1, 8])) < 0).tolist() == [False, True, True, False]


def test_typed_op() -> None:
    A, B, _ = whole_numbers(40, 40, 5)
    ours = ops.diagonal_ranks(A, B, backend="triton")
    assert torch.equal(ours, ops.diagonal_ranks(A, B, backend="reference"))
    compiled = torch.compile(
        lambda a, b: ops.diagonal_ranks(a, b, backend="triton") * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(A, B), ours * 2)


def test_errors() -> None:
    A, B, _ = whole_numbers(4, 6, 5)
    with pytest.raises(ValueError, match=r"A has shape \[4, 4\] and B \[5, 6\]"):
        diagonal_ranks_triton(A[:, :4], B, torch.arange(4))
    with pytest.raises(TypeError, match=r"B has dtype torch.float64, but A has torch.float32"):
        diagonal_ranks_triton(A, B.double(), torch.arange(4))
    with pytest.raises(ValueError, match=r"columns has shape \[3\], expected \[4\]"):
        diagonal_ranks_triton(A, B, torch.arange(3))
    with pytest.raises(ValueError, match=r"B has shape \[5, 0\]: no columns"):
        diagonal_ranks_triton(A, B[:, :0], torch.arange(4))


def test_opcheck() -> None:
    A, B, _ = whole_numbers(4, 6, 5)
    torch.library.opcheck(diagonal_ranks_triton, (A, B, torch.arange(4)))
