"""pair_norms against the materialised products, in fp64: both routes, every CPU tier and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pair_cases import factors, torch_norms

from pyfastcircuits import ops
from pyfastcircuits.ops import reference

pytestmark = pytest.mark.sanitize
ROUTES = ["products", "gram"]


def bare(left, right, route, before=None):
    """One route as it is, nothing mended."""
    if route == "products":
        return torch.ops.pyfastcircuits.pair_norms(left, right, before, "ieee")
    inner = torch.ops.pyfastcircuits.pair_grams(left, [right], None, [], before)[0]
    return inner.sqrt().to(torch.float64 if left.dtype == torch.float64 else torch.float32)


def relative_error(ours, exact):
    return float(((ours.double() - exact).abs() / exact).max())


SHAPES = [(5, 6, 4, 7, 3), (13, 11, 9, 300, 17), (1, 1, 1, 1, 1), (60, 55, 8, 50, 33), (3, 4, 64, 700, 64)]


@pytest.mark.matrix(shape=SHAPES, dtype=[torch.float32, torch.float64, torch.bfloat16], route=ROUTES)
def test_matches_the_products(tier, shape, dtype, route):
    left, right = factors(*shape, dtype)
    exact = reference.pair_norms(left, right)
    ours = bare(left, right, route)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:  # the reference rounds too
        assert relative_error(ours, exact) < 1e-13
        return
    widened = (left.float(), right.float()) if dtype == torch.bfloat16 else (left, right)
    theirs = relative_error(torch_norms(*widened), exact)
    rounding = torch.finfo(torch.float32).eps
    assert relative_error(ours, exact) <= (2 * theirs + rounding if route == "products" else 1e-5)


def test_bf16_dots_are_as_wrong_as_rounding_the_factors(tier):
    left, right = factors(9, 7, 16, 200, 24, torch.float32)
    exact = reference.pair_norms(left, right)
    if not tier.endswith("_bf16"):
        with pytest.raises(RuntimeError, match="bfloat16 dot products"):
            ops.pair_norms(left, right, precision="bf16")
        return
    rounded = reference.pair_norms(left.bfloat16(), right.bfloat16())
    for inputs in ((left, right), (left.bfloat16(), right.bfloat16())):
        ours = ops.pair_norms(*inputs, precision="bf16")
        assert relative_error(ours, rounded) < 1e-5
        assert relative_error(ours, exact) < 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_only_pairs_before_a_bound(tier, route):
    left, right = factors(50, 60, 5, 70, 6, torch.float32)
    whole = bare(left, right, route)
    before = torch.arange(60) * 7 % 53 - 1
    ours = bare(left, right, route, before)
    assert torch.equal(ours, whole * (torch.arange(50)[:, None] < before))


@pytest.mark.parametrize("route", ROUTES)
def test_views_of_any_strides(route):
    left, right = factors(9, 8, 12, 40, 14, torch.float32)
    whole = ops.pair_norms(left, right, route=route)
    wide = torch.full((9, 24, 80), torch.nan)
    wide[:, ::2, ::2] = left
    assert torch.equal(ops.pair_norms(wide[:, ::2, ::2], right.mT.contiguous().mT, route=route), whole)
    assert torch.equal(ops.pair_norms(left, right[:1].expand(3, -1, -1), route=route), whole[:, :1].expand(-1, 3))


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_to_the_bit_whatever_the_threads(route):
    left, right = factors(40, 37, 16, 130, 20, torch.float32)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.pair_norms(left, right, route=route))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("route", ROUTES)
def test_nan_inf_and_zero_stay_in_their_pairs(route):
    left, right = factors(6, 5, 4, 30, 3, torch.float32)
    left[1, 2, 3] = torch.nan
    left[2] = 0
    right[4, 0, 0] = torch.inf
    ours = ops.pair_norms(left, right, route=route)
    assert ours[1].isnan().all()
    assert not ours[[0, 3, 4, 5], 4].isfinite().any()
    assert ours[2, :4].tolist() == [0, 0, 0, 0]
    assert ours[[0, 2, 3, 4, 5], :4].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 2), (3, 0, 2, 4, 2), (3, 2, 0, 4, 2), (3, 2, 2, 0, 2), (3, 2, 2, 4, 0)])
def test_empty(shape):
    left, right = factors(*shape, torch.float32)
    for route in ("auto", *ROUTES):
        assert torch.equal(ops.pair_norms(left, right, route=route), torch.zeros(shape[0], shape[1]))


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 70)] * 2, st.integers(1, 20), st.integers(1, 120), st.integers(1, 60)))
def test_both_routes_agree_in_fp64(shape):
    left, right = factors(*shape)
    before = torch.arange(len(right)) % (len(left) + 2)
    products, gram = (ops.pair_norms(left, right, before=before, route=route) for route in ROUTES)
    torch.testing.assert_close(products, gram, rtol=1e-7, atol=0)


def nearly_orthogonal(epsilon):
    """Factors whose products are small: left's rows lie where right's columns, but for epsilon, do not."""
    left, right = factors(24, 20, 16, 64, 16)
    Q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    half = Q[:, :32] @ Q[:, :32].mT
    return (left @ half).float(), ((torch.eye(64).double() - half) @ right + epsilon * right).float()


@pytest.mark.parametrize("epsilon", [1, 0.1, 1e-2, 1e-3])
def test_cancellation_is_noticed_and_mended(epsilon):
    left, right = nearly_orthogonal(epsilon)
    exact = reference.pair_norms(left, right)
    assert (relative_error(bare(left, right, "gram"), exact) > 1e-5) == (epsilon < 0.1)
    assert relative_error(ops.pair_norms(left, right, route="gram"), exact) < 1e-5 or epsilon == 1e-3
    products = relative_error(ops.pair_norms(left, right, route="products"), exact)
    assert relative_error(ops.pair_norms(left, right, route="gram"), exact) <= max(1e-5, products)


def test_a_few_doubtful_pairs_are_mended_alone():
    left, right = factors(24, 20, 16, 64, 16, torch.float32)
    small_left, small_right = nearly_orthogonal(1e-3)
    left[3], right[7] = small_left[3], small_right[7]
    exact = reference.pair_norms(left, right)
    mended = ops.pair_norms(left, right, route="gram")
    changed = mended != bare(left, right, "gram")
    assert changed[3, 7]
    assert int(changed.sum()) == 1
    assert relative_error(mended, exact) < 1e-5


@pytest.mark.parametrize("decay", [0, 1, 3])
@pytest.mark.parametrize("shape", [(64, 32, 768), (32, 64, 256), (8, 16, 2000)])
def test_the_bound_on_the_error_of_the_gram_route(shape, decay):
    """||A B||^2 is off by less than four roundings of ||A.T A|| ||B B.T||, for flat and for steep spectra."""
    rank, heads, depth = shape
    left, right = factors(heads, heads, rank, depth, rank, seed=decay)
    scale = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    left, right = (left * scale[:, None]).float(), (right * scale).float()
    exact = reference.pair_norms(left, right)
    gram = bare(left, right, "gram").double()
    P, N = torch.linalg.matrix_norm(left @ left.mT).double(), torch.linalg.matrix_norm(right.mT @ right).double()
    worst = ((gram.square() - exact.square()).abs() / (P[:, None] * N)).max() / torch.finfo(torch.float32).eps
    assert float(worst) < 4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_that_are_products_and_shared(tier, route, dtype):
    left, right = factors(3, 2, 5, 40, 9, dtype)
    left_outer, right_outer = torch.randn(6, 11, 5).to(dtype), torch.randn(4, 9, 13).to(dtype)
    x = left_outer.double() @ left.double().repeat_interleave(2, 0)
    y = right.double().repeat_interleave(2, 0) @ right_outer.double()
    before = torch.tensor([6, 0, 2, 5])
    ours = ops.factored_pair_norms(
        left, right, left_outer=left_outer, right_outer=right_outer, before=before, route=route
    )
    # bfloat16 factors are rounded once more where they are stored
    rounding = 1e-2 if dtype == torch.bfloat16 and route == "products" else 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours.norms.double(), reference.pair_norms(x, y, before), rtol=rounding, atol=0)
    torch.testing.assert_close(ours.left.double(), x.norm(dim=(1, 2)), rtol=rounding, atol=0)
    torch.testing.assert_close(ours.right.double(), y.norm(dim=(1, 2)), rtol=rounding, atol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_several_rights_stand_one_after_the_other(tier, route):
    """Shared and plain factors, columns or rows contiguous, whole vectors and not; the last right's norm is mended."""
    left, right = factors(10, 3, 16, 96, 16, torch.float32)
    small_left, small_right = nearly_orthogonal(1e-3)
    left[4], other = small_left[4].repeat(1, 2)[:, :96], torch.randn(2, 96, 16)
    other[1] = torch.cat([small_right[7], torch.zeros(32, 16)])
    left[4, :, 64:] = 0
    rights, outers = [right, other.mT.contiguous().mT], [torch.randn(6, 16, 16), torch.eye(16).expand(2, -1, -1)]
    before = torch.tensor([10, 0, 3, 9, 10, 7, 5, 10])
    ours = ops.factored_pair_norms(left, rights, right_outer=outers, before=before, route=route)
    y = torch.cat([right.repeat_interleave(2, 0) @ outers[0], other])
    exact = reference.pair_norms(left, y, before)
    torch.testing.assert_close(ours.norms.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.right, y.norm(dim=(1, 2)))


def test_gradients_reach_outer_factors():
    left, right = factors(2, 3, 3, 7, 2)
    outer = torch.randn(4, 5, 3, dtype=torch.float64).requires_grad_()
    left.requires_grad_()
    for route in ROUTES:
        assert torch.autograd.gradcheck(
            lambda a, o, route=route: ops.factored_pair_norms(a, right, left_outer=o, route=route).norms, (left, outer)
        )


@pytest.mark.parametrize(
    ("outer", "error", "message"),
    [
        (torch.ones(4, 2), ValueError, r"left_outer has shape \[4, 2\], expected \[N', q, r\]"),
        (torch.ones(4, 3, 2), ValueError, r"left_outer has shape \[4, 3, 2\], expected \[4, 3, 3\]"),
        (torch.ones(6, 5, 3), ValueError, r"left_outer has shape \[6, 5, 3\], which does not fit"),
        (torch.ones(4, 5, 3).double(), TypeError, "left_outer has dtype torch.float64, but left has torch.float32"),
        (torch.ones(4, 5, 3, device="meta"), ValueError, "left_outer is on meta"),
    ],
)
def test_errors_of_outer_factors(outer, error, message):
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    with pytest.raises(error, match=message):
        ops.factored_pair_norms(left, right, left_outer=outer)


def test_errors_of_several_rights():
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    wide = torch.ones(5, 7, 3)
    with pytest.raises(ValueError, match="right has 2 tensors and right_outer 1"):
        ops.factored_pair_norms(left, [right, right], right_outer=[torch.ones(5, 2, 2)])
    with pytest.raises(ValueError, match="right has 0 tensors"):
        ops.factored_pair_norms(left, [])
    with pytest.raises(ValueError, match=r"end in \[2, 3\] columns"):
        ops.factored_pair_norms(left, [right, wide])
    op = torch.ops.pyfastcircuits.pair_grams
    for arguments, message in (
        ((left, [], None, [], None), "right is empty"),
        ((left, [right, wide], None, [], None), r"right\[1\] makes factors of 3 rows or columns, but right\[0\] of 2"),
        (
            (left, [right, right.double()], None, [], None),
            r"right\[1\] has dtype torch.float64, but left has torch.float32",
        ),
        ((left, [right], None, [right, right], None), "right_outer has 2 tensors, but right has 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_gradients():
    left, right = factors(4, 5, 3, 7, 2)
    before = torch.tensor([4, 0, 2, 3, 1])
    left.requires_grad_()
    right.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.pair_norms(a, b, before=before), (left, right))
    assert torch.autograd.gradcheck(lambda a, b: ops.pair_norms(a, b, route="gram"), (left, right))
    ops.pair_norms(torch.zeros(1, 3, 7).double().requires_grad_(), right).sum().backward()
    assert right.grad is not None
    assert right.grad.abs().max() == 0


@pytest.mark.processes
def test_opcheck_and_compile():
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    op = torch.ops.pyfastcircuits.pair_norms.default
    grams = torch.ops.pyfastcircuits.pair_grams.default
    torch.library.opcheck(grams, (left, [right], torch.ones(8, 2, 3), [torch.ones(5, 2, 4)], torch.arange(5)))
    torch.library.opcheck(op, (left, right, torch.arange(5), "ieee"))
    left.requires_grad_()
    torch.library.opcheck(op, (left, right.requires_grad_(), None, "ieee"))
    torch.library.opcheck(grams, (left, [right], None, [], None))
    left, right = left.detach(), right.detach()
    compiled = torch.compile(lambda a, b: ops.pair_norms(a, b) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(left, right), ops.pair_norms(left, right) * 2)


def test_reference_backend():
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    torch.testing.assert_close(ops.pair_norms(left, right, backend="reference"), ops.pair_norms(left, right))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"left": torch.ones(2, 3)}, ValueError, r"left has shape \[2, 3\], expected \[N, r, d\]"),
        ({"right": torch.ones(2, 5, 3)}, ValueError, r"left has shape \[4, 3, 7\] and right \[2, 5, 3\]"),
        ({"left": torch.ones(4, 3, 7, dtype=torch.int32)}, TypeError, "left has dtype torch.int32"),
        ({"right": torch.ones(5, 7, 2).double()}, TypeError, "right has dtype torch.float64, but left has"),
        ({"right": torch.ones(5, 7, 2, device="meta")}, ValueError, "right is on meta"),
        ({"before": torch.ones(3).long()}, ValueError, r"before has shape \[3\], expected \[5\]"),
        ({"before": torch.ones(5)}, TypeError, "before has dtype torch.float32"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'"),
        ({"route": "fast"}, ValueError, "route is 'fast'"),
        ({"route": "gram", "precision": "bf16"}, ValueError, "route='gram'"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"backend": "cuda"}, RuntimeError, "no CUDA C\\+\\+ kernel of pair_norms; take backend='triton'"),
    ],
)
def test_errors(change, error, message):
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    with pytest.raises(error, match=message):
        ops.pair_norms(**({"left": left, "right": right} | change))


def test_errors_of_the_bare_op():
    left, right = factors(4, 5, 3, 7, 2, torch.float32)
    op = torch.ops.pyfastcircuits.pair_norms
    for arguments, message in (
        ((left[0], right, None, "ieee"), r"left has shape \[3, 7\]"),
        ((left, right[:, :2], None, "ieee"), r"right has shape \[5, 2, 2\]"),
        ((left, right.double(), None, "ieee"), "right has dtype torch.float64, but left has torch.float32"),
        ((left, right, torch.ones(5), "ieee"), "before has dtype torch.float32, expected torch.int64"),
        ((left, right, None, "fp8"), "precision is 'fp8'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match=r"left_outer has shape \[4, 2, 9\], which does not fit left \[4, 3, 7\]"):
        torch.ops.pyfastcircuits.pair_grams(left, [right], torch.ones(4, 2, 9), [], None)
