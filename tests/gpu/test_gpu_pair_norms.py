"""pair_norms on a GPU, every precision, against fp64; and what composition scores make of it."""

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.pair_cases import factors, torch_norms
from support.random_models import random_weights

from pyfastcircuits import composition_scores, ops
from pyfastcircuits.circuits.head_factors import triangle
from pyfastcircuits.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32", "bf16"]
SHAPES = [(5, 6, 4, 7, 3), (1, 1, 1, 1, 1), (33, 47, 64, 768, 64), (3, 2, 300, 40, 130)]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = factors(*shape, dtype)
    return left.cuda(), right.cuda()


def check(left: torch.Tensor, right: torch.Tensor, precision: str) -> None:
    ours = ops.pair_norms(left, right, precision=precision)
    assert ours.dtype == (torch.float64 if left.dtype == torch.float64 else torch.float32)
    if precision == "bf16":  # exact for the rounded factors; their rounding is the caller's choice
        left, right = left.bfloat16(), right.bfloat16()
    exact = reference.pair_norms(left, right)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        theirs = torch_norms(left.to(ours.dtype), right.to(ours.dtype))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    # TF32 may be cut off after 10 bits; tensor cores add up what they multiply with less care than fp32 has.
    rounding = {"tf32": 2**-9, "bf16": 1e-5}[precision] if precision != "ieee" else 20 * torch.finfo(ours.dtype).eps
    tiny = max(rounding, 1e-5) if left.dtype == torch.bfloat16 else rounding
    assert_as_accurate(ours, theirs, exact, tiny * float(exact.max()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(precision: str, shape: tuple[int, ...]) -> None:
    check(*on_gpu(*shape), precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(*on_gpu(*shape, dtype=dtype), "ieee")


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 2), (3, 0, 2, 4, 2), (3, 2, 0, 4, 2), (3, 2, 2, 0, 2), (3, 2, 2, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    ours = ops.pair_norms(*on_gpu(*shape))
    assert torch.equal(ours, torch.zeros(shape[0], shape[1], device="cuda"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_pairs_before_a_bound(precision: str) -> None:
    left, right = on_gpu(50, 60, 33, 70, 40)
    before = torch.arange(60, device="cuda") * 7 % 53 - 1
    whole = ops.pair_norms(left, right, precision=precision)
    ours = ops.pair_norms(left, right, before=before, precision=precision)
    assert torch.equal(ours, whole * (torch.arange(50, device="cuda")[:, None] < before))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_inf_and_zero_stay_in_their_pairs(precision: str) -> None:
    left, right = on_gpu(6, 5, 5, 30, 3)
    left[1, 2, 3] = torch.nan
    left[2] = 0
    right[4, 0, 0] = torch.inf
    ours = ops.pair_norms(left, right, precision=precision)
    assert ours[1].isnan().all()
    assert ours[2, :4].tolist() == [0, 0, 0, 0]
    assert not ours[:, 4].isfinite().any()
    assert ours[[0, 2, 3, 4, 5], :4].isfinite().all()


def test_not_contiguous() -> None:
    left, right = on_gpu(9, 8, 12, 40, 14)
    whole = ops.pair_norms(left, right)
    wide = torch.full((9, 24, 80), torch.nan, device="cuda")
    wide[:, ::2, ::2] = left
    ours = ops.pair_norms(wide[:, ::2, ::2], right.mT.contiguous().mT)
    assert torch.equal(ours, whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_and_no_product_in_memory(precision: str) -> None:
    left, right = on_gpu(132, 132, 64, 768, 64)
    first = ops.pair_norms(left, right, precision=precision)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(ops.pair_norms(left, right, precision=precision), first)
    copies = left.nbytes + right.nbytes
    assert torch.cuda.max_memory_allocated() - before < copies + 2**20 < (132 * 64) ** 2 * 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_host_synchronisation_and_own_stream(precision: str) -> None:
    left, right = on_gpu(20, 30, 40, 100, 50)
    before = torch.arange(30, device="cuda")
    expected = ops.pair_norms(left, right, before=before, precision=precision)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = ops.pair_norms(left, right, before=before, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_compiles() -> None:
    left, right = on_gpu(4, 5, 3, 7, 2)
    compiled = torch.compile(lambda a, b: ops.pair_norms(a, b) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(left, right), ops.pair_norms(left, right) * 2)


def test_gradients() -> None:
    left, right = (x.requires_grad_() for x in on_gpu(4, 5, 3, 7, 2, dtype=torch.float64))
    before = torch.tensor([4, 0, 2, 3, 1], device="cuda")
    assert torch.autograd.gradcheck(lambda a, b: ops.pair_norms(a, b, before=before), (left, right))


def test_what_there_is_not() -> None:
    left, right = on_gpu(4, 5, 3, 7, 2)
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of pair_norms"):
        ops.pair_norms(left, right, backend="cuda")
    with pytest.raises(ValueError, match="route='gram'"):
        ops.pair_norms(left, right, route="gram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triangles(dtype: torch.dtype) -> None:
    W = torch.randn(4, 300, 64, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    W[1, :, 3] = W[1, :, 5]  # a singular Gram matrix
    R = triangle(W).double()
    torch.testing.assert_close(R.mT @ R, W.double().mT @ W.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("kv", [2, 4])
def test_composition_scores(kind: str, kv: int) -> None:
    weights = random_weights(layers=3, kv=kv)
    exact = composition_scores(weights, kind)
    torch.testing.assert_close(composition_scores(weights.to("cuda"), kind).cpu(), exact)
    ours = composition_scores(weights.to(torch.float32).to("cuda"), kind).cpu()
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-6)
