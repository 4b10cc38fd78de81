"""The Triton kernels on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.topk_cases import assert_best, close_calls, normal, whole_numbers

from pyfastcircuits import ops
from pyfastcircuits.kernels import factored_topk as kernels
from pyfastcircuits.kernels.factored_topk import factored_topk_triton
from pyfastcircuits.ops import reference

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(70, 200, 5), (1, 333, 20), (150, 1, 3), (131, 259, 70), (3, 5, 0), (1, 1, 1)]


def check(
    A: torch.Tensor,
    B: torch.Tensor,
    k: int,
    largest: bool = True,
    per_row: bool = False,
    shift: torch.Tensor | None = None,
    screen: str = "auto",
) -> None:
    """Equal to the reference, ties included."""
    ours = factored_topk_triton(A, B, k, largest, per_row, shift, screen)
    for mine, exact in zip(ours, reference.factored_topk(A, B, k, largest, per_row, shift), strict=True):
        assert torch.equal(mine, exact.to(mine.dtype))


@pytest.mark.matrix(shape=SHAPES, largest=[True, False], per_row=[True, False], screen=["none", "bf16"])
def test_shapes_and_ties(shape: tuple[int, int, int], largest: bool, per_row: bool, screen: str) -> None:
    A, B, shift = whole_numbers(*shape)
    most = shape[1] if per_row else shape[0] * shape[1]
    for k in {1, min(7, most), min(100, most), most}:
        check(A, B, k, largest, per_row, shift if k > 1 else None, screen)


@pytest.mark.matrix(per_row=[True, False], screen=["none", "bf16"])
def test_entries_that_are_all_equal(per_row: bool, screen: str) -> None:
    for k in (1, 130, 256):
        check(torch.zeros(66, 3), torch.zeros(3, 300), k, per_row=per_row, screen=screen)


@pytest.mark.matrix(dtype=[torch.bfloat16, torch.float64], per_row=[True, False])
def test_dtypes(dtype: torch.dtype, per_row: bool) -> None:
    A, B, shift = whole_numbers(50, 300, 9, dtype)
    check(A, B, 40, per_row=per_row, shift=shift)
    A, B, shift = normal(50, 300, 9, dtype)
    ours = factored_topk_triton(A, B, 40, True, per_row, shift, "auto")
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_best(ours, A, B, True, per_row, shift)


@pytest.mark.matrix(largest=[True, False], per_row=[True, False], shifted=[True, False])
def test_normal_numbers(largest: bool, per_row: bool, shifted: bool) -> None:
    A, B, shift = normal(90, 270, 64)
    shift = shift if shifted else None
    ours = factored_topk_triton(A, B, 60, largest, per_row, shift, "none")
    assert_best(ours, A, B, largest, per_row, shift)


@pytest.mark.matrix(largest=[True, False], per_row=[True, False], case=[normal, close_calls])
def test_a_screen_changes_nothing(case: object, largest: bool, per_row: bool) -> None:
    A, B, shift = case(100, 400, 40)
    for k in (1, 50):
        for offset in (None, shift):
            screened, full = (factored_topk_triton(A, B, k, largest, per_row, offset, s) for s in ("bf16", "none"))
            assert all(torch.equal(a, b) for a, b in zip(screened, full, strict=True))


def test_a_screen_spares_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold none of the best are not multiplied in full: what is NaN only there does no harm."""
    A, B, _ = normal(640, 1000, 16)
    A[100] *= 30
    full = factored_topk_triton(A, B, 20, True, False, None, "none")
    poisoned = A.clone()
    screen = kernels.factored_topk_screen_kernel

    class PoisonAfter:
        def __getitem__(self, grid: object) -> object:
            def launch(*args: object, **options: object) -> None:
                screen[grid](*args, **options)
                poisoned[256:] = torch.inf

            return launch

    monkeypatch.setattr(kernels, "factored_topk_screen_kernel", PoisonAfter())
    ours = factored_topk_triton(poisoned, B, 20, True, False, None, "bf16")
    assert poisoned[-1].isinf().all()
    assert all(torch.equal(a, b) for a, b in zip(ours, full, strict=True))


@pytest.mark.matrix(per_row=[True, False], screen=["none", "bf16"])
def test_rows_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, per_row: bool, screen: str) -> None:
    monkeypatch.setattr(kernels, "SCRATCH", 600)
    for k in (3, 90):
        A, B, shift = whole_numbers(83, 140, 4)
        check(A, B, k, per_row=per_row, shift=shift, screen=screen)


@pytest.mark.parametrize("screen", ["none", "bf16"])
def test_products_beyond_the_range(screen: str) -> None:
    """Infinite entries are ordinary ones."""
    A, B, _ = whole_numbers(20, 150, 2)
    A[3], B[:, 4], A[9] = torch.tensor([2e38, 0]), torch.tensor([2e38, 0]), torch.tensor([3e38, -3e38])
    B[:, 140] = 3e38
    product = A @ B
    assert {torch.inf, -torch.inf} < set(product.flatten().tolist())
    for k in (60, product.numel()):
        values, rows, columns = factored_topk_triton(A, B, k, True, False, None, screen)
        best = product.flatten().sort(descending=True, stable=True)
        assert torch.equal(values, best.values[:k])
        assert torch.equal(rows * 150 + columns, best.indices[:k])


def test_not_contiguous() -> None:
    A, B, shift = whole_numbers(40, 150, 6)
    wide = torch.full((80, 12), torch.nan)
    wide[::2, ::2] = A
    for per_row in (True, False):
        whole = factored_topk_triton(A, B, 30, True, per_row, shift, "none")
        ours = factored_topk_triton(
            wide[::2, ::2], B.T.contiguous().T, 30, True, per_row, shift.repeat_interleave(3)[::3], "none"
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


@pytest.mark.parametrize("entries", [1, 7, 100, 50257, 50257**2])
def test_segments(entries: int) -> None:
    for k in (1, 10, 1024, 65536):
        if k <= entries:
            width = kernels.segment_width(entries, k)
            assert width in (8, 16, 32, 64, 128)
            assert width in (8, 128) or width <= (entries / k) ** 0.5 < 2 * width


def test_typed_op() -> None:
    A, B, shift = whole_numbers(30, 140, 5)
    for per_row in (True, False):
        ours = ops.factored_topk(A, B, 20, per_row=per_row, shift=shift, backend="triton")
        exact = ops.factored_topk(A, B, 20, per_row=per_row, shift=shift, backend="reference")
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, exact, strict=True))
    with pytest.raises(ValueError, match="k is 1025, but backend='triton' finds at most 1024 entries a row"):
        ops.factored_topk(A, torch.zeros(5, 2000), 1025, per_row=True, backend="triton")
    compiled = torch.compile(
        lambda a, b: ops.factored_topk(a, b, 9, backend="triton").values * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(A, B), ops.factored_topk(A, B, 9, backend="triton").values * 2)


def test_errors() -> None:
    A, B, shift = whole_numbers(4, 6, 5)
    with pytest.raises(ValueError, match=r"A has shape \[4, 4\] and B \[5, 6\]"):
        factored_topk_triton(A[:, :4], B, 3, True, False, None, "none")
    with pytest.raises(TypeError, match=r"B has dtype torch.float64, but A has torch.float32"):
        factored_topk_triton(A, B.double(), 3, True, False, None, "none")
    with pytest.raises(ValueError, match=r"shift has shape \[3\], expected \[4\]"):
        factored_topk_triton(A, B, 3, True, False, shift[:3], "none")
    with pytest.raises(ValueError, match="k is 25, expected 1 to 24"):
        factored_topk_triton(A, B, 25, True, False, None, "none")
    with pytest.raises(ValueError, match="k is 7, expected 1 to 6"):
        factored_topk_triton(A, B, 7, True, True, None, "none")
    with pytest.raises(ValueError, match=r"screen is 'tf32', expected one of auto, none, bf16"):
        factored_topk_triton(A, B, 3, True, False, None, "tf32")
    with pytest.raises(ValueError, match=r"screen is 'bf16', but A is torch.float64"):
        factored_topk_triton(A.double(), B.double(), 3, True, False, None, "bf16")


def test_opcheck() -> None:
    A, B, shift = whole_numbers(4, 6, 5)
    torch.library.opcheck(factored_topk_triton, (A, B, 3, True, False, shift, "auto"))
    torch.library.opcheck(factored_topk_triton, (A, B, 3, False, True, None, "none"))
