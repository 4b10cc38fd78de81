"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.effects import assert_effects_within
from support.sweep_cases import Joint, capped, exact, joint, make, not_finite

from pyfastcircuits import ops
from pyfastcircuits.kernels.joint_nll import joint_nll_triton

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(case: Joint, cap: float | None = None) -> None:
    ours = joint_nll_triton(*case, "ieee", cap)
    assert all(mine.dtype == torch.float64 for mine in ours)
    fp64 = {"relative": 1e-12, "tiny": 1e-14} if case.base.dtype == torch.float64 else {}
    assert_effects_within(ours, case, cap, **fp64)


def times(case: Joint, factor: float) -> Joint:
    """Its ablations so many times as large."""
    return case._replace(delta=case.delta * factor)


@pytest.mark.parametrize("r", [0, 5, 70])
def test_ranks(r: int) -> None:
    check(joint(make(S := 3, T=19, V=147, r=r), 2 * S))


@pytest.mark.matrix(
    shape=[(1, 1, 1, 1, 0, 1), (5, 5, 65, 4, 3, 12), (2, 70, 100, 2, 2, 3)], mean=[False, True], cap=[None, 30.0]
)
def test_shapes(shape: tuple[int, ...], mean: bool, cap: float | None) -> None:
    S, T, V, G, K, P = shape
    check(joint(make(S, T, V, r=6, G=G, K=K, mean=mean, cap=cap), P), cap)


@pytest.mark.parametrize(("S", "T", "V", "P"), [(0, 4, 9, 0), (3, 4, 9, 0), (2, 0, 9, 3), (2, 4, 0, 3)])
def test_empty(S: int, T: int, V: int, P: int) -> None:
    case = joint(make(S, T, V, r=3, K=0, mean=True), P)
    for ours, right in zip(joint_nll_triton(*case, "ieee"), exact(case), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.matrix(dtype=[torch.float32, torch.bfloat16, torch.float64], cap=[None, 2.0])
def test_dtypes(dtype: torch.dtype, cap: float | None) -> None:
    check(joint(make(P=4, T=9, V=70, r=21, G=2, K=2, mean=True, dtype=dtype, cap=cap), 7), cap)


@pytest.mark.matrix(factor=[1e-9, 1e-4, 0.02, 0.1, 3.0, 10.0, 100.0], cap=[None, 30.0])
def test_effects_of_every_size(factor: float, cap: float | None) -> None:
    """In each form, and in several where pairs of a call differ; the loss itself would round the smallest away."""
    case = times(joint(make(P=4, T=6, V=70, r=5, K=2, mean=True, cap=cap), 5), factor)
    case.delta[1] *= 4
    check(case, cap)


def test_one_token() -> None:
    """It holds all probability, and loses it to a pair; or has almost none, and is raised to the top."""
    for height, change in ((25.0, -10.0), (25.0, 1e-7), (-85.0, 50.0)):
        sweep = make(P=3, T=4, V=70, r=5, mean=True)
        sweep.basis[:, 0], sweep.basis[:, 0, 0] = 0, 1
        sweep.tokens[:], sweep.base[:, 0], sweep.delta[..., 0] = 0, height, change
        sweep.delta[..., 1:] *= 0.01
        check(joint(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)), 4))


def test_rounded_factors() -> None:
    case = joint(make(P=4, T=9, V=70, r=21, G=2, K=2, mean=True), 7)
    whole = case._replace(delta=case.delta.bfloat16().float(), basis=case.basis.bfloat16().float())
    assert_effects_within(joint_nll_triton(*whole, "bf16"), whole)
    assert_effects_within(joint_nll_triton(*case, "bf16"), case, relative=0.01)


def test_not_finite() -> None:
    case = joint(not_finite()._replace(mean=True), 6)
    check(case)
    check(case._replace(clean_lse=capped(case.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def test_huge_logits_and_tokens_of_another_slice() -> None:
    case = joint(make(P=3, T=7, V=70, r=30, K=2, mean=True, size=1e4), 5)
    case.tokens[0, 0], case.tokens[1, 1], case.tokens[2, 0] = -1, 70, -(2**40)
    check(case)


def test_not_contiguous() -> None:
    s = joint(make(P=3, T=7, V=90, r=5, G=2, K=2, mean=True), 6)
    check(
        Joint(
            base=s.base.repeat_interleave(2, 1)[:, ::2],
            delta=s.delta.mT.contiguous().mT,
            basis=s.basis.mT.contiguous().mT,
            tokens=s.tokens.T.contiguous().T,
            group=s.group.repeat_interleave(3)[::3],
            pairs=s.pairs.T.contiguous().T,
            clean_lse=s.clean_lse.expand(2, -1).T.contiguous()[:, 0],
            mean=True,
        )
    )


@pytest.mark.parametrize("cap", [None, 30.0])
def test_what_is_not_there_gives_nan(cap: float | None) -> None:
    case = joint(make(P=4, T=3, V=40, r=2, G=2, mean=True, cap=cap), 4)
    case.group[:] = torch.tensor([1, 2, 0, 0])
    case.pairs[:] = torch.tensor([[0, 2], [1, 0], [4, 2], [3, -1]])
    for result in joint_nll_triton(*case, "ieee", cap):
        assert result[1:].isnan().all()
        assert result[0].isfinite().all()


def test_errors() -> None:
    case = joint(make(P=2, T=5, V=50, r=3), 4)
    with pytest.raises(ValueError, match=r"pairs has shape \[4, 1\], expected \[4, 2\]"):
        joint_nll_triton(*case._replace(pairs=case.pairs[:, :1]), "ieee")
    with pytest.raises(ValueError, match=r"delta has shape \[2, 4, 3\], expected \[2, 5, 3\]"):
        joint_nll_triton(*case._replace(delta=case.delta[:, :4]), "ieee")
    with pytest.raises(ValueError, match=r"pairs has shape \[4, 2\], but delta \[0, 5, 3\] holds no ablation"):
        joint_nll_triton(*case._replace(delta=case.delta[:0], group=case.group[:0]), "ieee")


def test_typed_op_and_compile() -> None:
    a = joint(make(P=4, T=5, V=50, r=3, G=2), 6)

    def both(base: torch.Tensor, backend: str = "triton") -> tuple[torch.Tensor, torch.Tensor]:
        call = (base, a.delta, a.basis, a.tokens[:, 0], a.pairs)
        return ops.joint_nll(*call, group=a.group, kl=True, backend=backend)

    ours = both(a.base)
    torch.testing.assert_close(ours, both(a.base, "reference"), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(a.base)
    assert all(torch.equal(x, y) for x, y in zip(compiled, ours, strict=True))


def test_opcheck() -> None:
    torch.library.opcheck(joint_nll_triton, (*joint(make(P=2, T=5, V=50, r=3, mean=True), 3), "ieee", 2.0))
