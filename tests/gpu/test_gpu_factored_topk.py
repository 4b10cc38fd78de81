"""factored_topk on a GPU, both backends, against fp64."""

import pytest
import torch
from support.topk_cases import assert_best, close_calls, normal, whole_numbers

from pyfastcircuits import ops
from pyfastcircuits.ops import reference
from pyfastcircuits.shapes import MOST, MOST_PER_ROW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMS = [("triton", "none"), ("triton", "bf16"), ("cuda", "none")]
BACKENDS = ["triton", "cuda"]
SHAPES = [(1, 1, 1), (3, 5, 0), (1, 3333, 20), (1500, 1, 3), (1311, 2590, 70)]


def raw(backend: str) -> object:
    """The op that waits for nothing: the typed one reads its factors to find what is not finite."""
    if backend == "cuda":
        return torch.ops.pyfastcircuits.factored_topk
    from pyfastcircuits.kernels.factored_topk import factored_topk_triton

    return factored_topk_triton


@pytest.mark.parametrize(("backend", "screen"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_shapes_and_ties(backend: str, screen: str, shape: tuple[int, int, int], largest: bool, per_row: bool) -> None:
    A, B, shift = whole_numbers(*shape, device="cuda")
    most = shape[1] if per_row else shape[0] * shape[1]
    for k in {1, min(100, most), min((MOST_PER_ROW if per_row else MOST)[backend], most)}:
        options = {"largest": largest, "per_row": per_row, "shift": shift}
        ours = ops.factored_topk(A, B, k, screen=screen, backend=backend, **options)
        for mine, exact in zip(ours, reference.factored_topk(A, B, k, **options), strict=True):
            assert torch.equal(mine, exact.to(mine.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("rank", [64, 200])
def test_dtypes(backend: str, dtype: torch.dtype, per_row: bool, rank: int) -> None:
    A, B, shift = normal(700, 3000, rank, dtype, "cuda")
    for largest in (True, False):
        ours = ops.factored_topk(A, B, 100, largest=largest, per_row=per_row, shift=shift, backend=backend)
        assert ours.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_best(ours, A, B, largest, per_row, shift)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("case", [normal, close_calls])
def test_a_screen_and_the_backend_change_nothing(case: object, per_row: bool) -> None:
    """float32 entries are the same chain of multiply-adds everywhere."""
    A, B, shift = case(900, 4000, 64, device="cuda")
    for k in (1, 50, 1000):
        options = {"per_row": per_row, "shift": shift}
        full, *others = (ops.factored_topk(A, B, k, screen=s, backend=b, **options) for b, s in FORMS)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(other, full, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [True, False])
def test_entries_that_are_all_equal(backend: str, per_row: bool) -> None:
    A, B = torch.zeros(2000, 8, device="cuda"), torch.ones(8, 3000, device="cuda")
    A[::2] = -0.0
    values, rows, columns = ops.factored_topk(A, B, 1000, per_row=per_row, backend=backend)
    assert (values == 0).all()
    expected = torch.arange(1000, device="cuda")
    assert torch.equal(columns, expected.expand_as(columns))
    assert torch.equal(rows, torch.arange(2000, device="cuda")[:, None].expand_as(rows) if per_row else 0 * expected)


@pytest.mark.parametrize(("backend", "screen"), FORMS)
@pytest.mark.parametrize("per_row", [True, False])
def test_a_whole_vocabulary(backend: str, screen: str, per_row: bool) -> None:
    """More entries than int32 counts, most of the best in the last rows; checked by their values and by a count."""
    A, B, _ = normal(50257, 50257, 64, device="cuda")
    A[-300:] *= 1.5
    k = 10 if per_row else 5000
    values, rows, columns = ops.factored_topk(A, B, k, per_row=per_row, screen=screen, backend=backend)
    made = (A[rows.flatten()].double() * B[:, columns.flatten()].T.double()).sum(1).view_as(values)
    torch.testing.assert_close(values.double(), made, rtol=0, atol=1e-4)
    last = values[..., -1:].double()
    reached = 0
    for first in range(0, len(A), 2048):
        entries = A[first : first + 2048] @ B
        bar = last[first : first + 2048] if per_row else last
        reached += int((entries > bar + 1e-4).sum())
        count = (entries >= bar - 1e-4).sum(1)
        assert not per_row or (count >= k).all()
    assert reached <= (len(A) if per_row else 1) * k


@pytest.mark.parametrize(("backend", "screen"), FORMS)
def test_deterministic(backend: str, screen: str) -> None:
    A, B, _ = whole_numbers(3000, 5000, 6, device="cuda")
    for per_row in (True, False):
        runs = [ops.factored_topk(A, B, 500, per_row=per_row, screen=screen, backend=backend) for _ in range(3)]
        for others in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize(("backend", "screen"), FORMS)
@pytest.mark.parametrize("per_row", [True, False])
def test_no_host_synchronisation_and_own_stream(backend: str, screen: str, per_row: bool) -> None:
    A, B, shift = normal(500, 3000, 64, device="cuda")
    op = raw(backend)
    expected = op(A, B, 20, True, per_row, shift, screen)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = op(A, B, 20, True, per_row, shift, screen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_bounded(backend: str) -> None:
    """A tenth of the product at most."""
    A, B, _ = normal(50257, 50257, 16, device="cuda")
    for per_row in (True, False):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.factored_topk(A, B, 10, per_row=per_row, backend=backend)
        assert torch.cuda.max_memory_allocated() - before < 1e9


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend: str) -> None:
    A, B, shift = whole_numbers(300, 700, 9, device="cuda")
    wide = torch.full((600, 18), torch.nan, device="cuda")
    wide[::2, ::2] = A
    for per_row in (True, False):
        whole = ops.factored_topk(A, B, 30, per_row=per_row, shift=shift, backend=backend)
        ours = ops.factored_topk(
            wide[::2, ::2],
            B.T.contiguous().T,
            30,
            per_row=per_row,
            shift=shift.repeat_interleave(3)[::3],
            backend=backend,
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


def test_errors() -> None:
    A, B, _ = whole_numbers(40, 2000, 5, device="cuda")
    with pytest.raises(RuntimeError, match=r"screen is 'bf16', which the CUDA C\+\+ kernels do not have"):
        ops.factored_topk(A, B, 3, screen="bf16", backend="cuda")
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"k is 1025, but backend='{backend}' finds at most 1024 entries a row"):
            ops.factored_topk(A, B, 1025, per_row=True, backend=backend)
        with pytest.raises((RuntimeError, ValueError), match=r"k is 80001, expected 1 to 65536"):
            raw(backend)(A, B, 80001, True, False, None, "none")
    with pytest.raises(RuntimeError, match=r"A has shape \[40, 4\] and B \[5, 2000\]"):
        raw("cuda")(A[:, :4], B, 3, True, False, None, "none")
    with pytest.raises(RuntimeError, match=r"shift has shape \[3\], expected \[40\]"):
        raw("cuda")(A, B, 3, True, False, A[:3, 0], "none")
    with pytest.raises(RuntimeError, match="shift is on cpu, but A is on cuda:0"):
        raw("cuda")(A, B, 3, True, False, A[:, 0].cpu(), "none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compiles(backend: str) -> None:
    A, B, shift = whole_numbers(40, 60, 5, device="cuda")
    for per_row in (True, False):
        torch.library.opcheck(raw(backend), (A, B, 3, True, per_row, shift, "none"))
    compiled = torch.compile(lambda a, b: ops.factored_topk(a, b, 9, backend=backend).values * 2, fullgraph=True)
    assert torch.equal(compiled(A, B), ops.factored_topk(A, B, 9, backend=backend).values * 2)
