"""target_ranks on a GPU against fp64."""

import pytest
import torch
from support.sweep_cases import Sweep, make, not_finite, whole_numbers

from pyfastcircuits import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32", "bf16"]
SHAPES = [(0, 4, 9, 2, 1), (1, 1, 1, 0, 1), (33, 131, 517, 70, 7), (9, 300, 50257, 64, 2), (5, 37, 1031, 512, 1)]


def public(s: Sweep, precision: str = "ieee", backend: str = "auto") -> torch.Tensor:
    call = (s.base, s.delta, s.basis, s.tokens[:, 0])
    return ops.target_ranks(*call, group=s.group, precision=precision, backend=backend)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_ties(precision: str, shape: tuple[int, int, int, int, int]) -> None:
    """Small integers are exact in every arithmetic."""
    s = whole_numbers(*shape, device="cuda")
    assert torch.equal(public(s, precision), public(s, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    s = whole_numbers(5, 40, 1000, 64, 2, dtype, "cuda")
    assert torch.equal(public(s), public(s, backend="reference"))


def test_normal_numbers() -> None:
    """Between the ranks that rounding allows."""
    s = make(P=9, T=70, V=3000, r=64, G=3, device="cuda")
    logits = s.base.double() + s.delta.double() @ s.basis.double()[s.group]
    target = logits.gather(-1, s.tokens.expand(9, -1, -1))
    others = torch.arange(3000, device="cuda") != s.tokens
    ours = public(s)
    assert (ours >= ((logits > target + 1e-4) & others).sum(-1)).all()
    assert (ours <= ((logits > target - 1e-4) & others).sum(-1)).all()


def test_not_finite() -> None:
    s = not_finite("cuda")
    thresholds = torch.zeros(3, 6, dtype=torch.float64, device="cuda")
    ours, theirs = (
        ops.rank_partial(s.base, s.delta, s.basis, s.tokens[:, 0], thresholds, group=s.group, backend=backend)
        for backend in ("auto", "reference")
    )
    assert torch.equal(ours, theirs)


def test_what_is_not_there_gives_minus_one() -> None:
    s = make(P=4, T=3, V=40, r=2, G=2, device="cuda")
    s.group[:] = torch.tensor([1, 2, 0, -1])
    s.tokens[1] = 40
    expected = [[False, True, False], [True] * 3, [False, True, False], [True] * 3]
    assert (public(s) == -1).tolist() == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_no_host_synchronisation_and_own_stream(precision: str) -> None:
    s = make(P=40, T=200, V=3000, r=64, G=3, device="cuda")
    expected = public(s, precision)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = public(s, precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_compiles() -> None:
    s = make(P=2, T=5, V=50, r=3, device="cuda")
    compiled = torch.compile(lambda base: public(s._replace(base=base)) * 2, fullgraph=True)
    assert torch.equal(compiled(s.base), public(s) * 2)


def test_no_cuda_kernel_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of target_ranks; take backend='triton'"):
        public(make(P=2, T=5, V=50, r=3, device="cuda"), backend="cuda")
