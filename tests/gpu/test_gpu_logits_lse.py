"""logits_lse on a GPU, every precision, against fp64."""

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.sweep_cases import Sweep, make, not_finite

from pyfastcircuits import ops
from pyfastcircuits.kernels.common import rounded
from pyfastcircuits.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32x3", "tf32", "bf16"]


def check(sweep: Sweep, precision: str = "ieee", cap: float | None = None) -> None:
    ours = ops.logits_lse(sweep.base, sweep.delta, sweep.basis, group=sweep.group, cap=cap, precision=precision)
    delta, basis = (rounded(x, precision).to(x) for x in (sweep.delta, sweep.basis))  # the caller's choice
    call = sweep.base, delta, basis, sweep.group, cap
    eager = reference.logits_lse(*call, torch.promote_types(sweep.base.dtype, torch.float32))
    # Tensor cores cut off what lies below the last digit of the largest term, 8 products or more at a time.
    cut = (
        max(4, sweep.delta.shape[-1] / 8)
        * torch.finfo(torch.float32).eps
        * float(eager.abs().nan_to_num(0, 0, 0).max())
    )
    tiny = 1e-13 if sweep.base.dtype == torch.float64 else max(2e-6, cut)
    assert_as_accurate(ours, eager, reference.logits_lse(*call), tiny, rows=[1])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("r", [0, 1, 64, 70, 512])
def test_ranks(precision: str, r: int) -> None:
    check(make(P=5, T=37, V=1031, r=r, device="cuda"), precision)


@pytest.mark.parametrize(("P", "T", "V", "G"), [(1, 1, 1, 1), (33, 131, 517, 7), (3, 100, 50257, 2)])
def test_shapes(P: int, T: int, V: int, G: int) -> None:
    check(make(P, T, V, r=64, G=G, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_dtypes_and_caps(dtype: torch.dtype, cap: float | None) -> None:
    check(make(P=5, T=40, V=1000, r=64, G=2, dtype=dtype, device="cuda"), cap=cap)


def test_huge_logits_and_what_is_not_finite() -> None:
    check(make(P=3, T=17, V=2000, r=64, size=1e4, device="cuda"))
    check(not_finite("cuda"))


def test_deterministic() -> None:
    s = make(P=40, T=200, V=3000, r=64, G=3, device="cuda")
    runs = [ops.logits_lse(s.base, s.delta, s.basis, group=s.group) for _ in range(3)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
