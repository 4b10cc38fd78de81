"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.sweep_cases import Sweep, assert_partials_as_accurate, capped, eager, exact, make, not_finite

from pyfastcircuits.kernels.common import rounded
from pyfastcircuits.kernels.sweep_nll import sweep_nll_triton

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(sweep: Sweep, precision: str = "ieee", tiny: float = 1e-6, cap: float | None = None) -> None:
    ours = sweep_nll_triton(*sweep, precision, cap)
    assert all(mine.dtype == torch.float64 for mine in ours)
    assert_partials_as_accurate(ours, eager(sweep, cap), exact(sweep, cap), tiny)


@pytest.mark.parametrize("r", [0, 1, 5, 64, 70])
@pytest.mark.parametrize("clean", [False, True])
def test_ranks(r: int, clean: bool) -> None:
    check(make(P=3, T=19, V=147, r=r, clean=clean))


def test_factors_are_rounded_to_the_nearest() -> None:
    """Of a fraction's 23 bits TF32 has 10: half a unit in the last of them is the most that is lost."""
    x = torch.randn(10_000)
    assert ((rounded(x, "tf32") - x).abs() / x.abs()).max() <= 2**-11
    assert (rounded(x, "tf32").view(torch.int32) & (1 << 13) - 1 == 0).all()
    odd = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, -1, 0, -(1 << 31)], dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(rounded(odd, "tf32"), odd, rtol=0, atol=0, equal_nan=True)
    assert rounded(x, "fp32") is x


@pytest.mark.parametrize(("P", "T", "V", "G", "K"), [(1, 1, 1, 1, 0), (11, 5, 65, 4, 3), (2, 40, 300, 2, 2)])
@pytest.mark.matrix(scale=[False, True], clean=[False, True])
def test_shapes(P: int, T: int, V: int, G: int, K: int, scale: bool, clean: bool) -> None:
    check(make(P, T, V, r=6, G=G, K=K, scale=scale, clean=clean))


@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 0, 9), (2, 4, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    check(make(*shape, r=3, K=0, scale=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    check(
        make(P=5, T=9, V=130, r=21, G=2, K=2, scale=True, clean=True, dtype=dtype),
        tiny=1e-6 if dtype.itemsize < 8 else 1e-14,
    )


@pytest.mark.matrix(dtype=[torch.float32, torch.bfloat16, torch.float64], cap=[0.3, 30.0], clean=[False, True])
def test_a_soft_cap(dtype: torch.dtype, cap: float, clean: bool) -> None:
    tiny = 1e-6 if dtype.itemsize < 8 else 1e-14
    for scale in (False, True):
        sweep = make(P=5, T=9, V=130, r=21, G=2, K=2, scale=scale, clean=clean, dtype=dtype, cap=cap)
        check(sweep, tiny=tiny, cap=cap)


def test_a_soft_cap_of_what_is_not_finite() -> None:
    sweep = not_finite()
    check(sweep._replace(clean_lse=capped(sweep.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def test_rounded_factors() -> None:
    sweep = make(P=5, T=9, V=130, r=21, G=2, K=2, clean=True)
    rounded = sweep._replace(delta=sweep.delta.bfloat16().float(), basis=sweep.basis.bfloat16().float())
    assert_partials_as_accurate(sweep_nll_triton(*sweep, "bf16"), eager(rounded), exact(rounded), 1e-6)


def test_huge_logits() -> None:
    check(make(P=3, T=17, V=200, r=64, K=2, clean=True, size=1e4))


def test_a_huge_logit_loses_nothing() -> None:
    sweep = make(P=3, T=17, V=200, r=20)
    sweep.base[torch.arange(17), sweep.tokens[:, 0]] = 1e4
    lse, picked, _ = sweep_nll_triton(*sweep, "ieee")
    # Half a unit in the last place of 1e4 * log2(e): the interpreter has no fused multiply-add, which keeps it.
    torch.testing.assert_close(lse, picked[..., 0], rtol=0, atol=2**-11)


def test_equal_rows() -> None:
    sweep = make(P=2, T=6, V=333, r=4)
    sweep.base[:] = 7.25
    sweep.delta[:] = 0
    lse, picked, _ = sweep_nll_triton(*sweep, "ieee")
    torch.testing.assert_close(lse - picked[..., 0], torch.full_like(lse, 333).log(), rtol=0, atol=1e-6)


def test_not_finite() -> None:
    check(not_finite())


def test_tokens_of_another_slice() -> None:
    sweep = make(P=2, T=5, V=50, r=3, K=2)
    sweep.tokens[0, 0], sweep.tokens[1, 1], sweep.tokens[2, 0] = -1, 50, -(2**40)
    check(sweep)


def test_not_contiguous() -> None:
    s = make(P=3, T=7, V=90, r=5, G=2, K=2, scale=True, clean=True)
    check(
        Sweep(
            base=s.base.repeat_interleave(2, 1)[:, ::2],
            delta=s.delta.mT.contiguous().mT,
            basis=s.basis.mT.contiguous().mT,
            tokens=s.tokens.T.contiguous().T,
            group=s.group.repeat_interleave(3)[::3],
            scale=s.scale.T.contiguous().T,
            clean_lse=s.clean_lse.expand(2, -1).T.contiguous()[:, 0],
        )
    )


def test_a_group_that_is_not_there_gives_nan() -> None:
    sweep = make(P=4, T=3, V=40, r=2, G=2, clean=True)
    sweep.group[:] = torch.tensor([1, 2**32, 0, -1])
    for cap in (None, 30.0):
        for result in sweep_nll_triton(*sweep, "ieee", cap):
            assert result[[1, 3]].isnan().all()
            assert result[[0, 2]].isfinite().all()


def test_deterministic() -> None:
    sweep = make(P=9, T=20, V=300, r=30, G=3, clean=True)
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

    def loss(base: torch.Tensor) -> torch.Tensor:
        lse, picked, _ = sweep_nll_triton(base, *sweep[1:], "ieee")
        return lse - picked[..., 0]

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(sweep.base)
    assert torch.equal(ours, loss(sweep.base))


def test_opcheck() -> None:
    torch.library.opcheck(sweep_nll_triton, (*make(P=2, T=5, V=50, r=3, scale=True, clean=True), "ieee"))
