"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.accuracy import assert_as_accurate
from support.sweep_cases import Sweep, make, not_finite

from pyfastcircuits import ops
from pyfastcircuits.kernels.logits_lse import logits_lse_triton
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.logits_lse import clean_logsumexp

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tensors(sweep: Sweep) -> tuple[Tensor, ...]:
    return sweep.base, sweep.delta, sweep.basis, sweep.group


def check(sweep: Sweep, cap: float | None = None) -> None:
    call = tensors(sweep)
    eager = reference.logits_lse(*call, cap, torch.promote_types(sweep.base.dtype, torch.float32))
    tiny = 1e-14 if sweep.base.dtype == torch.float64 else 1e-6
    assert_as_accurate(logits_lse_triton(*call, "ieee", cap), eager, reference.logits_lse(*call, cap), tiny, rows=[1])


@pytest.mark.parametrize("r", [0, 1, 64, 70])
def test_ranks(r: int) -> None:
    check(make(P=3, T=19, V=147, r=r))


@pytest.mark.parametrize(("P", "T", "V", "G"), [(1, 1, 1, 1), (11, 5, 65, 4), (0, 4, 9, 1), (2, 0, 9, 1), (2, 4, 0, 1)])
def test_shapes(P: int, T: int, V: int, G: int) -> None:
    check(make(P, T, V, r=6, G=G))


@pytest.mark.matrix(dtype=[torch.float32, torch.bfloat16, torch.float64], cap=[None, 2.0])
def test_dtypes_and_caps(dtype: torch.dtype, cap: float | None) -> None:
    check(make(P=5, T=9, V=130, r=21, G=2, dtype=dtype, cap=cap), cap)


def test_huge_logits() -> None:
    check(make(P=3, T=17, V=200, r=64, size=1e4))


def test_a_huge_logit_loses_nothing() -> None:
    sweep = make(P=3, T=5, V=70, r=20)
    sweep.base[:, 4], sweep.basis[..., 4] = 1e4, 0
    # Half a unit in the last place of 1e4 * log2(e): the interpreter has no fused multiply-add, which keeps it.
    assert (logits_lse_triton(*tensors(sweep), "ieee") - 1e4).abs().max() <= 2**-11


@pytest.mark.parametrize("cap", [None, 30.0])
def test_not_finite(cap: float | None) -> None:
    check(not_finite(), cap)


def test_a_group_that_is_not_there_gives_nan() -> None:
    sweep = make(P=3, T=3, V=40, r=2, G=2)
    sweep.group[:] = torch.tensor([2, 1, -1])
    lse = logits_lse_triton(*tensors(sweep), "ieee")
    assert lse[[0, 2]].isnan().all()
    assert lse[1].isfinite().all()


def test_typed_op_and_compile() -> None:
    base, delta, basis, group = tensors(make(P=3, T=5, V=50, r=3, G=2))

    def ours(base: Tensor) -> Tensor:
        return ops.logits_lse(base, delta, basis, group=group, backend="triton")

    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(base), ours(base))
    right = reference.logits_lse(base, delta, basis, group)
    torch.testing.assert_close(ours(base), right, rtol=0, atol=1e-6)
    clean = clean_logsumexp(base, backend="triton")
    torch.testing.assert_close(clean, base.double().logsumexp(-1), rtol=0, atol=1e-6)


def test_opcheck() -> None:
    torch.library.opcheck(logits_lse_triton, (*tensors(make(P=2, T=5, V=50, r=3)), "ieee", 2.0))
