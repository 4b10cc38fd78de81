"""The CUDA kernels of factored_topk, their own text, run on the CPU thread by thread."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.topk_cases import Entries, assert_best, close_calls, normal, whole_numbers

from pyfastcircuits.ops import reference

SOURCE = Path(__file__).parent / "cuda_on_cpu" / "kernels.cpp"
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
SHAPES = [(70, 200, 5), (1, 333, 20), (150, 1, 3), (140, 270, 33), (3, 5, 0), (1, 1, 1)]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the headers that come with nvcc")


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank", "k", "splits", "blocks", "limit")),
        ("largest", ctypes.c_bool),
        ("per_row", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    flags = ["-x", "c++", "-std=c++20", "-O2", "-cudart", "none", "-Xcompiler", "-fPIC", "-shared"]
    subprocess.run(["nvcc", *flags, SOURCE, "-o", built], check=True)
    return ctypes.CDLL(str(built))


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def topk(
    library: ctypes.CDLL,
    A: torch.Tensor,
    B: torch.Tensor,
    k: int,
    largest: bool = True,
    per_row: bool = False,
    shift: torch.Tensor | None = None,
    splits: int = 2,
    blocks: int = 3,
    slack: int = 5,
) -> Entries:
    """As csrc/cuda/factored_topk.cu launches it, but for the lists, which are shorter and so are cut more often."""
    (rows, rank), columns = A.shape, B.shape[1]
    sizes = Sizes(rows, columns, rank, k, splits, blocks, k + slack, largest, per_row)
    work = torch.promote_types(A.dtype, torch.float32)
    values = torch.full((rows, k) if per_row else (k,), torch.nan, dtype=work)
    found = torch.full((2, *values.shape), -1)
    A, B, shift = A.contiguous(), B.contiguous(), None if shift is None else shift.to(work)
    library.factored_topk(KINDS[A.dtype], ctypes.byref(sizes), *map(pointer, (A, B, shift, values, found[0], found[1])))
    return values, found[0], found[1]


def check(library: ctypes.CDLL, A: torch.Tensor, B: torch.Tensor, k: int, **options: object) -> None:
    """Equal to the reference, ties included."""
    wanted = {name: options[name] for name in ("largest", "per_row", "shift") if name in options}
    for mine, exact in zip(topk(library, A, B, k, **options), reference.factored_topk(A, B, k, **wanted), strict=True):
        assert torch.equal(mine, exact.to(mine.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_shapes_and_ties(library: ctypes.CDLL, shape: tuple[int, int, int], largest: bool, per_row: bool) -> None:
    A, B, shift = whole_numbers(*shape)
    most = shape[1] if per_row else shape[0] * shape[1]
    for k in {1, min(7, most), min(100, most), min(shape[1], most)}:
        check(library, A, B, k, largest=largest, per_row=per_row, shift=shift if k > 1 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_row", [True, False])
def test_dtypes(library: ctypes.CDLL, dtype: torch.dtype, per_row: bool) -> None:
    A, B, shift = whole_numbers(70, 300, 19, dtype)
    check(library, A, B, 40, per_row=per_row, shift=shift)
    A, B, shift = normal(70, 300, 19, dtype)
    assert_best(topk(library, A, B, 40, per_row=per_row, shift=shift), A, B, True, per_row, shift)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("case", [normal, close_calls])
def test_values_that_round(library: ctypes.CDLL, case: object, largest: bool, per_row: bool) -> None:
    A, B, shift = case(20 if per_row else 150, 400, 40)
    ours = topk(library, A, B, 60, largest, per_row, shift)
    assert_best(ours, A, B, largest, per_row, shift)
    # However the work is cut.
    for splits, blocks, slack in ((1, 1, 0), (4, 8, 1000)):
        again = topk(library, A, B, 60, largest, per_row, shift, splits, blocks, slack)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("per_row", [True, False])
def test_entries_that_are_all_equal(library: ctypes.CDLL, per_row: bool) -> None:
    for value in (0.0, -0.0, torch.inf):
        A, B = torch.full((20 if per_row else 140, 1), value), torch.ones(1, 300)
        A[::2] *= -1 if value == 0 else 1
        check(library, A, B, 200, per_row=per_row, splits=3, blocks=5)


@pytest.mark.parametrize("per_row", [True, False])
def test_infinite_entries_are_ordinary_ones_and_nan_never_wins(library: ctypes.CDLL, per_row: bool) -> None:
    A, B = torch.ones(30, 1), torch.arange(150.0)[None].clone()
    B[0, 7], B[0, 9], B[0, 140] = torch.nan, torch.inf, -torch.inf
    for k in (3, 150):
        values, _, columns = (x.reshape(-1, k)[0] for x in topk(library, A, B, k, per_row=per_row))
        assert values[0] == torch.inf
        assert columns[0] == 9
        assert not values.isnan().any()
    if per_row:
        assert columns[-2:].tolist() == [7, 140]
        assert sorted(columns.tolist()) == list(range(150))
