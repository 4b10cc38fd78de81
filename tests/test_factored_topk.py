"""factored_topk against the materialised product: every tier, exact where sums are, ties by row and column.

Factors of small integers make every product exact in all dtypes and equal entries frequent: results must be those of
the reference to the bit, places included.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate

import pyfastcircuits as fc
from pyfastcircuits.ops import factored_topk, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def integers(N, M, r, dtype=torch.float32, high=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randint(1 - high, high, shape, generator=g).to(dtype) for shape in ((N, r), (r, M)))
    return A, B, torch.randint(-9, 10, (N,), generator=g).to(dtype)


def normal(N, M, r, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, r, generator=g).to(dtype), torch.randn(r, M, generator=g).to(dtype)


def screens(dtype):
    return ("none", "auto", "bf16") if dtype == torch.float32 and _bf16_in_force() else ("none", "auto")


def _bf16_in_force():
    return fc.build_info()["cpu_tier"].endswith("_bf16")


def assert_same(ours, expected):
    for name, mine, theirs in zip(ours._fields, ours, expected, strict=True):
        assert torch.equal(mine.double(), theirs.double()), name


def check(A, B, k, largest=True, per_row=False, shift=None):
    """For one k or several: the best k are the first k of the best."""
    several = sorted({k} if isinstance(k, int) else k)
    expected = reference.factored_topk(A, B, several[-1], largest, per_row, shift)
    for one in several:
        for screen in screens(A.dtype):
            ours = factored_topk(A, B, one, largest=largest, per_row=per_row, shift=shift, screen=screen)
            assert ours.values.dtype == (torch.float64 if A.dtype == torch.float64 else torch.float32)
            assert ours.rows.dtype == ours.columns.dtype == torch.int64
            assert_same(ours, [x[..., :one] for x in expected])


SHAPES = [(101, 107, 17), (1, 500, 3), (500, 1, 3), (1, 1, 1), (37, 97, 0), (9, 1201, 129)]


@pytest.mark.matrix(dtype=DTYPES, shape=SHAPES, shifted=[False, True], largest=[True, False])
def test_equals_the_reference_where_sums_are_exact(tier, dtype, shape, shifted, largest):
    A, B, shift = integers(*shape, dtype=dtype)
    N, M, _ = shape
    for per_row, count in ((False, N * M), (True, M)):
        several = {1, min(7, count), min(60, count), count}
        check(A, B, several, largest, per_row, shift if shifted else None)


@pytest.mark.matrix(dtype=DTYPES, largest=[True, False], per_row=[True, False])
def test_generic_factors(tier, dtype, largest, per_row):
    """Values as accurate as torch's, at places where the exact values are; nothing better is missing."""
    A, B = normal(203, 411, 37, dtype)
    k = 25
    exact = A.double() @ B.double()
    wide = [x if dtype == torch.float64 else x.float() for x in (A, B)]
    theirs = wide[0] @ wide[1]
    for screen in screens(dtype):
        values, rows, columns = factored_topk(A, B, k, largest=largest, per_row=per_row, screen=screen)
        found = theirs.index_put((rows, columns), values.to(theirs))  # torch's error is that of the whole row
        assert_as_accurate(found, theirs, exact, 1e-13)
        sign = 1 if largest else -1
        assert (sign * values).diff(dim=-1).le(0).all()
        chosen = torch.zeros_like(exact, dtype=torch.bool)
        chosen[rows, columns] = True
        assert int(chosen.sum()) == values.numel()
        rounding = 2 * (theirs - exact).abs().max() + 1e-13
        missed = torch.where(chosen, -torch.inf, sign * exact)
        missed = missed.amax(1) if per_row else missed.max()
        assert (missed <= (sign * values)[..., -1].double() + 2 * rounding).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    N, M, r = (data.draw(st.integers(low, high)) for low, high in ((1, 150), (1, 300), (0, 40)))
    per_row, largest, shifted = (data.draw(st.booleans()) for _ in range(3))
    k = data.draw(st.integers(1, M if per_row else N * M))
    A, B, shift = integers(N, M, r, high=data.draw(st.integers(1, 5)), seed=N * M + r)
    check(A, B, k, largest, per_row, shift if shifted else None)


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -2.0])
@pytest.mark.parametrize("k", [1, 50, 20_000])
def test_of_equal_entries_the_first_win(tier, value, k):
    A, B = torch.full((300, 4), value), torch.ones(4, 200)
    check(A, B, k)
    check(A, B, k, largest=False)
    check(A, B, min(k, 200), per_row=True)


def test_signed_zeros_are_equal():
    A, B = torch.ones(40, 1), torch.zeros(1, 60)
    B[:, ::2] = -0.0
    A[::3] = -1
    for largest in (True, False):
        values, rows, columns = factored_topk(A, B, 150, largest=largest)
        assert torch.equal(rows * 60 + columns, torch.arange(150))
        assert torch.equal(values.signbit(), torch.zeros(150, dtype=torch.bool))


def test_a_matrix_full_of_ties_is_not_quadratic():
    """40 million equal entries, a fourth of them wanted; what is beaten by place alone must not pile up."""
    A, B = torch.zeros(8000, 1), torch.zeros(1, 5000)
    _, rows, columns = factored_topk(A, B, 1_000_000)
    assert torch.equal(rows * 5000 + columns, torch.arange(1_000_000))
    columns = factored_topk(A, B, 3, per_row=True).columns
    assert torch.equal(columns, torch.arange(3).expand(8000, 3))


@pytest.mark.parametrize("direction", ["ascending", "descending"])
def test_sorted_entries(tier, direction):
    """Ascending entries make every one a candidate when it is met."""
    A, B = torch.arange(400.0)[:, None] * 300, torch.ones(2, 300)
    A = torch.cat((A, torch.ones(400, 1)), 1)
    B[1] = torch.arange(300.0)
    if direction == "descending":
        A, B = A.flip(0), B.flip(1)
    check(A, B, 33)
    check(A, B, 33, per_row=True)


def test_strided_inputs(tier):
    A, B, shift = integers(70, 130, 12)
    wide_A, wide_B = torch.full((140, 24), torch.nan), torch.full((12, 260), torch.nan)
    wide_A[::2, ::2], wide_B[:, ::2] = A, B
    views = (
        (wide_A[::2, ::2], wide_B[:, ::2]),
        (A.T.contiguous().T, B.T.contiguous().T),
        (A[:1].expand(70, -1), B),
        (A, B[:, :1].expand(-1, 130)),
    )
    for left, right in views:
        for per_row in (False, True):
            check(left, right, 40, per_row=per_row, shift=torch.stack((shift, shift), 1)[:, 0])


def test_results_do_not_depend_on_threads(tier):
    A, B = normal(500, 700, 16)
    for options in ({"k": 3000}, {"k": 20, "per_row": True}, {"k": 5, "largest": False}):
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(factored_topk(A, B, **options))
        for other in outcomes[1:]:
            assert_same(other, outcomes[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_columns_than_are_packed_at_once(dtype):
    A, B, shift = integers(11, 1600, 11_000, dtype, high=2)
    check(A, B, (60, 5000), shift=shift)
    check(A, B, (1, 7, 800, 1300, 1600), per_row=True, shift=shift)
    check(A, B, (7, 1600), largest=False, per_row=True)


def test_shift_comes_in_any_dtype():
    A, B, shift = integers(30, 40, 5)
    expected = factored_topk(A, B, 20, shift=shift)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert_same(factored_topk(A, B, 20, shift=shift.to(dtype)), expected)


def test_products_that_overflow(tier):
    """Infinities are ordinary values; NaN is worse than everything else, whichever way is searched."""
    A = torch.tensor([[1e30, 0.0], [1e30, 1e30], [1.0, 1.0], [-1e30, 0.0]])
    B = torch.tensor([[1e30, 1.0, 2.0], [-1e30, 1.0, 3.0]])
    inf = torch.inf
    spoiled = torch.nan if tier == "baseline" else inf  # inf - inf; a fused multiply-add rounds no product
    product = torch.tensor([[inf, 1e30, 2e30], [spoiled, 2e30, 5e30], [0, 2, 5], [-inf, -1e30, -2e30]])
    for sign in (1, -1):
        key = (sign * product).nan_to_num(-3.4e38, inf, -3e38).double()  # NaN below -inf
        for screen in screens(torch.float32):
            options = {"largest": sign == 1, "screen": screen}
            order = key.flatten().sort(descending=True, stable=True).indices
            ours = factored_topk(A, B, 12, **options)
            assert torch.equal(ours.rows * 3 + ours.columns, order)
            torch.testing.assert_close(ours.values, product.flatten()[order], equal_nan=True)
            rows = factored_topk(A, B, 3, per_row=True, **options)
            assert torch.equal(rows.columns, key.sort(descending=True, stable=True).indices)
    below = factored_topk(torch.full((50, 1), 1e30), torch.full((1, 100), -1e30), 60)
    assert torch.equal(below.values, torch.full((60,), -inf))
    assert torch.equal(below.rows * 100 + below.columns, torch.arange(60))


def close_entries(g):
    """All entries within bfloat16's rounding of each other."""
    return 1 + torch.rand(300, 8, generator=g) * 2**-10, 1 + torch.rand(8, 400, generator=g) * 2**-10


def huge_range(g):
    A, B = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    return A * 10 ** (torch.rand(300, 8, generator=g) * 40 - 20), B * 10 ** (torch.rand(8, 400, generator=g) * 30 - 15)


def cancelling(g):
    """Large products that cancel: what is left is far below their rounding."""
    A, B, C = torch.randn(300, 4, generator=g), torch.randn(4, 400, generator=g), torch.randn(4, 400, generator=g)
    return torch.cat((A, -A), 1), torch.cat((B, B * (1 + C * 2**-11)), 0)


def denormals(g):
    A, B = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    return A * 1e-20, B * 1e-20


def denormal_factors(g):
    A, B = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    return A * 1e-39, B * 1e30


def beyond_bfloat16(g):
    """float32 values that round to infinity in bfloat16, against small ones."""
    A, B = torch.rand(300, 8, generator=g), torch.rand(8, 400, generator=g)
    A[::7, 3] = torch.finfo(torch.float32).max
    B[3] *= 1e-20
    B[:, ::11] *= -1
    return A, B


def overflowing(g):
    A, B = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    return A * 1e25, B * 1e15


def one_large_row(g):
    A, B = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    A[5] *= 1e6
    B[:, 7] *= 1e4
    return A, B


ADVERSARIES = [
    close_entries,
    huge_range,
    cancelling,
    denormals,
    denormal_factors,
    beyond_bfloat16,
    overflowing,
    one_large_row,
]


@pytest.mark.bf16_dots
@pytest.mark.matrix(make=ADVERSARIES, largest=[True, False], shift=[None, 0.0, 1.0, 1e5, 1e38])
def test_a_screen_changes_nothing(make, largest, shift):
    """Repeated far enough that thresholds stand long before the last entries come."""
    A, B = make(torch.Generator().manual_seed(1))
    A, B = A.repeat(4, 1)[torch.randperm(1200, generator=torch.Generator().manual_seed(2))], B.repeat(1, 3)
    shift = None if shift is None else torch.rand(1200, generator=torch.Generator().manual_seed(3)) * shift
    for k in (1, 10, 300):
        options = {"largest": largest, "shift": shift}
        for per_row in (False, True):
            plain = factored_topk(A, B, k, per_row=per_row, screen="none", **options)
            screened = factored_topk(A, B, k, per_row=per_row, screen="bf16", **options)
            assert not plain.values.isnan().any()
            assert_same(screened, plain)


@pytest.mark.parametrize("make", [close_entries, cancelling])
def test_bfloat16_alone_would_be_wrong(make):
    """What the screen has to see through: the best entries of the rounded factors are others."""
    A, B = make(torch.Generator().manual_seed(1))
    exact = factored_topk(A, B, 20, screen="none")
    rounded = factored_topk(A.bfloat16(), B.bfloat16(), 20)
    assert not set((exact.rows * 400 + exact.columns).tolist()) <= set((rounded.rows * 400 + rounded.columns).tolist())


@pytest.mark.bf16_dots
def test_the_screen_allows_for_all_that_rounding_can_take():
    """The best column is seen lower, by nearly all that rounding can take, than one that is hardly worse."""
    rounds_down = 1 + 2**-8 - 2**-20  # to 1
    A, B = torch.full((2000, 64), rounds_down), torch.full((64, 3000), -1.0)
    B[:, 100] = rounds_down - 2**-15
    B[:, 2900] = rounds_down
    plain, screened = (factored_topk(A, B, 1, screen=screen) for screen in ("none", "bf16"))
    assert_same(screened, plain)
    assert plain.rows.tolist() == [0]
    assert plain.columns.tolist() == [2900]


def test_a_screen_that_is_not_there_says_why(monkeypatch):
    A, B = normal(4, 5, 3)
    for dtype in ("float64", "bfloat16"):
        left, right = (x.to(getattr(torch, dtype)) for x in (A, B))
        with pytest.raises(RuntimeError, match=f"screen is 'bf16' but A is {dtype}; .* for float32 factors"):
            factored_topk(left, right, 2, screen="bf16")
    tier = fc.build_info()["cpu_tiers"][0]
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", tier)
    with pytest.raises(RuntimeError, match=rf"screen='bf16' needs .* the tier in force is {tier}"):
        factored_topk(A, B, 2, screen="bf16")


@pytest.mark.processes
def test_scratch_is_written_before_it_is_read():
    """glibc fills what it hands out with NaN patterns."""
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]}\n"
        "import test_factored_topk as t\n"
        "for shape in ((37, 61, 5), (9, 5, 0), (50, 200, 3)):\n"
        "    A, B, shift = t.integers(*shape)\n"
        "    for k, per_row in ((1, False), (30, False), (4, True)):\n"
        "        t.check(A, B, k, per_row=per_row), t.check(A, B, k, False, per_row, shift)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MALLOC_PERTURB_": "0"})
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MALLOC_PERTURB_": "128"})


BAD = {
    "A": ({"A": torch.ones(3)}, ValueError, r"A has shape \[3\], expected \[N, r\]"),
    "B": ({"B": torch.ones(2, 3, 5)}, ValueError, r"B has shape \[2, 3, 5\], expected \[r, M\]"),
    "inner": ({"B": torch.ones(4, 5)}, ValueError, r"A has shape \[4, 3\] and B \[4, 5\]: their inner dimensions"),
    "half": ({"A": torch.ones(4, 3).half()}, TypeError, "A has dtype torch.float16, expected one of torch.float32"),
    "dtypes": ({"B": torch.ones(3, 5).double()}, TypeError, "B has dtype torch.float64, but A has torch.float32"),
    "device": ({"B": torch.ones(3, 5, device="meta")}, ValueError, "B is on meta, but A is on cpu"),
    "k 0": ({"k": 0}, ValueError, r"k is 0, expected an integer from 1 to 20 \(a 4 x 5 matrix\)"),
    "k all": ({"k": 21}, ValueError, "k is 21, expected an integer from 1 to 20"),
    "k row": ({"k": 6, "per_row": True}, ValueError, r"k is 6, expected an integer from 1 to 5 \(rows of 5\)"),
    "k type": ({"k": 2.0}, TypeError, r"k is 2.0, expected an integer"),
    "k bool": ({"k": True}, TypeError, "k is True, expected an integer"),
    "no entries": ({"A": torch.ones(0, 3)}, ValueError, r"k is 2, expected an integer from 1 to 0 \(a 0 x 5 matrix\)"),
    "no rows": ({"A": torch.ones(0, 3), "per_row": True}, ValueError, r"A has shape \[0, 3\]: no rows"),
    "shift": ({"shift": torch.ones(3)}, ValueError, r"shift has shape \[3\], expected \[4\]"),
    "shift type": ({"shift": torch.ones(4).long()}, TypeError, "shift has dtype torch.int64, expected floating point"),
    "shift device": ({"shift": torch.ones(4, device="meta")}, ValueError, "shift is on meta, but A is on cpu"),
    "screen": ({"screen": "fp8"}, ValueError, "screen is 'fp8', expected one of auto, none, bf16"),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of auto"),
    "NaN": ({"A": torch.tensor([[1.0, torch.nan, 2]] * 4)}, ValueError, r"A\[0, 1\] is nan, expected finite values"),
    "inf": ({"B": torch.full((3, 5), torch.inf)}, ValueError, r"B\[0, 0\] is inf, expected finite values"),
    "shift NaN": ({"shift": torch.full((4,), torch.nan)}, ValueError, r"shift\[0\] is nan, expected finite values"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        factored_topk(**({"A": torch.ones(4, 3), "B": torch.ones(3, 5), "k": 2} | change))


def test_k_beyond_the_limit():
    A, B = torch.ones(5000, 1), torch.ones(1, 70_000)
    with pytest.raises(ValueError, match="k is 16777217, but backend='cpu' finds at most 16777216 entries"):
        factored_topk(A, B, 2**24 + 1)
    with pytest.raises(ValueError, match="k is 65537, but backend='cpu' finds at most 65536 entries a row"):
        factored_topk(A[:2], B, 2**16 + 1, per_row=True)


def test_errors_of_the_bare_op():
    A, B = torch.ones(4, 3), torch.ones(3, 5)
    for arguments, message in (
        ((A[0], B, 2, True, False, None, "none"), r"A has shape \[3\], expected \[N, r\]"),
        ((A, B[0], 2, True, False, None, "none"), r"B has shape \[5\], expected \[r, M\]"),
        ((A, B[:2], 2, True, False, None, "none"), "their inner dimensions r differ"),
        ((A, B.double(), 2, True, False, None, "none"), "B has dtype torch.float64, but A has torch.float32"),
        (
            (A.half(), B.half(), 2, True, False, None, "none"),
            "A has dtype torch.float16, expected torch.float32, torch.float64 or torch.bfloat16",
        ),
        ((A, B, 0, True, False, None, "none"), "k is 0, expected 1 to 20"),
        ((A, B, 6, True, True, None, "none"), "k is 6, expected 1 to 5"),
        ((A, B, 2, True, False, torch.ones(3), "none"), r"shift has shape \[3\], expected \[4\]"),
        ((A, B, 2, True, False, None, "fp8"), "screen is 'fp8'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyfastcircuits.factored_topk(*arguments)


@pytest.mark.processes
def test_opcheck_and_compile():
    A, B, shift = integers(9, 70, 4)
    for per_row, shifted in ((False, None), (True, shift)):
        call = (A, B, 5, True, per_row, shifted, "auto")
        torch.library.opcheck(torch.ops.pyfastcircuits.factored_topk.default, call)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(left, right, offset, per_row):
            return factored_topk(left * 2, right, 5, per_row=per_row, shift=offset)

        assert_same(compiled(A, B, shifted, per_row), factored_topk(A * 2, B, 5, per_row=per_row, shift=shifted))


def test_reference_backend():
    A, B, shift = integers(9, 70, 4)
    assert_same(factored_topk(A, B, 30, shift=shift, backend="reference"), factored_topk(A, B, 30, shift=shift))
