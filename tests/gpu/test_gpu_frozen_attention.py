"""frozen_attention on a GPU, every precision, against fp64."""

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.attention_cases import Attention, eager, exact, forward, make, tiny

from pyfastcircuits import ops
from pyfastcircuits.kernels.frozen_attention import frozen_attention_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRECISIONS = ["ieee", "tf32", "bf16"]
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (3, 2, 4, 2, 300, 64, 64), (5, 1, 6, 6, 129, 40, 19), (2, 1, 2, 1, 70, 200, 256)]


def check(call: Attention, precision: str) -> None:
    out, lse = frozen_attention_triton(*call, precision)
    if precision == "bf16":  # exact for the rounded factors but for the rounding of weights
        call = call._replace(
            **{name: getattr(call, name).bfloat16().to(getattr(call, name)) for name in ("q", "k", "values")}
        )
        if call.lse is not None:
            call = call._replace(lse=frozen_attention_triton(*forward(call), "bf16")[1])
            out = frozen_attention_triton(*call, "bf16")[0]
    truth = exact(call)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        theirs = eager(call)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    # TF32 may be cut off after 10 bits, in the scores and again in the weights.
    loose = {"ieee": 1.0, "tf32": 2**-8 / 1e-6, "bf16": 2**-7 / 1e-6}[precision]
    assert_as_accurate(out, theirs[0], truth[0], loose * tiny(call) * float(1 + call.values.abs().max()))
    if call.lse is None:
        assert_as_accurate(lse, theirs[1], truth[1], (2**-8 if precision == "tf32" else 4e-6) * 8)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes(precision: str, shape: tuple[int, ...], whole: bool, transposed: bool) -> None:
    check(make(*shape, whole=whole, transposed=transposed, device="cuda"), precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_dtypes(dtype: torch.dtype, transposed: bool) -> None:
    check(make(dtype=dtype, whole=True, transposed=transposed, device="cuda"), "ieee")
    check(make(dtype=dtype, softcap=2.0, window=50, transposed=transposed, device="cuda"), "ieee")


@pytest.mark.parametrize("window", [1, 64, 100])
@pytest.mark.parametrize("softcap", [None, 0.01, 50.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_windows_and_softcap(window: int, softcap: float | None, transposed: bool) -> None:
    check(make(T=300, window=window, softcap=softcap, transposed=transposed, device="cuda"), "ieee")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_huge_scores_sum_to_one(precision: str) -> None:
    call = make(size=1e4, device="cuda")
    out = ops.frozen_attention(call.q, call.k, torch.ones_like(call.values), precision=precision)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-2 if precision == "bf16" else 2e-3)


def test_padding() -> None:
    call = make(whole=True, device="cuda")
    call.mask[0, :70], call.mask[1] = False, False
    check(call, "ieee")
    out = frozen_attention_triton(*call, "ieee")[0]
    assert (out[:, 1] == 0).all()
    values = torch.where(call.mask[None, :, None, :, None], call.values, torch.nan)
    assert torch.equal(frozen_attention_triton(*call._replace(values=values), "ieee")[0], out)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_and_no_pattern_in_memory(precision: str) -> None:
    call = make(3, 1, 12, 12, 2048, 64, 64, device="cuda")
    first = ops.frozen_attention(call.q, call.k, call.values, precision=precision)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(ops.frozen_attention(call.q, call.k, call.values, precision=precision), first)
    assert torch.cuda.max_memory_allocated() - before < first.nbytes + call.values.nbytes + 2**24 < 12 * 2048**2 * 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_host_synchronisation_and_own_stream(precision: str) -> None:
    call = make(whole=True, device="cuda")
    expected = frozen_attention_triton(*call, precision)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = frozen_attention_triton(*call, precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_gradients_and_compile() -> None:
    call = make(S=1, T=9, r=3, s=2, whole=True, dtype=torch.float64, device="cuda")
    values = call.values.requires_grad_()

    def attend(v: torch.Tensor) -> torch.Tensor:
        return ops.frozen_attention(call.q, call.k, v, pre=call.pre, post=call.post, mask=call.mask, window=4)

    assert torch.autograd.gradcheck(attend, (values,))
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(values), attend(values))
