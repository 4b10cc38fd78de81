"""accelerate() against TransformerLens itself: up to 3.9 and from 4, random weights, whichever is installed."""

import pytest
import torch

transformer_lens = pytest.importorskip("transformer_lens")

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.integrations.transformer_lens import accelerate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"n_layers": 3, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_vocab": 50, "act_fn": "gelu"}


def hooked(**changes):
    if "HookedTransformer" not in vars(transformer_lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = transformer_lens.HookedTransformerConfig(**SIZES, normalization_type="LN", seed=0, **changes)
    return transformer_lens.HookedTransformer(config)


def bridged():
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(TransformerBridgeConfig(**SIZES, d_mlp=64, normalization_type="LN", seed=0))


def as_tensor(scores):
    return scores if isinstance(scores, torch.Tensor) else scores.scores


@pytest.mark.parametrize("build", [hooked, bridged])
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_all_composition_scores(build, mode):
    model = build()
    theirs = model.all_composition_scores(mode)
    with accelerate():
        ours = model.all_composition_scores(mode)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(as_tensor(ours), as_tensor(theirs), rtol=2e-5, atol=1e-6)
    assert torch.equal(as_tensor(ours) == 0, as_tensor(theirs) == 0)
    if not isinstance(theirs, torch.Tensor):
        assert (ours.layer_indices, ours.head_labels) == (theirs.layer_indices, theirs.head_labels)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_scores_are_those_of_our_own_function(mode):
    model = hooked()
    names = ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")
    weights = fc.CircuitWeights(*(getattr(model, name).detach() for name in names))
    theirs = model.all_composition_scores(mode)
    torch.testing.assert_close(fc.composition_scores(weights, mode), theirs.detach(), rtol=2e-5, atol=1e-6)


def test_grouped_query_attention():
    model = hooked(n_key_value_heads=2)
    theirs = model.all_composition_scores("K")
    with accelerate():
        torch.testing.assert_close(model.all_composition_scores("K"), theirs, rtol=2e-5, atol=1e-6)


def test_gradients_are_kept():
    model = hooked()
    grads = []
    for run in (False, True):
        model.zero_grad()
        if run:
            with accelerate():
                model.all_composition_scores("K").sum().backward()
        else:
            model.all_composition_scores("K").sum().backward()
        grads.append(model.blocks[0].attn.W_V.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_bad_modes_fail_as_theirs():
    for build in (bridged, hooked):
        model = build()
        with accelerate(), pytest.raises(ValueError, match="mode must be one of"):
            model.all_composition_scores("X")


def factored(*leading):
    g = torch.Generator().manual_seed(0)
    return transformer_lens.FactoredMatrix(
        torch.randn(*leading, 9, 3, generator=g), torch.randn(*leading, 3, 9, generator=g)
    )


def test_composition_scores_of_any_factors():
    from transformer_lens import utilities

    for left, right in (((2, 3), (4,)), ((2,), (2,)), ((), ())):
        for broadcast in (True, False):
            if not broadcast and left != right:
                continue
            a, b = factored(*left), factored(*right).T
            theirs = utilities.composition_scores(a, b, broadcast_dims=broadcast)
            with accelerate():
                ours = utilities.composition_scores(a, b, broadcast_dims=broadcast)
            torch.testing.assert_close(ours, theirs)


def test_factored_matrices_compute_with_ours_and_stay_theirs():
    before = factored(2)
    theirs = (before.norm(), before.eigenvalues.abs().sort(-1).values, before.S, (before @ before.T).AB)
    before = factored(2)
    with accelerate():
        assert type(before).norm is fc.FactoredMatrix.norm
        ours = (before.norm(), before.eigenvalues.abs().sort(-1).values, before.S, (before @ before.T).AB)
        for x in (before @ before, before + before, before.T, before[0], torch.ones(4, 9) @ before, 2 * before):
            assert type(x) is transformer_lens.FactoredMatrix
        mixed = before @ fc.FactoredMatrix(torch.ones(9, 2), torch.ones(2, 5))
        assert mixed.shape == (2, 9, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_copying_scores_of_a_model():
    model = hooked()
    full = model.W_E @ model.OV @ model.W_U

    def scores():
        values = full.eigenvalues
        return values.sum(-1).real / values.abs().sum(-1)

    theirs = scores()
    weights = fc.CircuitWeights(*(getattr(model, n).detach() for n in ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")))
    with accelerate():
        torch.testing.assert_close(scores(), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fc.copying_scores(weights), theirs.detach(), rtol=1e-4, atol=1e-5)


def snapshot():
    from transformer_lens import model_bridge, utilities

    owners = [transformer_lens.FactoredMatrix, utilities, utilities.matrix, model_bridge.TransformerBridge]
    return [dict(vars(owner)) for owner in owners]


def test_undone_on_exit_and_by_call():
    import transformer_lens.utilities.matrix  # noqa: F401

    before = snapshot()
    with accelerate():
        assert snapshot() != before
    assert snapshot() == before
    with pytest.raises(RuntimeError, match="inside"), accelerate():
        raise RuntimeError("inside")
    assert snapshot() == before
    done = accelerate()
    with accelerate():
        pass
    assert snapshot() != before
    done.undo()
    done.undo()
    assert snapshot() == before


def test_products_with_ours_outside_of_it():
    theirs, ours = factored(), fc.FactoredMatrix(torch.randn(9, 2), torch.randn(2, 9))
    torch.testing.assert_close((theirs @ ours).AB, theirs.AB @ ours.AB)
    torch.testing.assert_close((ours @ theirs).AB, ours.AB @ theirs.AB)
    assert type(theirs @ ours) is transformer_lens.FactoredMatrix
    assert type(ours @ theirs) is fc.FactoredMatrix
