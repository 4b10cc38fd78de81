"""sweep_nll on a GPU, every precision, against fp64."""

import pytest
import torch
from support.effects import assert_effects_within
from support.sweep_cases import Sweep, capped, make, not_finite, partial

from pyfastcircuits import ops
from pyfastcircuits.kernels.common import rounded
from pyfastcircuits.kernels.effects import bounds_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32x3", "tf32", "bf16"]


def check(sweep: Sweep, precision: str = "ieee", cap: float | None = None) -> None:
    # Of factors that need no rounding. Tensor cores cut off what lies below the last digit of the largest term, 8
    # products or more at a time.
    delta, basis = (rounded(x, precision).to(x) for x in (sweep.delta, sweep.basis))
    sweep = sweep._replace(delta=delta, basis=basis)
    ours = partial(sweep, precision=precision, cap=cap)
    relative = 1e-12 if sweep.base.dtype == torch.float64 else 2e-6 if precision in ("ieee", "tf32x3") else 2e-5
    tiny = 1e-14 if sweep.base.dtype == torch.float64 else 1e-10
    assert_effects_within(ours, sweep, cap, relative, tiny)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("r", [0, 1, 5, 64, 70, 512])
def test_ranks(precision: str, r: int) -> None:
    check(make(P=5, T=37, V=1031, r=r, mean=True, device="cuda"), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("P", "T", "V", "G", "K"), [(1, 1, 1, 1, 0), (33, 131, 517, 7, 3), (3, 100, 50257, 2, 2)])
@pytest.mark.parametrize("whole", [False, True])
def test_shapes(precision: str, P: int, T: int, V: int, G: int, K: int, whole: bool) -> None:
    check(make(P, T, V, r=64, G=G, K=K, scale=whole, mean=whole, device="cuda"), precision)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_caps(dtype: torch.dtype, cap: float | None) -> None:
    for scale in (False, True):
        sweep = make(P=5, T=40, V=1000, r=64, G=2, K=2, scale=scale, mean=True, dtype=dtype, device="cuda", cap=cap)
        check(sweep, cap=cap)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("bound", [1e-9, 1e-4, 0.44, 0.46, 14.9, 15.1, 39.9, 40.1, 500.0])
def test_seams(precision: str, cap: float | None, bound: float) -> None:
    """Either side of what each form is good for, and effects that the loss itself would round away."""
    sweep = make(P=5, T=40, V=1000, r=64, K=2, mean=True, device="cuda", cap=cap)
    bounds = bounds_of(sweep.delta, sweep.basis, sweep.group, torch.float64)
    check(sweep._replace(delta=(sweep.delta * (bound / bounds)[..., None]).float()), precision, cap)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_token(precision: str) -> None:
    """It holds all probability, and loses a little of it or all; or it has almost none, and is raised to the top."""
    for height, change in ((25.0, -20.0), (25.0, 1e-6), (-85.0, 100.0)):
        sweep = make(P=3, T=17, V=2000, r=64, mean=True, device="cuda")
        sweep.basis[:, 0], sweep.basis[:, 0, 0] = 0, 1
        sweep.tokens[:], sweep.base[:, 0], sweep.delta[..., 0] = 0, height, change
        sweep.delta[..., 1:] *= 0.01
        check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_huge_logits(precision: str) -> None:
    check(make(P=3, T=17, V=2000, r=64, K=2, mean=True, size=1e4, device="cuda"), precision)


def test_not_finite() -> None:
    sweep = not_finite("cuda")._replace(mean=True)
    check(sweep)
    check(sweep._replace(clean_lse=capped(sweep.base.double(), 30.0).logsumexp(-1)), cap=30.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_group_that_is_not_there_gives_nan(precision: str) -> None:
    sweep = make(P=4, T=3, V=40, r=2, G=2, mean=True, device="cuda")
    sweep.group[:] = torch.tensor([1, 2, 0, -1])
    for result in partial(sweep, precision=precision):
        assert result[[1, 3]].isnan().all()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic(precision: str) -> None:
    sweep = make(P=40, T=200, V=3000, r=64, G=3, mean=True, device="cuda")
    runs = [partial(sweep, precision=precision) for _ in range(3)]
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_host_synchronisation_and_own_stream(precision: str) -> None:
    sweep = make(P=6, T=70, V=900, r=64, G=2, mean=True, device="cuda")
    expected = partial(sweep, precision=precision)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = partial(sweep, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiles(precision: str) -> None:
    sweep = make(P=2, T=5, V=50, r=3, device="cuda")

    def loss(base: torch.Tensor) -> torch.Tensor:
        targets = sweep.tokens[:, 0]
        return ops.sweep_nll(base, sweep.delta, sweep.basis, targets, precision=precision)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(sweep.base), loss(sweep.base), rtol=0, atol=1e-6)


def test_no_cuda_kernel_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of sweep_nll; take backend='triton'"):
        partial(make(P=2, T=5, V=50, r=3, device="cuda"), backend="cuda")
