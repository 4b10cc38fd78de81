"""Patterns made again from queries and keys: everything computed from such a trace is as from stored ones."""

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.fixture(params=[None, "layernorm"])
def norm(request):
    return request.param


@pytest.mark.parametrize("positional", ["none", "shortformer", "standard", "rotary"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_everything_is_as_from_stored_patterns(norm, positional, mask):
    weights = random_weights(layers=3, heads=4, kv=2, norm=norm, positional=positional)
    stored, made = (fc.trace(weights, random_tokens(), mask, store=store) for store in ("patterns", "qk"))
    real = slice(None) if mask is None else mask.bool()

    def same(function):
        torch.testing.assert_close(function(made), function(stored), rtol=1e-9, atol=1e-11)

    same(lambda t: t.logits()[real])
    same(lambda t: t.pattern(1).permute(0, 2, 1, 3)[real])
    same(lambda t: t.loss)
    same(fc.order_losses)
    same(lambda t: fc.path_logits(t, [(0, 1), (2, 3)])[real])
    same(lambda t: fc.head_ablation(t).loss)
    same(lambda t: fc.pair_ablation(t, kl=True).kl)
    same(lambda t: fc.virtual_head(t, (0, 1), (1, 2)).pattern[real])
    same(lambda t: fc.pair_ablation(t[1:]).loss)


def test_no_square_of_the_context_is_held():
    weights = random_weights(layers=1, heads=2, kv=1, d=8, r=2, vocabulary=11, positional="none", dtype=torch.float32)
    made = fc.trace(weights, random_tokens(1, 3000, 11), store="qk")
    held = sum(x.nbytes for x in (made.patterns[0].q, made.patterns[0].k, made.patterns[0].lse))
    assert held < 3000 * 3000


def test_errors():
    weights = random_weights()
    with pytest.raises(ValueError, match="store is 'all', expected one of patterns, qk"):
        fc.trace(weights, random_tokens(), store="all")
    with pytest.raises(TypeError, match="model is a Linear, expected CircuitWeights"):
        fc.trace(torch.nn.Linear(2, 2), random_tokens(), store="qk")
