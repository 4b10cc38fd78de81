"""Norms with parameters, layers kept apart, scaled embeddings, caps and masks: against weights that need none of them."""

from dataclasses import replace

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.model.layers import LayerStack, stacked
from pyfastcircuits.run.paths import order_streams

TOKENS = random_tokens()
g = torch.Generator().manual_seed(1)
GAIN, BIAS = (torch.randn(2, 20, generator=g, dtype=torch.float64) * 0.4 + shift for shift in (1, 0))
FINAL_GAIN, FINAL_BIAS = (torch.randn(20, generator=g, dtype=torch.float64) * 0.4 + shift for shift in (1, 0))


def held_and_folded(norm, biases=True):
    plain = random_weights(norm=norm, positional="rotary", biases=biases)
    held = replace(plain, ln_w=GAIN, ln_b=BIAS, ln_final_w=FINAL_GAIN, ln_final_b=FINAL_BIAS)
    return held, fc.fold_norm(plain, GAIN, FINAL_GAIN, BIAS, FINAL_BIAS)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_held_parameters_are_folded_ones(norm, biases, masked):
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    ours, expected = (fc.trace(w, TOKENS, mask if masked else None) for w in held_and_folded(norm, biases))
    torch.testing.assert_close(ours.logits(), expected.logits())
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(fc.order_losses(ours), fc.order_losses(expected))
    paths = [(), ((0, 1),), ((0, 2), (1, 3))]
    for path in paths:
        torch.testing.assert_close(fc.path_logits(ours, path), fc.path_logits(expected, path))
    torch.testing.assert_close(fc.path_ablation(ours, paths).loss, fc.path_ablation(expected, paths).loss)
    torch.testing.assert_close(fc.head_ablation(ours).loss, fc.head_ablation(expected).loss)
    for kind in "QKV":
        torch.testing.assert_close(*(fc.composition_scores(w.weights, kind) for w in (ours, expected)))
    torch.testing.assert_close(*(fc.ov_circuit(w.weights, (1, 2)).AB for w in (ours, expected)))
    torch.testing.assert_close(*(fc.bigrams(w.weights).AB for w in (ours, expected)))
    torch.testing.assert_close(*(fc.copying_scores(w.weights) for w in (ours, expected)))


def test_folding_what_is_held():
    held, _ = held_and_folded("layernorm")
    expected = fc.trace(held, TOKENS).logits()
    torch.testing.assert_close(fc.trace(fc.fold_value_biases(held), TOKENS).logits(), expected)
    torch.testing.assert_close(fc.trace(fc.center(held), TOKENS).logits(), expected)
    with pytest.raises(ValueError, match=r"weights.ln_w is given: its norms have parameters already"):
        fc.fold_norm(held, GAIN, FINAL_GAIN)


def test_layers_apart_and_scaled_embeddings(tmp_path):
    plain = random_weights(norm="rmsnorm", positional="none")
    names = ("W_Q", "W_K", "W_V", "W_O")
    apart = replace(
        plain, W_E=plain.W_E / 3, embed_scale=3.0, **{n: LayerStack(list(getattr(plain, n))) for n in names}
    )
    assert apart.W_Q[1].data_ptr() == plain.W_Q[1].data_ptr()
    assert torch.equal(apart.W_O[1, 2], plain.W_O[1, 2])
    ours, expected = fc.trace(apart, TOKENS), fc.trace(plain, TOKENS)
    torch.testing.assert_close(ours.logits(), expected.logits())
    torch.testing.assert_close(fc.pair_ablation(ours).loss, fc.pair_ablation(expected).loss)
    torch.testing.assert_close(fc.qk_circuit(apart, (0, 1)).AB, fc.qk_circuit(plain, (0, 1)).AB)
    torch.testing.assert_close(fc.bigrams(apart).AB, fc.bigrams(plain).AB)
    for circuit in ("OV", "QK"):
        sizes = (fc.circuit_eigenvalues(w, circuit).abs().sort().values for w in (apart, plain))
        torch.testing.assert_close(*sizes)
    torch.testing.assert_close(*(fc.virtual_weights(w, "embed", "unembed").AB for w in (apart, plain)))
    apart.save(tmp_path / "model.safetensors")
    loaded = fc.load_weights(tmp_path)
    assert loaded.embed_scale == 3.0
    assert torch.equal(loaded.W_K, stacked(apart.W_K))
    assert apart.to(torch.float32).W_V.dtype == torch.float32


def test_parameters_are_saved(tmp_path):
    held, _ = held_and_folded("layernorm")
    held.save(tmp_path / "model.safetensors")
    torch.testing.assert_close(fc.trace(fc.load_weights(tmp_path), TOKENS).logits(), fc.trace(held, TOKENS).logits())


def test_a_logit_cap():
    run = fc.trace(replace(random_weights(norm="rmsnorm"), logit_cap=2.0), TOKENS)
    uncapped = fc.trace(random_weights(norm="rmsnorm"), TOKENS).logits()
    assert uncapped.abs().max() > 2

    def loss(logits):
        capped = 2 * (logits / 2).tanh()
        return torch.nn.functional.cross_entropy(capped[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())

    torch.testing.assert_close(run.logits(), 2 * (uncapped / 2).tanh())
    torch.testing.assert_close(run.loss, loss(uncapped))
    orders = order_streams(run, 2).cumsum(0)
    torch.testing.assert_close(fc.order_losses(run), torch.stack([loss(run.unembed(x)) for x in orders]))
    path = ((0, 1), (1, 2))
    for low_memory in (False, True):
        result = fc.path_ablation(run, [path], kl=True, low_memory=low_memory)
        torch.testing.assert_close(result.loss[0], loss(uncapped - fc.path_logits(run, path)))
        assert result.kl[0] > 0


@pytest.mark.parametrize("positional", ["none", "rotary"])
def test_padding_changes_nothing_for_the_rest(positional):
    """Where positions are relative or none, a left-padded sequence is the sequence."""
    w = random_weights(3, norm="rmsnorm", positional=positional)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, :4] = False
    padded = fc.trace(w, torch.cat((random_tokens(2, 4, seed=5), TOKENS), 1), mask)
    alone = fc.trace(w, TOKENS)
    torch.testing.assert_close(padded.logits()[:, 4:], alone.logits())
    torch.testing.assert_close(padded.loss, alone.loss)
    torch.testing.assert_close(fc.order_losses(padded), fc.order_losses(alone))
    torch.testing.assert_close(fc.pair_ablation(padded, kl=True).kl, fc.pair_ablation(alone, kl=True).kl)
    torch.testing.assert_close(fc.head_ablation(padded).loss, fc.head_ablation(alone).loss)
    marginals = (torch.stack(fc.layer_marginals(x)) for x in (padded, alone))
    torch.testing.assert_close(*marginals)
    each = fc.path_ablation(padded, [((0, 1),)], per_token=True)
    assert each.loss.shape == (1, 2, 12)
    assert each.loss[:, :, :4].isnan().all()
    torch.testing.assert_close(each.loss[:, :, 4:], fc.path_ablation(alone, [((0, 1),)], per_token=True).loss)


def test_a_sequence_that_is_all_padding_counts_nothing():
    w = random_weights(norm="rmsnorm")
    mask = torch.ones_like(TOKENS)
    mask[0] = 0
    run, alone = fc.trace(w, TOKENS, mask), fc.trace(w, TOKENS[1:])
    torch.testing.assert_close(run.loss, alone.loss)
    torch.testing.assert_close(fc.pair_ablation(run).loss, fc.pair_ablation(alone).loss)
    torch.testing.assert_close(run[1:].loss, alone.loss)


BAD = {
    "shape": ({"ln_w": GAIN[:1]}, r"ln_w has shape \[1, 20\], expected \[2, 20\]"),
    "final": ({"ln_final_b": GAIN}, r"ln_final_b has shape \[2, 20\], expected \[20\]"),
    "no norm": ({"ln_w": GAIN, "norm": None}, "ln_w is given, but norm is None"),
    "shortformer": ({"ln_b": BIAS, "positional": "shortformer", "W_pos": GAIN}, "ln_b is given, but positional is 'shortformer'"),
    "post": ({"ln_post_w": GAIN}, "ln_post_w is given, but norm is 'rmsnorm' and attention_only True"),
    "cap": ({"logit_cap": -1.0}, "logit_cap is -1.0, expected a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(what):
    changes, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        replace(random_weights(norm="rmsnorm", positional="none"), **changes)


def test_layers_that_differ_are_named():
    one = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="layers is empty"):
        LayerStack([])
    with pytest.raises(ValueError, match=r"layers\[1\] has shape \[3, 4\], but layers\[0\] has \[4, 3\]"):
        LayerStack([one, one.T])
    with pytest.raises(TypeError, match=r"layers\[1\] has dtype torch.float64, but layers\[0\] has torch.float32"):
        LayerStack([one, one.double()])
    weights = random_weights()
    bad = [layer.clone() for layer in weights.W_Q]
    bad[1][3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"W_Q\[1\]\[3, 2, 1\] is nan: weights must be finite"):
        replace(weights, W_Q=LayerStack(bad))
