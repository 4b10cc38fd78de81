"""diagonal_ranks against the materialised product: every tier; equal entries never count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfastcircuits.ops import diagonal_ranks, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def integers(N, M, r, dtype=torch.float32, high=4, seed=0):
    """Exact in every dtype, and full of equal entries."""
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randint(1 - high, high, shape, generator=g).to(dtype) for shape in ((N, r), (r, M)))
    return A, B, torch.randint(0, max(M, 1), (N,), generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(101, 207, 17), (1, 500, 3), (500, 1, 3), (1, 1, 1), (37, 97, 0), (9, 1201, 129)])
def test_equals_the_reference_where_sums_are_exact(tier, dtype, shape):
    A, B, columns = integers(*shape, dtype=dtype)
    ours = diagonal_ranks(A, B, columns=columns)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, reference.diagonal_ranks(A, B, columns))
    square = B[:, :1].repeat(1, len(A))
    square[:, : min(shape[:2])] = B[:, : len(A)]
    assert torch.equal(diagonal_ranks(A, square), reference.diagonal_ranks(A, square, torch.arange(len(A))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chosen_entry_is_made_as_all_others_are(tier, dtype):
    """Every column is there 50 times, in all places of a panel: a sum in another order would count its copies."""
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(64, 100, generator=g).to(dtype), torch.randn(100, 7, generator=g).to(dtype)
    columns = torch.arange(64) * 5 % 350
    ranks = diagonal_ranks(A, B.repeat(1, 50), columns=columns)
    assert (ranks % 50 == 0).all()
    assert torch.equal(ranks // 50, reference.diagonal_ranks(A, B, columns % 7))


def test_generic_factors_lie_between_what_rounding_allows(tier):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(300, 64, generator=g), torch.randn(64, 300, generator=g)
    exact = A.double() @ B.double()
    rounding = 4 * (A @ B - exact).abs().max()
    entry = exact.diagonal()[:, None]
    ranks = diagonal_ranks(A, B)
    assert (ranks >= (exact > entry + rounding).sum(1)).all()
    assert (ranks <= (exact > entry - rounding).sum(1)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 400), st.integers(0, 40), st.integers(1, 5))
def test_any_shape(N, M, r, high):
    A, B, columns = integers(N, M, r, high=high, seed=N + M)
    assert torch.equal(diagonal_ranks(A, B, columns=columns), reference.diagonal_ranks(A, B, columns))


def test_padding_never_counts(tier):
    """Every entry is negative: the zeros that fill a panel are greater."""
    for M in (1, 5, 47, 49):
        A, B = torch.ones(M, 2), -torch.arange(1.0, M + 1).expand(2, -1)
        assert torch.equal(diagonal_ranks(A, B), torch.arange(M))


def test_strided_inputs(tier):
    A, B, columns = integers(70, 130, 12)
    wide_A, wide_B = torch.full((140, 24), torch.nan), torch.full((12, 260), torch.nan)
    wide_A[::2, ::2], wide_B[:, ::2] = A, B
    expected = reference.diagonal_ranks(A, B, columns)
    picked = torch.stack((columns, columns), 1)[:, 0]
    for left, right in ((wide_A[::2, ::2], wide_B[:, ::2]), (A.T.contiguous().T, B.T.contiguous().T)):
        assert torch.equal(diagonal_ranks(left, right, columns=picked), expected)
    assert torch.equal(diagonal_ranks(A, B, columns=columns.int()), expected)


def test_results_do_not_depend_on_threads(tier):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(500, 16, generator=g), torch.randn(16, 500, generator=g)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(diagonal_ranks(A, B))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_columns_than_are_packed_at_once(dtype):
    A, B, columns = integers(11, 1600, 11_000, dtype, high=2)
    assert torch.equal(diagonal_ranks(A, B, columns=columns), reference.diagonal_ranks(A, B, columns))


def test_products_that_overflow(tier):
    """inf - inf is neither greater than anything nor smaller: it never counts."""
    A = torch.tensor([[1e30, 1e30], [1.0, 1.0]])
    B = torch.tensor([[1e30, 1.0, 1e30, -1e30], [-1e30, 1.0, 1.0, -1e30]])
    # row 0: inf - inf, 2e30, inf, -inf; a fused multiply-add rounds no product, so that inf - 1e60 is inf
    row = [0, 1, 0, 2] if tier == "baseline" else [0, 2, 0, 3]
    for column in range(4):
        ranks = diagonal_ranks(A, B, columns=torch.full((2,), column))
        assert ranks.tolist() == [row[column], [2, 1, 0, 3][column]]


def test_no_rows():
    assert diagonal_ranks(torch.ones(0, 3), torch.ones(3, 0)).shape == (0,)
    assert diagonal_ranks(torch.ones(0, 3), torch.ones(3, 5), columns=torch.zeros(0).long()).shape == (0,)


BAD = {
    "A": ({"A": torch.ones(3)}, ValueError, r"A has shape \[3\], expected \[N, r\]"),
    "B": ({"B": torch.ones(3)}, ValueError, r"B has shape \[3\], expected \[r, M\]"),
    "inner": ({"B": torch.ones(4, 4)}, ValueError, "their inner dimensions r differ"),
    "square": ({"B": torch.ones(3, 5)}, ValueError, r"A has shape \[4, 3\] and B \[3, 5\]: not square"),
    "dtype": ({"A": torch.ones(4, 3).half()}, TypeError, "A has dtype torch.float16"),
    "dtypes": ({"B": torch.ones(3, 4).double()}, TypeError, "B has dtype torch.float64, but A has torch.float32"),
    "device": ({"B": torch.ones(3, 4, device="meta")}, ValueError, "B is on meta, but A is on cpu"),
    "columns": ({"columns": torch.zeros(3).long()}, ValueError, r"columns has shape \[3\], expected \[4\]"),
    "columns type": ({"columns": torch.zeros(4)}, TypeError, "columns has dtype torch.float32, expected integers"),
    "columns device": ({"columns": torch.zeros(4, device="meta").long()}, ValueError, "columns is on meta"),
    "columns value": ({"columns": torch.tensor([0, 3, 4, 1])}, IndexError, r"columns\[2\] is 4, expected 0 to 3"),
    "NaN": ({"A": torch.full((4, 3), torch.nan)}, ValueError, r"A\[0, 0\] is nan, expected finite values"),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of auto"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        diagonal_ranks(**({"A": torch.ones(4, 3), "B": torch.ones(3, 4)} | change))


def test_errors_of_the_bare_op():
    A, B, columns = torch.ones(4, 3), torch.ones(3, 5), torch.zeros(4).long()
    for arguments, message in (
        ((A[0], B, columns), r"A has shape \[3\], expected \[N, r\]"),
        ((A, B[:2], columns), "their inner dimensions r differ"),
        ((A, B.double(), columns), "B has dtype torch.float64, but A has torch.float32"),
        (
            (A.half(), B.half(), columns),
            "A has dtype torch.float16, expected torch.float32, torch.float64 or torch.bfloat16",
        ),
        ((A, B, columns[1:]), r"columns has shape \[3\], expected \[4\]"),
        ((A, B, columns.int()), "columns has dtype torch.int32, expected torch.int64"),
        ((A, B, columns - 1), r"columns\[0\] is -1, expected 0 to 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyfastcircuits.diagonal_ranks(*arguments)


@pytest.mark.processes
def test_opcheck_and_compile():
    A, B, columns = integers(9, 70, 4)
    torch.library.opcheck(torch.ops.pyfastcircuits.diagonal_ranks.default, (A, B, columns))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(left, right, chosen):
        return diagonal_ranks(left * 2, right, columns=chosen)

    assert torch.equal(compiled(A, B, columns), diagonal_ranks(A * 2, B, columns=columns))


def test_reference_backend():
    A, B, columns = integers(9, 70, 4)
    assert torch.equal(
        diagonal_ranks(A, B, columns=columns, backend="reference"), diagonal_ranks(A, B, columns=columns)
    )
