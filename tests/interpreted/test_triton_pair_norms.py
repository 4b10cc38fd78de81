"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.accuracy import assert_as_accurate
from support.pair_cases import factors, torch_norms

from pyfastcircuits import ops
from pyfastcircuits.kernels.configs import choose
from pyfastcircuits.kernels.pair_norms import pair_norms_triton
from pyfastcircuits.ops import reference

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(left: torch.Tensor, right: torch.Tensor, before: torch.Tensor | None = None) -> None:
    ours = pair_norms_triton(left, right, before, "ieee")
    assert ours.dtype == (torch.float64 if left.dtype == torch.float64 else torch.float32)
    exact = reference.pair_norms(left, right, before)
    theirs = torch_norms(left.to(ours.dtype), right.to(ours.dtype))
    if before is not None:
        theirs = torch.where(exact == 0, 0, theirs)
        assert torch.equal(ours == 0, exact == 0)
    size = exact.nan_to_num(0, 0).max() if exact.numel() else 0
    eps = torch.finfo(ours.dtype).eps * (20 if ours.dtype == torch.float64 else 1)  # the reference rounds too
    assert_as_accurate(ours, theirs, exact, tiny=float(size) * eps)


@pytest.mark.parametrize(
    "shape",
    [
        (5, 6, 4, 7, 3),
        (1, 1, 1, 1, 1),
        (3, 2, 64, 70, 64),
        (7, 5, 20, 33, 130),
        (2, 3, 150, 16, 9),
        (70, 65, 1, 9, 2),
        (9, 4, 80, 40, 96),
    ],
)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(*factors(*shape, torch.float32))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 2), (3, 0, 2, 4, 2), (3, 2, 0, 4, 2), (3, 2, 2, 0, 2), (3, 2, 2, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    ours = pair_norms_triton(*factors(*shape, torch.float32), None, "ieee")
    assert torch.equal(ours, torch.zeros(shape[0], shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    check(*factors(6, 5, 12, 50, 20, dtype))


def test_rounded_factors() -> None:
    left, right = factors(6, 5, 12, 50, 20, torch.float32)
    ours = pair_norms_triton(left, right, None, "bf16")
    assert torch.equal(ours, pair_norms_triton(left.bfloat16(), right.bfloat16(), None, "ieee"))
    torch.testing.assert_close(ours.double(), reference.pair_norms(left, right), rtol=1e-3, atol=0)


@pytest.mark.parametrize("before", [[-1, 0, 3, 9, 40, 10, 8], [0] * 7, [9] * 7])
def test_only_pairs_before_a_bound(before: list[int]) -> None:
    left, right = factors(9, 7, 40, 30, 50, torch.float32)
    bound = torch.tensor(before)
    check(left, right, bound)
    whole = pair_norms_triton(left, right, None, "ieee")
    ours = pair_norms_triton(left, right, bound.repeat_interleave(2)[::2], "ieee")
    assert torch.equal(ours, whole * (torch.arange(9)[:, None] < bound))


def test_nan_inf_and_zero_stay_in_their_pairs() -> None:
    left, right = factors(6, 5, 5, 30, 3, torch.float32)
    left[1, 2, 3] = torch.nan
    left[2] = 0
    right[4, 0, 0] = torch.inf
    left[5, 1, 1] = -torch.inf
    ours = pair_norms_triton(left, right, None, "ieee")
    assert ours[1].isnan().all()
    assert ours[2, :4].tolist() == [0, 0, 0, 0]
    assert ours[[0, 3], 4].tolist() == [torch.inf, torch.inf]
    assert ours[5, :4].tolist() == [torch.inf] * 4
    assert ours[[0, 2, 3, 4], :4].isfinite().all()


def test_sums_of_squares_have_the_range_of_norms_of_weights() -> None:
    left, right = factors(3, 4, 40, 60, 30, torch.float32)
    for size in (1e-8, 1e8):
        check(left * size, right * size)


def test_not_contiguous() -> None:
    left, right = factors(5, 6, 12, 40, 14, torch.float32)
    whole = pair_norms_triton(left, right, None, "ieee")
    wide = torch.full((5, 24, 80), torch.nan)
    wide[:, ::2, ::2] = left
    assert torch.equal(pair_norms_triton(wide[:, ::2, ::2], right.mT.contiguous().mT, None, "ieee"), whole)
    assert torch.equal(pair_norms_triton(left, right[:1].expand(3, -1, -1), None, "ieee"), whole[:, :1].expand(-1, 3))


def test_every_block_has_the_same_result() -> None:
    """A pair's norm does not depend on its place or, but for rounding, on how the ranks are cut."""
    left, right = factors(1, 1, 40, 30, 50, torch.float32)
    many = pair_norms_triton(left.expand(11, -1, -1), right.expand(9, -1, -1), None, "ieee")
    assert torch.equal(many, many[:1, :1].expand(11, 9))
    torch.testing.assert_close(many[:1, :1], pair_norms_triton(left, right, None, "ieee"), rtol=3e-7, atol=0)
    assert torch.equal(many, pair_norms_triton(left.expand(11, -1, -1), right.expand(9, -1, -1), None, "ieee"))


@pytest.mark.parametrize("arithmetic", ["fp32", "fp64", "tf32", "bf16"])
def test_tiles_waste_little(arithmetic: str) -> None:
    for rank in (16, 48, 64, 80, 96, 128, 192, 256):
        shape = {"N": 144, "M": 144, "r": rank, "s": rank, "d": 768}
        blocks = choose("pair_norms", shape, arithmetic, 90).blocks
        for heads, rows in (("N", "R"), ("M", "S")):
            padded = -(-144 // blocks[f"BLOCK_{heads}"]) * blocks[f"BLOCK_{heads}"]
            padded *= -(-rank // blocks[f"BLOCK_{rows}"]) * blocks[f"BLOCK_{rows}"]
            assert padded <= 1.12 * 144 * rank


def test_gradients() -> None:
    left, right = factors(4, 5, 3, 7, 2)
    left.requires_grad_()
    right.requires_grad_()
    before = torch.tensor([4, 0, 2, 3, 1])
    assert torch.autograd.gradcheck(lambda a, b: pair_norms_triton(a, b, before, "ieee"), (left, right), fast_mode=True)


def test_typed_op() -> None:
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    before = torch.arange(5, dtype=torch.int32)
    for route in ("auto", "products"):
        ours = ops.pair_norms(left, right, before=before, route=route, backend="triton")
        assert torch.equal(ours, pair_norms_triton(left, right, before.long(), "ieee"))
    with pytest.raises(ValueError, match="route='gram' has precision='ieee' and the CPU kernels"):
        ops.pair_norms(left, right, route="gram", backend="triton")
    compiled = torch.compile(
        lambda a, b: ops.pair_norms(a, b, backend="triton") * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(left, right), ops.pair_norms(left, right, backend="triton") * 2)


def test_errors() -> None:
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    with pytest.raises(ValueError, match=r"left has shape \[4, 3, 6\] and right \[5, 7, 2\]"):
        pair_norms_triton(left[..., :6], right, None, "ieee")
    with pytest.raises(ValueError, match=r"before has shape \[4\], expected \[5\]"):
        pair_norms_triton(left, right, torch.arange(4), "ieee")
    with pytest.raises(TypeError, match=r"right has dtype torch.float64, but left has torch.float32"):
        pair_norms_triton(left, right.double(), None, "ieee")
    with pytest.raises(ValueError, match=r"precision is 'tf32', but float64 tensors have only 'ieee'"):
        pair_norms_triton(left.double(), right.double(), None, "tf32")


def test_opcheck() -> None:
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    torch.library.opcheck(pair_norms_triton, (left, right, torch.arange(5), "ieee"))
    torch.library.opcheck(pair_norms_triton, (left.requires_grad_(), right.requires_grad_(), None, "ieee"))
