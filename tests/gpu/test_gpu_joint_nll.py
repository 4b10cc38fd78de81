"""joint_nll on a GPU, every precision, against fp64."""

import pytest
import torch
from support.effects import assert_effects_within
from support.sweep_cases import Joint, joint, make, not_finite, partial

from pyfastcircuits import ops
from pyfastcircuits.kernels.common import rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32x3", "tf32", "bf16"]


def check(case: Joint, precision: str = "ieee", cap: float | None = None) -> None:
    # Of factors that need no rounding. Tensor cores cut off what lies below the last digit of the largest term, 8
    # products or more at a time.
    delta, basis = (rounded(x, precision).to(x) for x in (case.delta, case.basis))
    case = case._replace(delta=delta, basis=basis)
    ours = partial(case, precision=precision, cap=cap)
    relative = 1e-12 if case.base.dtype == torch.float64 else 2e-6 if precision in ("ieee", "tf32x3") else 2e-5
    tiny = 1e-14 if case.base.dtype == torch.float64 else 1e-10
    assert_effects_within(ours, case, cap, relative, tiny)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("r", [0, 5, 64, 512])
def test_ranks(precision: str, r: int) -> None:
    check(joint(make(P=5, T=37, V=1031, r=r, device="cuda"), 12), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("S", "T", "V", "G", "P"), [(1, 1, 1, 1, 1), (33, 131, 517, 7, 90), (4, 100, 50257, 2, 4)])
@pytest.mark.parametrize("mean", [False, True])
def test_shapes(precision: str, S: int, T: int, V: int, G: int, P: int, mean: bool) -> None:
    check(joint(make(S, T, V, r=64, G=G, K=2, mean=mean, device="cuda"), P), precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_dtypes_and_a_soft_cap(dtype: torch.dtype, cap: float | None) -> None:
    sweep = make(P=5, T=80, V=1000, r=64, G=2, K=2, mean=True, dtype=dtype, device="cuda", cap=cap)
    check(joint(sweep, 15), cap=cap)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("factor", [1e-9, 1e-4, 0.005, 0.02, 1.0, 10.0])
def test_effects_of_every_size(precision: str, factor: float) -> None:
    """In each form, and in several where pairs of a call differ; the loss itself would round the smallest away."""
    case = joint(make(P=5, T=80, V=1000, r=64, K=2, mean=True, device="cuda"), 15)
    case.delta.mul_(factor)[1] *= 4
    check(case, precision)


def test_not_finite() -> None:
    check(joint(not_finite("cuda")._replace(mean=True), 6))


@pytest.mark.parametrize("cap", [None, 30.0])
def test_what_is_not_there_gives_nan(cap: float | None) -> None:
    case = joint(make(P=4, T=3, V=40, r=2, G=2, mean=True, device="cuda", cap=cap), 4)
    case.group[:] = torch.tensor([1, 2, 0, 0])
    case.pairs[:] = torch.tensor([[0, 2], [1, 0], [4, 2], [3, -1]])
    for result in partial(case, cap=cap):
        assert result[1:].isnan().all()
        assert result[0].isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_deterministic(precision: str, cap: float | None) -> None:
    """Also where threads could see what others have already written."""
    case = joint(make(P=12, T=300, V=9000, r=64, G=3, mean=True, device="cuda", cap=cap), 66)
    runs = [partial(case, precision=precision, cap=cap) for _ in range(5)]
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_host_synchronisation_and_own_stream(precision: str) -> None:
    case = joint(make(P=6, T=70, V=900, r=64, G=2, mean=True, device="cuda"), 15)
    expected = partial(case, precision=precision)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = partial(case, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiles() -> None:
    a = joint(make(P=2, T=5, V=50, r=3, device="cuda"), 4)

    def loss(base: torch.Tensor) -> torch.Tensor:
        return ops.joint_nll(base, a.delta, a.basis, a.tokens[:, 0], a.pairs)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(a.base), loss(a.base), rtol=0, atol=1e-6)


def test_no_cuda_kernel_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of joint_nll; take backend='triton'"):
        partial(joint(make(P=2, T=5, V=50, r=3, device="cuda"), 4), backend="cuda")
