"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.sweep_cases import Joint, assert_partials_as_accurate, capped, eager, exact, joint, make, not_finite

from pyfastcircuits import ops
from pyfastcircuits.kernels.joint_nll import joint_nll_triton

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(case: Joint, precision: str = "ieee", tiny: float = 1e-6, cap: float | None = None) -> None:
    ours = joint_nll_triton(*case, precision, cap)
    if precision == "bf16":
        case = case._replace(delta=case.delta.bfloat16().to(case.delta), basis=case.basis.bfloat16().to(case.basis))
    assert all(mine.dtype == torch.float64 for mine in ours)
    assert_partials_as_accurate(ours, eager(case, cap), exact(case, cap), tiny)


@pytest.mark.parametrize("r", [0, 5, 70])
def test_ranks(r: int) -> None:
    check(joint(make(S := 3, T=19, V=147, r=r), 2 * S))


@pytest.mark.parametrize(
    ("S", "T", "V", "G", "K", "P"), [(1, 1, 1, 1, 0, 1), (5, 5, 65, 4, 3, 12), (2, 70, 200, 2, 2, 3)]
)
@pytest.mark.matrix(clean=[False, True], cap=[None, 30.0])
def test_shapes(S: int, T: int, V: int, G: int, K: int, P: int, clean: bool, cap: float | None) -> None:
    check(joint(make(S, T, V, r=6, G=G, K=K, clean=clean, cap=cap), P), cap=cap)


@pytest.mark.parametrize(("S", "T", "V", "P"), [(0, 4, 9, 0), (3, 4, 9, 0), (2, 0, 9, 3), (2, 4, 0, 3)])
def test_empty(S: int, T: int, V: int, P: int) -> None:
    check(joint(make(S, T, V, r=3, K=0), P))


@pytest.mark.matrix(dtype=[torch.bfloat16, torch.float64], cap=[None, 2.0])
def test_dtypes(dtype: torch.dtype, cap: float | None) -> None:
    case = joint(make(P=4, T=9, V=130, r=21, G=2, K=2, clean=True, dtype=dtype, cap=cap), 7)
    check(case, tiny=1e-6 if dtype.itemsize < 8 else 1e-14, cap=cap)


def test_rounded_factors() -> None:
    check(joint(make(P=4, T=9, V=130, r=21, G=2, K=2, clean=True), 7), "bf16")


def test_not_finite() -> None:
    case = joint(not_finite(), 6)
    check(case)
    check(case._replace(clean_lse=capped(case.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def test_huge_logits_and_tokens_of_another_slice() -> None:
    case = joint(make(P=3, T=17, V=200, r=64, K=2, clean=True, size=1e4), 5)
    case.tokens[0, 0], case.tokens[1, 1], case.tokens[2, 0] = -1, 200, -(2**40)
    check(case)


def test_not_contiguous() -> None:
    s = joint(make(P=3, T=7, V=90, r=5, G=2, K=2, clean=True), 6)
    check(
        Joint(
            base=s.base.repeat_interleave(2, 1)[:, ::2],
            delta=s.delta.mT.contiguous().mT,
            basis=s.basis.mT.contiguous().mT,
            tokens=s.tokens.T.contiguous().T,
            group=s.group.repeat_interleave(3)[::3],
            pairs=s.pairs.T.contiguous().T,
            clean_lse=s.clean_lse.expand(2, -1).T.contiguous()[:, 0],
        )
    )


@pytest.mark.parametrize("cap", [None, 30.0])
def test_what_is_not_there_gives_nan(cap: float | None) -> None:
    case = joint(make(P=4, T=3, V=40, r=2, G=2, clean=True, cap=cap), 4)
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
    torch.library.opcheck(joint_nll_triton, (*joint(make(P=2, T=5, V=50, r=3, clean=True), 3), "ieee", 2.0))
