"""diagonal_ranks on a GPU against fp64."""

import pytest
import torch
from support.topk_cases import normal, torch_entries, whole_numbers

from pyfastcircuits import ops
from pyfastcircuits.kernels.diagonal_ranks import diagonal_ranks_triton
from pyfastcircuits.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [
    (0, 4, 2),
    (1, 1, 1),
    (3, 5, 0),
    (70, 200, 5),
    (1, 3333, 20),
    (1500, 1, 3),
    (1311, 2590, 70),
    (300, 5000, 512),
]


def columns_of(N: int, M: int) -> torch.Tensor:
    return torch.randint(M, (N,), generator=torch.Generator().manual_seed(N)).cuda()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_ties(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    A, B, _ = whole_numbers(*shape, dtype, "cuda")
    columns = columns_of(*shape[:2])
    ours = ops.diagonal_ranks(A, B, columns=columns)
    assert torch.equal(ours, reference.diagonal_ranks(A, B, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [20, 64, 300])
def test_normal_numbers(dtype: torch.dtype, rank: int) -> None:
    """Between the ranks that rounding allows."""
    A, B, _ = normal(700, 3000, rank, dtype, "cuda")
    columns = columns_of(700, 3000)
    ours = ops.diagonal_ranks(A, B, columns=columns)
    entries = torch_entries(A.double(), B.double(), None)
    bar = entries.gather(1, columns[:, None])
    rounding = 1e-11 if dtype == torch.float64 else 1e-4
    assert (ours >= (entries > bar + rounding).sum(1)).all()
    assert (ours <= (entries > bar - rounding).sum(1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [64, 300])
def test_equal_columns_do_not_count(dtype: torch.dtype, rank: int) -> None:
    """Wherever they lie in their tiles, their entries are equal to the bit."""
    A, B, _ = normal(900, 1, rank, dtype, "cuda")
    ours = ops.diagonal_ranks(A, B.expand(-1, 900))
    assert not ours.any()


def test_deterministic() -> None:
    A, B, _ = normal(3000, 3000, 64, device="cuda")
    runs = [ops.diagonal_ranks(A, B) for _ in range(3)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_no_host_synchronisation_and_own_stream() -> None:
    A, B, _ = normal(500, 3000, 64, device="cuda")
    columns = columns_of(500, 3000)
    expected = diagonal_ranks_triton(A, B, columns)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = diagonal_ranks_triton(A, B, columns)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_a_column_that_is_not_there_gives_minus_one() -> None:
    A, B, _ = whole_numbers(4, 9, 3, device="cuda")
    ours = diagonal_ranks_triton(A, B, torch.tensor([0, 9, -1, 8], device="cuda"))
    assert (ours == -1).tolist() == [False, True, True, False]
    with pytest.raises(IndexError, match=r"columns\[1\] is 9, expected 0 to 8"):
        ops.diagonal_ranks(A, B, columns=torch.tensor([0, 9, -1, 8], device="cuda"))


def test_opcheck_and_compiles() -> None:
    A, B, _ = whole_numbers(40, 40, 5, device="cuda")
    torch.library.opcheck(diagonal_ranks_triton, (A, B, torch.arange(40, device="cuda")))
    compiled = torch.compile(lambda a, b: ops.diagonal_ranks(a, b) * 2, fullgraph=True)
    assert torch.equal(compiled(A, B), 2 * ops.diagonal_ranks(A, B))
