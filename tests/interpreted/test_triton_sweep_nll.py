"""The Triton kernels on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os
from functools import reduce

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.effects import assert_effects_within
from support.sweep_cases import Sweep, capped, exact, make, not_finite

from pyfastcircuits.kernels.common import rounded
from pyfastcircuits.kernels.effects import bounds_of
from pyfastcircuits.kernels.sweep_nll import sweep_nll_triton
from pyfastcircuits.ops import SweepPartial

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(sweep: Sweep, precision: str = "ieee", cap: float | None = None) -> None:
    ours = sweep_nll_triton(*sweep, precision, cap)
    assert all(mine.dtype == torch.float64 for mine in ours)
    fp64 = {"relative": 1e-12, "tiny": 1e-14} if sweep.base.dtype == torch.float64 else {}
    assert_effects_within(ours, sweep, cap, **fp64)


def with_bounds(sweep: Sweep, bound: float) -> Sweep:
    """Its ablations so large that each row's bound is this."""
    bounds = bounds_of(sweep.delta, sweep.basis, sweep.group, torch.float64)
    return sweep._replace(delta=(sweep.delta * (bound / bounds)[..., None]).to(sweep.delta.dtype))


@pytest.mark.parametrize("r", [0, 1, 5, 64, 70])
def test_ranks(r: int) -> None:
    check(make(P=3, T=19, V=147, r=r, mean=True))


@pytest.mark.matrix(
    shape=[(1, 1, 1, 1, 0), (11, 5, 65, 4, 3), (2, 40, 90, 2, 2)], scale=[False, True], mean=[False, True]
)
def test_shapes(shape: tuple[int, ...], scale: bool, mean: bool) -> None:
    P, T, V, G, K = shape
    check(make(P, T, V, r=6, G=G, K=K, scale=scale, mean=mean))


@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 0, 9), (2, 4, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    sweep = make(*shape, r=3, K=0, scale=True, mean=True)
    for ours, right in zip(sweep_nll_triton(*sweep, "ieee"), exact(sweep), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.matrix(dtype=[torch.float32, torch.bfloat16, torch.float64], cap=[None, 0.3, 30.0], scale=[False, True])
def test_dtypes_and_caps(dtype: torch.dtype, cap: float | None, scale: bool) -> None:
    check(make(P=5, T=9, V=70, r=21, G=2, K=2, scale=scale, mean=True, dtype=dtype, cap=cap), cap=cap)


@pytest.mark.matrix(bound=[1e-9, 1e-4, 0.44, 0.46, 14.9, 15.1, 39.9, 40.1, 500.0], cap=[None, 30.0])
def test_seams(bound: float, cap: float | None) -> None:
    """Either side of what each form is good for, and effects that the loss itself would round away."""
    check(with_bounds(make(P=2, T=6, V=70, r=5, K=2, mean=True, cap=cap), bound), cap=cap)


@pytest.mark.matrix(size=[1e-8, 1e-3, 0.3], cap=[None, 30.0])
def test_small_scales(size: float, cap: float | None) -> None:
    sweep = with_bounds(make(P=2, T=6, V=70, r=5, scale=True, mean=True, cap=cap), size)
    check(sweep._replace(scale=1 + size * (sweep.scale - 1)), cap=cap)


def one_token(height: float, change: float) -> Sweep:
    """The token asked for is so far above the others, and changed so much; the others are changed a little."""
    sweep = make(P=2, T=6, V=70, r=5, mean=True)
    sweep.basis[:, 0], sweep.basis[:, 0, 0] = 0, 1
    sweep.tokens[:] = 0
    sweep.base[:, 0] = height
    sweep.delta[..., 0] = change
    sweep.delta[..., 1:] *= 0.01
    return sweep._replace(clean_lse=sweep.base.double().logsumexp(-1))


@pytest.mark.parametrize(
    ("height", "change"), [(25.0, -20.0), (25.0, -0.1), (25.0, 1e-6), (2.0, -60.0), (-85.0, 100.0)]
)
def test_one_token(height: float, change: float) -> None:
    """It holds all probability, and loses a little of it or all; or it has almost none, and is raised to the top."""
    check(one_token(height, change))


@pytest.mark.parametrize("depth", [1, 6, 20, 39, 41])
def test_a_token_that_is_raised_to_the_top(depth: int) -> None:
    """While no other changes: what it gains is e^depth times what its probability says of its weight."""
    sweep = make(P=3, T=6, V=70, r=2, K=2, mean=True)
    sweep.base[:, 40] = sweep.base.logsumexp(-1) - depth
    sweep.basis.zero_()[0, 0, 40], sweep.basis[0, 1, 41], sweep.tokens[:, 0] = 1, 1, 40
    sweep.delta[:] = torch.tensor([[depth + 1, 0], [depth - 2, 1e-3], [depth / 2, -1]])[:, None]
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))


def test_logits_of_minus_infinity() -> None:
    sweep = make(P=3, T=6, V=70, r=5, K=2, mean=True)
    sweep.base[:, 3:40] = -torch.inf
    sweep.base[0, 1:] = -torch.inf
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))
    check(sweep._replace(clean_lse=capped(sweep.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def test_not_finite() -> None:
    sweep = not_finite()._replace(mean=True)
    check(sweep)
    check(sweep._replace(clean_lse=capped(sweep.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def test_huge_logits() -> None:
    check(make(P=3, T=6, V=70, r=20, K=2, mean=True, size=1e4))


def test_equal_rows() -> None:
    sweep = make(P=2, T=6, V=16, r=4, mean=True)  # each token has the probability from which on it is summed in fp64
    sweep.base[:] = 7.25
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))
    sweep.delta[:] = 0
    gain, _log_total, picked, mean = sweep_nll_triton(*sweep, "ieee")
    assert not any(x.any() for x in (gain, picked, mean))


def test_slices_add_up() -> None:
    sweep = with_bounds(make(P=2, T=5, V=90, r=5, G=2, K=2, scale=True, mean=True), 3.0)
    sweep.basis[..., :40] *= 0.01
    slices = [slice(0, 40), slice(40, 70), slice(70, 90)]
    of_slice = [
        sweep._replace(base=sweep.base[:, s], basis=sweep.basis[..., s], tokens=sweep.tokens - s.start) for s in slices
    ]
    parts = [SweepPartial(*sweep_nll_triton(*each, "ieee")) for each in of_slice]
    assert_effects_within(reduce(SweepPartial.merged, parts), sweep)


def test_rounded_factors() -> None:
    sweep = make(P=5, T=9, V=70, r=21, G=2, K=2, mean=True)
    whole = sweep._replace(delta=sweep.delta.bfloat16().float(), basis=sweep.basis.bfloat16().float())
    assert_effects_within(sweep_nll_triton(*whole, "bf16"), whole)
    assert_effects_within(sweep_nll_triton(*sweep, "bf16"), sweep, relative=0.01)


def test_factors_are_rounded_to_the_nearest() -> None:
    """Of a fraction's 23 bits TF32 has 10: half a unit in the last of them is the most that is lost."""
    x = torch.randn(10_000)
    assert ((rounded(x, "tf32") - x).abs() / x.abs()).max() <= 2**-11
    assert (rounded(x, "tf32").view(torch.int32) & (1 << 13) - 1 == 0).all()
    odd = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, -1, 0, -(1 << 31)], dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(rounded(odd, "tf32"), odd, rtol=0, atol=0, equal_nan=True)
    assert rounded(x, "fp32") is x


def test_three_products_of_tf32_are_as_right_as_fp32() -> None:
    """The interpreter multiplies in fp32 whatever is asked for; this is what tensor cores are asked for by "tf32x3"."""
    A, B = torch.randn(200, 64), torch.randn(64, 300)
    (big, small), (large, little) = ((rounded(x, "tf32"), rounded(x - rounded(x, "tf32"), "tf32")) for x in (A, B))
    ours = big @ large + (big @ little + small @ large)
    exact = A.double() @ B.double()
    assert (ours - exact).abs().max() <= 2 * (A @ B - exact).abs().max()


def test_not_contiguous() -> None:
    s = make(P=3, T=7, V=90, r=5, G=2, K=2, scale=True, mean=True)
    check(
        Sweep(
            base=s.base.repeat_interleave(2, 1)[:, ::2],
            delta=s.delta.mT.contiguous().mT,
            basis=s.basis.mT.contiguous().mT,
            tokens=s.tokens.T.contiguous().T,
            group=s.group.repeat_interleave(3)[::3],
            scale=s.scale.T.contiguous().T,
            clean_lse=s.clean_lse.expand(2, -1).T.contiguous()[:, 0],
            mean=True,
        )
    )


def test_a_group_that_is_not_there_gives_nan() -> None:
    sweep = make(P=4, T=3, V=40, r=2, G=2, mean=True)
    sweep.group[:] = torch.tensor([1, 2**32, 0, -1])
    for cap in (None, 30.0):
        for result in sweep_nll_triton(*sweep, "ieee", cap):
            assert result[[1, 3]].isnan().all()
            assert result[[0, 2]].isfinite().all()


def test_deterministic() -> None:
    sweep = make(P=9, T=20, V=150, r=30, G=3, mean=True)
    for first, second in zip(sweep_nll_triton(*sweep, "ieee"), sweep_nll_triton(*sweep, "ieee"), strict=True):
        assert torch.equal(first, second)


def test_errors() -> None:
    sweep = make(P=2, T=5, V=50, r=3)
    with pytest.raises(ValueError, match=r"delta has shape \[2, 4, 3\], expected \[2, 5, 3\]"):
        sweep_nll_triton(*sweep._replace(delta=sweep.delta[:, :4]), "ieee")
    with pytest.raises(ValueError, match=r"precision is 'tf32', but float64 tensors have only 'ieee'"):
        sweep_nll_triton(*make(P=2, T=5, V=50, r=3, dtype=torch.float64), "tf32")


def test_compiles() -> None:
    sweep = make(P=2, T=5, V=50, r=3)

    def effect(base: torch.Tensor) -> torch.Tensor:
        gain, _, picked, _ = sweep_nll_triton(base, *sweep[1:], "ieee")
        return gain.log1p() - picked[..., 0]

    ours = torch.compile(effect, fullgraph=True, backend="aot_eager")(sweep.base)
    assert torch.equal(ours, effect(sweep.base))


def test_opcheck() -> None:
    torch.library.opcheck(sweep_nll_triton, (*make(P=2, T=5, V=50, r=3, scale=True, mean=True), "ieee"))
