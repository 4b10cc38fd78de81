"""Folding leaves logits where they were."""

from dataclasses import replace

import pytest
import torch
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc

TOKENS = random_tokens()


def logits(weights):
    return fc.trace(weights, TOKENS).logits()


@pytest.mark.parametrize(("norm", "positional"), KINDS)
def test_value_biases(norm, positional):
    weights = random_weights(norm=norm, positional=positional)
    folded = fc.fold_value_biases(weights)
    assert folded.b_V is None
    torch.testing.assert_close(logits(folded), logits(weights))
    assert fc.fold_value_biases(folded) is folded


@pytest.mark.parametrize("positional", ["none", "standard", "shortformer", "rotary"])
@pytest.mark.parametrize("biases", [True, False])
def test_centering_turns_layernorm_into_rmsnorm(positional, biases):
    weights = random_weights(norm="layernorm", positional=positional, biases=biases)
    centered = fc.center(weights)
    assert centered.norm == "rmsnorm"
    assert float(centered.W_O.mean(-1).abs().max()) < 1e-15
    torch.testing.assert_close(logits(centered), logits(weights))


def with_parameters(weights, gain, bias, final_gain, final_bias):
    """Logits of the model whose norms are followed by * gain + bias, layer by layer, written out."""
    positions = None if weights.W_pos is None else weights.W_pos[: TOKENS.shape[1]]

    def norm(x, g, b):
        x = x - x.mean(-1, keepdim=True) if weights.norm == "layernorm" else x
        return x / (x.square().mean(-1, keepdim=True) + weights.eps).sqrt() * g + b

    x = weights.W_E[TOKENS]
    x = x if positions is None else x + positions
    mask = torch.ones(TOKENS.shape[1], TOKENS.shape[1]).triu(1).bool()
    for layer in range(weights.n_layers):
        read = norm(x, gain[layer], bias[layer])[:, None]
        q, k, v = (
            read @ getattr(weights, f"W_{n}")[layer].repeat_interleave(4 // s, 0)
            + getattr(weights, f"b_{n}")[layer].repeat_interleave(4 // s, 0)[:, None]
            for n, s in (("Q", 4), ("K", 2), ("V", 2))
        )
        pattern = (q @ k.mT / weights.d_head**0.5).masked_fill(mask, -torch.inf).softmax(-1)
        x = x + (pattern @ v @ weights.W_O[layer]).sum(1) + weights.b_O[layer]
    return norm(x, final_gain, final_bias) @ weights.W_U + weights.b_U


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("positional", ["none", "standard"])
def test_norm_parameters(norm, positional):
    weights = random_weights(norm=norm, positional=positional)
    g = torch.Generator().manual_seed(1)
    gain, bias = (torch.randn(2, 20, generator=g).double() + shift for shift in (1, 0))
    final_gain, final_bias = (torch.randn(20, generator=g).double() + shift for shift in (1, 0))
    folded = fc.fold_norm(weights, gain, final_gain, bias, final_bias)
    expected = with_parameters(weights, gain, bias, final_gain, final_bias)
    torch.testing.assert_close(logits(folded), expected)
    assert float((logits(weights) - expected).abs().max()) > 0.1
    bare = replace(weights, b_Q=None, b_K=None, b_V=None, b_O=None, b_U=None)
    assert fc.fold_norm(bare, gain, final_gain).b_Q is None
    assert fc.fold_norm(bare, gain, final_gain, bias).b_Q is not None


def test_errors():
    one, layers = torch.ones(20).double(), torch.ones(2, 20).double()
    with pytest.raises(ValueError, match="norm is None"):
        fc.fold_norm(random_weights(norm=None), layers, one)
    with pytest.raises(ValueError, match="positional is 'shortformer'"):
        fc.fold_norm(random_weights(norm="rmsnorm"), layers, one)
    weights = random_weights(norm="rmsnorm", positional="none")
    with pytest.raises(ValueError, match=r"gain has shape \[20\], expected \[2, 20\]"):
        fc.fold_norm(weights, one, one)
    with pytest.raises(ValueError, match=r"final_bias has shape \[2, 20\], expected \[20\]"):
        fc.fold_norm(weights, layers, one, None, layers)
    with pytest.raises(ValueError, match="norm is 'rmsnorm'"):
        fc.center(weights)
