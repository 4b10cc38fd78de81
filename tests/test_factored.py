"""FactoredMatrix against the product it stands for, in fp64."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfastcircuits import FactoredMatrix

SIZES = [(5, 3, 7), (3, 5, 4), (6, 6, 6), (1, 4, 1), (7, 1, 5), (4, 9, 2)]


def matrix(ldim, mdim, rdim, leading=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*leading, ldim, mdim, generator=generator, dtype=torch.float64)
    B = torch.randn(*leading, mdim, rdim, generator=generator, dtype=torch.float64)
    return FactoredMatrix(A.to(dtype), B.to(dtype))


def test_attributes_and_broadcasting():
    A, B = torch.randn(4, 1, 5, 3), torch.randn(2, 3, 7)
    m = FactoredMatrix(A, B)
    assert (m.ldim, m.mdim, m.rdim, m.ndim, m.has_leading_dims) == (5, 3, 7, 4, True)
    assert m.shape == (4, 2, 5, 7)
    assert m.pair == (m.A, m.B)
    assert m.A.shape == (4, 2, 5, 3)
    assert m.B.data_ptr() == B.data_ptr()
    assert repr(m) == "FactoredMatrix: Shape(torch.Size([4, 2, 5, 7])), Hidden Dim(3)"
    assert not FactoredMatrix(A[0, 0], B[0]).has_leading_dims
    torch.testing.assert_close(m.T.AB, m.AB.mT)


def test_constructor_errors():
    with pytest.raises(AssertionError, match=r"inner dimension.*\[2, 3\].*\[4, 5\]"):
        FactoredMatrix(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match=r"Shape mismatch.*\[9, 5, 3\].*\[2, 4, 3, 7\]"):
        FactoredMatrix(torch.ones(9, 5, 3), torch.ones(2, 4, 3, 7))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("leading", [(), (2,)])
def test_products(size, leading):
    m = matrix(*size, leading)
    right, left = torch.randn(m.rdim, 5).double(), torch.randn(4, m.ldim).double()
    for product, expected in ((m @ right, m.AB @ right), (left @ m, left @ m.AB)):
        assert isinstance(product, FactoredMatrix)
        torch.testing.assert_close(product.AB, expected)
    # which factor absorbs the product: the inner dimension never grows
    assert (m @ right).mdim == min(m.mdim, m.rdim)
    assert (left @ m).mdim == min(m.mdim, m.ldim)
    assert (((m @ right).A is m.A) or ((m @ right).A.data_ptr() == m.A.data_ptr())) == (m.rdim > m.mdim)
    assert ((left @ m).B.data_ptr() == m.B.data_ptr()) == (m.ldim > m.mdim)
    other = matrix(m.rdim, 3, 6, seed=1)
    torch.testing.assert_close((m @ other).AB, m.AB @ other.AB)
    assert (m @ other).mdim == min(m.mdim, m.rdim, 3)
    torch.testing.assert_close(m @ right[:, 0], m.AB @ right[:, 0])
    torch.testing.assert_close(left[0] @ m, left[0] @ m.AB)


def test_product_errors():
    m = matrix(3, 2, 4)
    with pytest.raises(AssertionError, match=r"Right matrix.*\[3, 4\].*\[3, 4\]"):
        _ = m @ torch.ones(3, 4)
    with pytest.raises(AssertionError, match=r"Left matrix.*\[3, 4\].*\[2, 4\]"):
        _ = torch.ones(2, 4) @ m
    with pytest.raises(RuntimeError):
        _ = matrix(3, 2, 4, (2,)) @ matrix(4, 2, 4, (3,))


def test_scalars():
    m = matrix(3, 2, 4, (5,))
    for scalar in (3, 0.5, torch.tensor([2.0]).double(), torch.tensor(-1.5).double()):
        torch.testing.assert_close((m * scalar).AB, m.AB * scalar)
        torch.testing.assert_close((scalar * m).AB, m.AB * scalar)
    for wrong in (torch.ones(2), torch.ones(2, 2)):
        with pytest.raises(AssertionError, match="must be a scalar"):
            _ = m * wrong
        with pytest.raises(AssertionError, match="must be a scalar"):
            _ = wrong * m


def test_sums():
    a, b = matrix(3, 2, 4, (5,)), matrix(3, 6, 4, seed=1)
    assert (a + b).mdim == 8
    torch.testing.assert_close((a + b).AB, a.AB + b.AB)
    torch.testing.assert_close((a - b).AB, a.AB - b.AB)
    torch.testing.assert_close((-a).AB, -a.AB)
    assert float((a - a).norm().max()) < 1e-14
    with pytest.raises(ValueError, match=r"\[5, 3, 4\] and \[4, 3\]"):
        _ = a + b.T
    with pytest.raises(TypeError):
        _ = a + torch.ones(3, 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_svd(size, leading):
    m = matrix(*size, leading)
    U, S, V = m.svd()
    k = min(size)
    assert U.shape == (*leading, m.ldim, k)
    assert S.shape == (*leading, k)
    assert V.shape == (*leading, m.rdim, k)
    torch.testing.assert_close(U * S[..., None, :] @ V.mT, m.AB)
    torch.testing.assert_close(U.mT @ U, torch.eye(k).double().expand(*leading, k, k))
    torch.testing.assert_close(V.mT @ V, torch.eye(k).double().expand(*leading, k, k))
    torch.testing.assert_close(S, torch.linalg.svdvals(m.AB)[..., :k])
    torch.testing.assert_close(m.collapse_l(), U.mT @ m.AB)
    torch.testing.assert_close(m.collapse_r(), m.AB @ V)
    even = m.make_even()
    torch.testing.assert_close(even.AB, m.AB)
    torch.testing.assert_close(even.A.norm(), even.B.norm())
    torch.testing.assert_close(m.norm(), torch.linalg.matrix_norm(m.AB))
    with pytest.warns(DeprecationWarning, match="not its transpose"):
        assert m.Vh is V
    assert m.U is U
    assert m.S is S


def test_svd_follows_edits():
    m = matrix(5, 3, 4)
    before = m.S
    assert m.S is before
    m.A.mul_(2)
    torch.testing.assert_close(m.S, 2 * before)
    m.B = m.B * 2
    torch.testing.assert_close(m.S, 4 * before)
    with torch.inference_mode():
        inference = matrix(5, 3, 4)
        torch.testing.assert_close(inference.S, before)
        inference.A.mul_(3)
        torch.testing.assert_close(inference.S, 3 * before)


def test_svd_asked_for_without_and_then_with_gradients():
    A = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    m = FactoredMatrix(A, torch.randn(3, 4, dtype=torch.float64))
    with torch.no_grad():
        assert not m.S.requires_grad
    assert m.S.requires_grad


def test_svd_does_not_keep_the_matrix_alive():
    m = matrix(4, 3, 4)
    m.svd()
    reference = weakref.ref(m)
    del m
    gc.collect()
    assert reference() is None


def test_eigenvalues():
    for m in (matrix(6, 2, 6), matrix(3, 5, 3, (2,))):
        full = torch.linalg.eigvals(m.AB)
        ours = m.eigenvalues
        assert ours.shape == (*m.shape[:-2], m.mdim)
        rank = min(m.mdim, m.ldim)
        largest = [x.abs().sort(-1, descending=True).values[..., :rank] for x in (ours, full)]
        torch.testing.assert_close(*largest)
        torch.testing.assert_close(ours.sum(-1), full.sum(-1))
        torch.testing.assert_close(m.BA, m.B @ m.A)
    with pytest.raises(AssertionError, match="ldim==rdim"):
        _ = matrix(3, 2, 4).eigenvalues


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_fp32(dtype):
    m = matrix(9, 4, 9, dtype=dtype)
    exact = FactoredMatrix(m.A.double(), m.B.double())
    assert (m.dtype, m.AB.dtype) == (dtype, dtype)
    assert {x.dtype for x in m.svd()} == {torch.float32}
    assert m.eigenvalues.dtype == torch.complex64
    torch.testing.assert_close(m.S.double(), exact.S, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m.norm().double(), exact.norm(), rtol=1e-6, atol=0)


def test_norm_has_no_cancellation():
    """||A B|| is 1e-5 of ||A|| ||B||: the two fp32 Gram matrices would leave nothing of it."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    A = torch.randn(50, 4, generator=generator, dtype=torch.float64) @ Q[:4]
    B = (Q[4:] + 1e-5 * Q[:4]).mT @ torch.randn(4, 50, generator=generator, dtype=torch.float64)
    m = FactoredMatrix(A.float(), B.float())
    exact = torch.linalg.matrix_norm(m.A.double() @ m.B.double())
    assert float(abs(m.norm() / exact - 1)) < 2e-2
    gram = ((m.A.mT @ m.A) * (m.B @ m.B.mT)).sum().abs().sqrt()
    assert float(abs(gram / exact - 1)) > 1


def repeated():
    """Factors of a matrix with singular values 2, 2, 2, and of one of lower rank than its inner dimension."""
    Q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    flat = torch.randn(6, 1, dtype=torch.float64) @ torch.randn(1, 3, dtype=torch.float64)
    return [(Q, 2 * Q.mT.clone()), (flat, torch.randn(3, 5, dtype=torch.float64))]


def test_gradients_where_singular_values_repeat():
    for A, B in repeated():
        A.requires_grad_()
        B.requires_grad_()
        m = FactoredMatrix(A, B)
        for ours, dense in ((m.norm(), (A @ B).norm()), (m.S.pow(2).sum(), (A @ B).square().sum())):
            expected = torch.autograd.grad(dense, (A, B))
            torch.testing.assert_close(torch.autograd.grad(ours, (A, B), retain_graph=True), expected)


def test_gradients_of_norm_and_singular_values():
    A, B = (x.requires_grad_() for x in matrix(5, 3, 4, (2,)).pair)
    assert torch.autograd.gradcheck(lambda a, b: FactoredMatrix(a, b).norm(), (A, B))
    assert torch.autograd.gradgradcheck(lambda a, b: FactoredMatrix(a, b).norm(), (A, B))
    assert torch.autograd.gradcheck(lambda a, b: FactoredMatrix(a, b).S, (A, B))
    zero = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    FactoredMatrix(zero, B[0].detach()).norm().backward()
    assert float(zero.grad.abs().max()) == 0


def test_norm_of_broadcast_factors():
    m = FactoredMatrix(torch.randn(3, 1, 5, 2).double(), torch.randn(4, 2, 6).double())
    torch.testing.assert_close(m.norm(), torch.linalg.matrix_norm(m.AB))


INDICES = [
    (0,),
    (-1,),
    (slice(None), 1),
    (1, 2),
    (..., slice(1, 3)),
    (slice(1), ..., slice(2, 5), slice(1, 4)),
    (None, ..., slice(None), slice(2)),
    ([1, 0],),
    (np.array([1, 0]), 1),
    (torch.tensor([True, False]), ..., slice(0, 6, 3)),
    ([[True, False, True], [False, True, False]],),
    (0, 0, None),
    (..., None, slice(None)),
    (..., None),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indices_match_those_of_the_product(index):
    m = matrix(5, 2, 7, (2, 3))
    result = m[index]
    assert isinstance(result, FactoredMatrix)
    expected = tuple(torch.as_tensor(i) if isinstance(i, list) else i for i in index)
    torch.testing.assert_close(result.AB, m.AB[expected])


def test_integers_keep_matrix_axes():
    m = matrix(5, 2, 7, (2, 3))
    for row, column in ((1, 2), (-1, -1), (-5, 6), (np.int64(3), torch.tensor(4))):
        assert m[0, 1, row].shape == (1, 7)
        torch.testing.assert_close(m[0, 1, row].AB, m.AB[0, 1, int(row)][None])
        torch.testing.assert_close(m[..., column].AB, m.AB[..., int(column)][..., None])
        assert m[0, 1, row, column].shape == (1, 1)
        assert float(m[0, 1, row, column].AB) == pytest.approx(float(m.AB[0, 1, int(row), int(column)]))
    torch.testing.assert_close(m[:, :, [0, 3], [1]].AB, m.AB[:, :, [0, 3]][..., [1]])
    torch.testing.assert_close(m[torch.tensor([1, 0]), ..., [0, 3, 5]].AB, m.AB[[1, 0]][..., [0, 3, 5]])


def test_index_errors():
    m = matrix(5, 2, 7, (2,))
    with pytest.raises(ValueError, match="too long an index"):
        _ = m[0, 0, 0, 0]
    for index in [(2,), (0, 5), (0, 0, -8), (..., ...)]:
        with pytest.raises(IndexError):
            _ = m[index]


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 6)] * 3), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99))
def test_norm_and_corner_of_any_shape(size, leading, seed):
    m = matrix(*size, leading, seed=seed)
    torch.testing.assert_close(m.norm(), torch.linalg.matrix_norm(m.AB))
    torch.testing.assert_close(m.norm(), m.S.square().sum(-1).sqrt())
    torch.testing.assert_close(m.get_corner(2), m.AB[(slice(2),) * m.ndim])
    torch.testing.assert_close(m.unsqueeze(0).AB, m.AB[None])


def test_moves():
    m = matrix(3, 2, 4)
    assert m.to(torch.float32).dtype == torch.float32
    assert m.to("meta").device.type == "meta"
    assert m.device.type == "cpu"


class Theirs:
    """The operations of TransformerLens' class when an operand of its own kind comes from elsewhere."""

    def __init__(self, A, B):
        assert A.size(-1) == B.size(-2)
        self.A, self.B = A, B.broadcast_to(B.shape)

    def collapse_l(self):
        raise NotImplementedError

    def __matmul__(self, other):
        assert other.ndim >= 2
        assert other.size(-2) == self.B.size(-1)
        return Theirs(self.A, self.B @ other)


def test_products_with_another_library_s_class():
    m, theirs = matrix(4, 2, 4), Theirs(torch.randn(4, 3).double(), torch.randn(3, 4).double())
    dense = theirs.A @ theirs.B
    assert isinstance(m @ theirs, FactoredMatrix)
    torch.testing.assert_close((m @ theirs).AB, m.AB @ dense)
    assert isinstance(theirs @ m, Theirs)
    torch.testing.assert_close((theirs @ m).A @ (theirs @ m).B, dense @ m.AB)
