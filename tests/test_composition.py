"""Composition scores against materialised Frobenius norms in fp64, and their baseline against sampling."""

from functools import partial

import pytest
import torch

from pyfastcircuits import (
    CircuitWeights,
    component_scores,
    composition_baseline,
    composition_scores,
    composition_z_scores,
    load_weights,
    ops,
)
from pyfastcircuits.circuits.head_factors import triangle

KINDS = ["Q", "K", "V"]


def model(layers=3, heads=4, kv=None, d=20, r=5, dtype=torch.float64, decay=0.0, seed=0):
    """Random heads, whose singular values fall off as k**-decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kv = kv or heads
    scale = torch.arange(1, r + 1, dtype=torch.float64) ** -decay
    W_Q, W_K, W_V = (normal(layers, h, d, r) * scale for h in (heads, kv, kv))
    tensors = (normal(7, d), W_Q, W_K, W_V, normal(layers, heads, r, d), normal(d, 7))
    return CircuitWeights(*(x.to(dtype) for x in tensors))


def circuits(weights, kind):
    """OV of all heads and what the destinations read through, [L, H, d, d], in fp64."""
    group = weights.n_heads // weights.W_K.shape[1]
    W_K, W_V = (x.double().repeat_interleave(group, 1) for x in (weights.W_K, weights.W_V))
    OV, QK = W_V @ weights.W_O.double(), weights.W_Q.double() @ W_K.mT
    return OV, {"Q": QK, "K": QK.mT, "V": OV}[kind]


def materialised(weights, kind):
    first, second = circuits(weights, kind)
    norms = torch.einsum("abij,cdjk->abcdik", first, second).norm(dim=(-2, -1))
    scores = norms / first.norm(dim=(-2, -1))[..., None, None] / second.norm(dim=(-2, -1))
    layers = torch.arange(weights.n_layers)
    return torch.where(layers[:, None, None, None] < layers[:, None], scores, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_materialised_norms(kind, kv, dtype):
    weights = model(kv=kv, dtype=dtype)
    scores, exact = composition_scores(weights, kind), materialised(weights, kind)
    assert scores.dtype == weights.compute_dtype
    assert torch.equal(scores == 0, exact == 0)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5 if dtype != torch.float64 else 1e-11, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_torch(kind):
    """At most twice the error of the same norms by torch's fp32 matmul, both against fp64."""
    weights = model(layers=2, heads=6, d=130, r=17, dtype=torch.float32)
    exact = materialised(weights, kind)[0, :, 1]
    first, second = (x.float() for x in circuits(weights, kind))
    product = torch.einsum("aij,cjk->acik", first[0], second[1]).norm(dim=(-2, -1))
    theirs = product / first[0].norm(dim=(-2, -1))[:, None] / second[1].norm(dim=(-2, -1))
    ours = composition_scores(weights, kind)[0, :, 1]
    assert float((ours / exact - 1).abs().max()) <= 2 * float((theirs / exact - 1).abs().max()) + 1.2e-7


@pytest.mark.parametrize("kind", KINDS)
def test_head_wider_than_the_model(kind):
    weights = model(d=4, r=6)
    torch.testing.assert_close(composition_scores(weights, kind), materialised(weights, kind))


@pytest.mark.parametrize("kv", [4, 2])
def test_several_kinds_at_once(kv, monkeypatch):
    weights = model(kv=kv, dtype=torch.float32)
    one_by_one = torch.stack([composition_scores(weights, kind) for kind in ("V", "Q", "K")])
    torch.testing.assert_close(composition_scores(weights, ("V", "Q", "K")), one_by_one, rtol=2e-6, atol=0)
    done = []
    monkeypatch.setattr("pyfastcircuits.circuits.head_factors.BLOCK", 6 * 4 * 20 * 5)
    chunked = composition_scores(weights, ["V", "Q", "K"], progress=done.append)
    torch.testing.assert_close(chunked, one_by_one, rtol=2e-6, atol=0)
    assert len(done) > 3
    assert sum(done) == 3 * 3 * 16
    part = composition_scores(weights, ["V"], sources=[(1, 2)], destinations=[(2, 1), (2, 0)])
    torch.testing.assert_close(part[0, 0], one_by_one[0, 1, 2, 2, [1, 0]], rtol=2e-6, atol=0)


def test_gradients_of_several_kinds():
    def gradient(scores):
        (gradient,) = torch.autograd.grad(scores.square().sum(), weights.W_O)
        return gradient

    weights = model()
    weights.W_O.requires_grad_()
    summed = sum(gradient(composition_scores(weights, kind)) for kind in KINDS)
    torch.testing.assert_close(gradient(composition_scores(weights, KINDS)), summed)


def test_the_erratum():
    """The article's first library moved factors around cyclically, as a trace allows and a norm does not."""
    weights = model()
    (W_Q, W_K, W_V, W_O) = (getattr(weights, name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    OV, QK = W_V[0, 0] @ W_O[0, 0], W_Q[1, 1] @ W_K[1, 1].mT
    right = float((OV @ QK).norm() / OV.norm() / QK.norm())
    wrong = float((W_O[0, 0] @ QK @ W_V[0, 0]).norm() / OV.norm() / QK.norm())
    ours = float(composition_scores(weights, "Q")[0, 0, 1, 1])
    assert ours == pytest.approx(right, rel=1e-12)
    assert abs(wrong / right - 1) > 0.1


def test_invariances():
    """Rotating the residual stream, or changing basis inside a head, changes no score."""
    weights = model()
    U = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    M = torch.randn(5, 5, dtype=torch.float64)
    inverse = torch.linalg.inv(M)
    changed = CircuitWeights(
        weights.W_E @ U,
        U.mT @ weights.W_Q @ M,
        U.mT @ weights.W_K @ inverse.mT,
        U.mT @ weights.W_V @ M,
        inverse @ weights.W_O @ U,
        U.mT @ weights.W_U,
    )
    for kind in KINDS:
        torch.testing.assert_close(composition_scores(changed, kind), composition_scores(weights, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [4, 2])
def test_subsets_in_any_order(kind, kv):
    weights = model(kv=kv)
    sources, destinations = [(1, 3), (0, 2), (0, 0), (2, 1)], [(2, 3), (1, 1), (2, 0)]
    whole = composition_scores(weights, kind)
    ours = composition_scores(weights, kind, sources=sources, destinations=destinations)
    expected = torch.stack([torch.stack([whole[(*s, *t)] for t in destinations]) for s in sources])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert composition_scores(weights, kind, sources=sources).shape == (4, 3, 4)
    assert composition_scores(weights, kind, destinations=[]).shape == (3, 4, 0)
    baseline = composition_baseline(weights, kind)
    part = composition_baseline(weights, kind, sources=sources, destinations=destinations)
    assert part.mean[1, 2] == baseline.mean[0, 2, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [4, 2])
def test_chunks_change_nothing(kind, kv, monkeypatch):
    weights = model(kv=kv, dtype=torch.float32)
    whole = composition_scores(weights, kind)
    done = []
    monkeypatch.setattr("pyfastcircuits.circuits.head_factors.BLOCK", 3 * 4 * 20 * 5)
    torch.testing.assert_close(composition_scores(weights, kind, progress=done.append), whole, rtol=2e-6, atol=0)
    assert len(done) > 3
    assert sum(done) == 3 * 16


def test_zero_heads_score_zero_with_a_warning():
    weights = model(dtype=torch.float32)
    weights.W_O[0, 1] = 0
    weights.W_K[2, 3] = 0
    with pytest.warns(UserWarning, match="is zero") as caught:
        scores = composition_scores(weights, "K")
    messages = [str(w.message) for w in caught]
    assert any("OV matrix of head 0.1 is zero" in m for m in messages)
    assert any("QK matrix of head 2.3 is zero" in m for m in messages)
    assert scores.isfinite().all()
    assert scores[0, 1].abs().max() == 0
    assert scores[:, :, 2, 3].abs().max() == 0
    assert (scores[0, 0, 1] > 0).all()
    with pytest.warns(UserWarning, match="is zero"):
        z = composition_z_scores(weights, "K")
    assert z[0, 1].abs().max() == 0


def test_singular_factors():
    """A rank-deficient W_V has a singular Gram matrix, which Cholesky refuses."""
    weights = model(dtype=torch.float32)
    weights.W_V[0, 0, :, 1] = weights.W_V[0, 0, :, 0]
    weights.W_V[0, 1, :, 2:] = 0
    for kind in KINDS:
        torch.testing.assert_close(
            composition_scores(weights, kind).double(), materialised(weights, kind), rtol=1e-5, atol=0
        )


def haar(d, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=torch.float64))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decay", "r"), [(0.0, 5), (2.0, 5), (0.0, 1), (1.0, 12)])
def test_baseline_against_sampling(kind, decay, r):
    weights = model(layers=2, heads=1, d=12, r=r, decay=decay)
    count = 40_000
    first, second = circuits(weights, kind)
    OV, read = first[0, 0], second[1, 0]
    samples = (OV @ haar(12, count) @ read).norm(dim=(-2, -1)) / OV.norm() / read.norm()
    mean, std, square_std = (float(x[0, 0, 1, 0]) for x in composition_baseline(weights, kind))
    assert mean**2 + std**2 == pytest.approx(1 / 12, rel=1e-9)
    sampling_error = float(samples.std()) / count**0.5
    assert abs(mean - float(samples.mean())) < 4 * sampling_error + 3e-2 * mean
    assert std == pytest.approx(float(samples.std()), rel=0.1)
    # the exact part: mean and variance of the square
    P, N = OV.mT @ OV, read @ read.mT
    tr = torch.trace
    d = 12
    variance = 2 * (d * tr(P @ P) - tr(P) ** 2) * (d * tr(N @ N) - tr(N) ** 2)
    variance = float(variance / (d**2 * (d - 1) * (d + 2) * tr(P) ** 2 * tr(N) ** 2))
    assert square_std == pytest.approx(variance**0.5, rel=1e-9)
    squares = samples.square()
    assert float(squares.mean()) == pytest.approx(1 / d, abs=4 * float(squares.std()) / count**0.5)
    assert float(squares.var()) == pytest.approx(variance, rel=0.08)


def test_baseline_of_rotations_and_of_the_smallest_model():
    weights = model(d=5, r=5)
    eye = torch.eye(5).double().expand(3, 4, 5, 5)
    rigid = CircuitWeights(weights.W_E, eye, eye, eye, eye, weights.W_U)
    mean, std, _ = composition_baseline(rigid, "Q")
    torch.testing.assert_close(mean[0, 0, 1, 0], torch.tensor(5**-0.5).double())
    assert std.max() == 0
    assert composition_z_scores(rigid, "Q").abs().max() == 0
    line = model(d=1, r=2)
    assert composition_baseline(line, "V").std.max() == 0
    assert composition_baseline(line, "V").mean.max() == 1


def test_z_scores_find_a_planted_composition():
    weights = model(d=40, r=4, seed=3)
    weights.W_K[2, 1] = weights.W_O[0, 3].mT @ torch.randn(4, 4, dtype=torch.float64)
    z = composition_z_scores(weights, "K")
    assert z.max() == z[0, 3, 2, 1]
    assert z.max() > 8
    assert z[0].flatten().median().abs() < 2
    scores = composition_scores(weights, "K")
    assert torch.equal(composition_z_scores(weights, "K", scores), z)
    with pytest.raises(ValueError, match=r"scores has shape \[3, 4\], expected \[3, 4, 3, 4\]"):
        composition_z_scores(weights, "K", scores[0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [4, 2])
def test_components_add_up_to_the_head(kind, kv):
    weights = model(kv=kv)
    whole = composition_scores(weights, kind)
    c = component_scores(weights, kind, (0, 3), (2, 1))
    score = whole[0, 3, 2, 1].square()
    p, q = (x.square() / x.square().sum() for x in (c.source_singular_values, c.destination_singular_values))
    torch.testing.assert_close(p @ c.source.square(), score)
    torch.testing.assert_close(c.destination.square() @ q, score)
    torch.testing.assert_close(p @ c.pairs.square() @ q, score)
    OV, read = circuits(weights, kind)
    U, S, Vh = torch.linalg.svd(OV[0, 3])
    torch.testing.assert_close(c.source_singular_values, S[:5])
    component = S[1] * torch.outer(U[:, 1], Vh[1])
    expected = (component @ read[2, 1]).norm() / component.norm() / read[2, 1].norm()
    torch.testing.assert_close(c.source[1], expected)


def test_errors():
    weights = model()
    with pytest.raises(ValueError, match="kind is 'X', expected one of Q, K, V"):
        composition_scores(weights, "X")
    with pytest.raises(ValueError, match="kind is 'X'"):
        composition_scores(weights, ["Q", "X"])
    with pytest.raises(ValueError, match=r"kind is \[\], expected at least one"):
        composition_scores(weights, [])
    with pytest.raises(TypeError, match="weights is a dict"):
        composition_scores({}, "Q")
    with pytest.raises(IndexError, match=r"sources\[1\] is 3\.0; the model has layers 0 to 2"):
        composition_scores(weights, "Q", sources=[(0, 0), (3, 0)])
    with pytest.raises(ValueError, match=r"destinations\[0\] is 5, expected \(layer, head\)"):
        composition_baseline(weights, "Q", destinations=[5])
    with pytest.raises(ValueError, match=r"source \(1, 0\) is not in a layer before destination \(1, 1\)"):
        component_scores(weights, "Q", (1, 0), (1, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("route", ["products", "gram"])
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_every_pair_of_the_trained_model(kind, route, monkeypatch):
    weights = load_weights("induction-2l")
    exact = composition_scores(weights.to(torch.float64), kind)
    chosen = partial(ops.factored_pair_norms, route=route)
    monkeypatch.setattr("pyfastcircuits.circuits.composition.factored_pair_norms", chosen)
    ours = composition_scores(weights, kind).double()
    assert float(((ours - exact).abs() / exact.where(exact > 0, 1)).max()) <= 1e-5


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_triangles(tier, dtype):
    op = torch.ops.pyfastcircuits.triangles
    for shape in ((3, 40, 17), (2, 5, 1), (4, 300, 64)):
        W = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for given in (W, W.mT.contiguous().mT):
            R, regular = op(given)
            assert regular.all()
            assert R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            exact = torch.linalg.cholesky(W.double().mT @ W.double(), upper=True)
            rounding = 1e-12 if dtype == torch.float64 else 2**-23  # made in fp64, rounded once
            torch.testing.assert_close(R, exact.to(R.dtype), rtol=rounding, atol=1e-12)
            torch.testing.assert_close(R, R.triu())
    W[1, :, 3] = W[1, :, 5]
    assert op(W)[1].tolist() == [True, False, True, True]
    assert not op(torch.zeros(1, 4, 2))[1].any()
    torch.library.opcheck(torch.ops.pyfastcircuits.triangles.default, (W,))
    with pytest.raises(RuntimeError, match=r"factors has shape \[300, 64\]"):
        op(W[0])


def test_triangles_where_there_is_no_kernel():
    """CUDA tensors, and those that need gradients, take torch's Cholesky."""
    W = torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(0))
    W[1, :, 3] = W[1, :, 5]
    R = triangle(W.clone().requires_grad_()).detach()
    torch.testing.assert_close(R.mT @ R, W.mT @ W)
    torch.testing.assert_close(R[2:], triangle(W)[2:])
