"""sweep_nll on a GPU, every backend and precision, against fp64."""

import pytest
import torch
from support.sweep_cases import Sweep, assert_partials_as_accurate, eager, exact, make, not_finite, partial

from pyfastcircuits import ops
from pyfastcircuits.kernels.common import rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMS = [("triton", "ieee"), ("triton", "tf32"), ("triton", "bf16"), ("cuda", "ieee")]
EXACT = [("triton", "ieee"), ("cuda", "ieee")]


def check(sweep: Sweep, backend: str, precision: str, tiny: float = 2e-6) -> None:
    ours = partial(sweep, precision=precision, backend=backend)
    if precision != "ieee":
        # Tensor cores cut off what lies below the last digit of the largest term, 8 products or more at a time.
        steps = max(4, sweep.delta.shape[-1] / 8)
        tiny = steps * torch.finfo(torch.float32).eps * float(sweep.base.nan_to_num(0, 0, 0).abs().max().clamp_min(4))
    delta, basis = (rounded(x, precision).to(x) for x in (sweep.delta, sweep.basis))
    truth_of = sweep._replace(delta=delta, basis=basis)  # their rounding is the caller's choice
    assert_partials_as_accurate(ours, eager(truth_of), exact(truth_of), tiny)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
@pytest.mark.parametrize("r", [0, 1, 5, 64, 70, 512])
def test_ranks(backend: str, precision: str, r: int) -> None:
    check(make(P=5, T=37, V=1031, r=r, device="cuda"), backend, precision)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
@pytest.mark.parametrize(("P", "T", "V", "G", "K"), [(1, 1, 1, 1, 0), (33, 131, 517, 7, 3), (9, 300, 50257, 2, 2)])
@pytest.mark.parametrize("whole", [False, True])
def test_shapes(backend: str, precision: str, P: int, T: int, V: int, G: int, K: int, whole: bool) -> None:
    check(make(P, T, V, r=64, G=G, K=K, scale=whole, clean=whole, device="cuda"), backend, precision)


@pytest.mark.parametrize(("backend", "precision"), EXACT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(backend: str, precision: str, dtype: torch.dtype) -> None:
    sweep = make(P=5, T=40, V=1000, r=64, G=2, K=2, scale=True, clean=True, dtype=dtype, device="cuda")
    check(sweep, backend, precision, tiny=1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_cap(backend: str, clean: bool, dtype: torch.dtype) -> None:
    sweep = make(P=5, T=40, V=1000, r=64, G=2, K=2, scale=True, clean=clean, dtype=dtype, device="cuda", cap=30.0)
    ours = partial(sweep, backend=backend, cap=30.0)
    tiny = 1e-13 if dtype == torch.float64 else 2e-6
    assert_partials_as_accurate(ours, eager(sweep, 30.0), exact(sweep, 30.0), tiny)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_huge_logits(backend: str, precision: str) -> None:
    sweep = make(P=3, T=17, V=2000, r=64, K=2, clean=True, size=1e4, device="cuda")
    check(sweep, backend, precision)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_a_huge_logit_loses_nothing(backend: str, precision: str) -> None:
    sweep = make(P=3, T=17, V=200, r=64, device="cuda")
    sweep.base[torch.arange(17), sweep.tokens[:, 0]] = 1e4
    lse, picked, _ = partial(sweep, precision=precision, backend=backend)
    torch.testing.assert_close(lse, picked[..., 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("backend", "precision"), EXACT)
def test_not_finite(backend: str, precision: str) -> None:
    check(not_finite("cuda"), backend, precision)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_a_group_that_is_not_there_gives_nan(backend: str, precision: str) -> None:
    sweep = make(P=4, T=3, V=40, r=2, G=2, clean=True, device="cuda")
    sweep.group[:] = torch.tensor([1, 2, 0, -1])
    lse, _, change = partial(sweep, precision=precision, backend=backend)
    for result in (lse, change):
        assert result[[1, 3]].isnan().all()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_deterministic(backend: str, precision: str) -> None:
    sweep = make(P=40, T=200, V=3000, r=64, G=3, clean=True, device="cuda")
    runs = [partial(sweep, precision=precision, backend=backend) for _ in range(3)]
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_no_host_synchronisation_and_own_stream(backend: str, precision: str) -> None:
    sweep = make(P=6, T=70, V=900, r=64, G=2, clean=True, device="cuda")
    expected = partial(sweep, precision=precision, backend=backend)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = partial(sweep, precision=precision, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_compiles(backend: str, precision: str) -> None:
    sweep = make(P=2, T=5, V=50, r=3, device="cuda")

    def loss(base: torch.Tensor) -> torch.Tensor:
        targets = sweep.tokens[:, 0]
        return ops.sweep_nll(base, sweep.delta, sweep.basis, targets, precision=precision, backend=backend)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(sweep.base), loss(sweep.base), rtol=0, atol=1e-6)
