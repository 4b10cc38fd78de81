"""Gradients with respect to weights: order losses, path logits and composition scores, against finite differences."""

from dataclasses import replace

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.run.model_guard import ModelGuard

NAMES = ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")


def differentiable(function, weights, names=NAMES):
    """gradcheck of function(weights) with respect to its tensors."""
    tensors = [getattr(weights, name).detach().clone().requires_grad_() for name in names]

    def of(*values):
        return function(replace(weights, **dict(zip(names, values, strict=True))))

    return torch.autograd.gradcheck(of, tensors, fast_mode=True, atol=1e-6)


def small(**changes):
    sizes = {"layers": 2, "heads": 2, "kv": 1, "d": 6, "r": 2, "vocabulary": 11}
    return random_weights(**(sizes | changes))


TOKENS = random_tokens(2, 5, 11)


@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("positional", ["none", "shortformer", "standard", "rotary"])
def test_order_losses(norm, positional):
    weights = small(norm=norm, positional=positional) if positional != "rotary" else small(norm=norm)
    assert differentiable(lambda w: fc.order_losses(fc.trace(w, TOKENS)), weights)
    assert differentiable(lambda w: fc.order_losses(fc.trace(w, TOKENS), 1, per_token=True), weights, ("W_V", "b_U"))
    assert differentiable(lambda w: fc.trace(w, TOKENS).loss, weights)


@pytest.mark.parametrize("path", [(), ((1, 0),), ((0, 1), (1, 0))])
def test_path_logits(path):
    assert differentiable(lambda w: fc.path_logits(fc.trace(w, TOKENS), path), small(norm="layernorm"))


def test_final_norm_with_parameters_and_cap():
    g = torch.Generator().manual_seed(1)
    extra = {name: torch.randn(6, generator=g, dtype=torch.float64) for name in ("ln_final_w", "ln_final_b")}
    weights = replace(small(norm="layernorm"), logit_cap=2.0, **extra)
    names = ("W_U", "b_U", "ln_final_w", "ln_final_b", "W_O")
    assert differentiable(lambda w: fc.order_losses(fc.trace(w, TOKENS)), weights, names)


def of_weights(run, weights):
    """The frozen run with other weights in the place of its own."""
    return replace(run, guard=ModelGuard.of(weights, run.forward))


def test_a_trace_without_gradients_holds_attention():
    """Then only what is linear moves: W_Q and W_K have no gradient, and W_O's is that of frozen patterns."""
    weights = small()
    names = ("W_Q", "W_K", "W_V", "W_O")
    tensors = {name: getattr(weights, name).clone().requires_grad_() for name in names}
    free = replace(weights, **tensors)
    with torch.no_grad():
        clean = fc.trace(free, TOKENS)
    fc.order_losses(clean).sum().backward()
    assert tensors["W_Q"].grad is None
    assert tensors["W_K"].grad is None
    step = torch.zeros_like(weights.W_O)
    step[1, 0, 1, 2] = 1e-6
    moved = (
        fc.order_losses(of_weights(clean, replace(weights, W_O=weights.W_O + sign * step))).sum() for sign in (1, -1)
    )
    difference = float(next(moved) - next(moved)) / 2e-6
    assert float(tensors["W_O"].grad[1, 0, 1, 2]) == pytest.approx(difference, rel=1e-6)


def test_no_graph_without_a_wish():
    clean = fc.trace(small(), TOKENS)
    assert not clean.final.requires_grad
    assert not fc.order_losses(clean).requires_grad


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("kv", [1, 2])
def test_composition_scores(kind, kv):
    weights = small(layers=3, kv=kv, d=7, biases=False)
    assert differentiable(lambda w: fc.composition_scores(w, kind), weights, ("W_Q", "W_K", "W_V", "W_O"))


def test_gradients_of_a_whole_block_of_rows_and_of_blocks_are_the_same(monkeypatch):
    weights = small()
    gradients = []
    for block in (12 << 20, 8 * 11):
        monkeypatch.setattr("pyfastcircuits.run.memory.BLOCK_BYTES", block)
        W_U = weights.W_U.clone().requires_grad_()
        fc.trace(replace(weights, W_U=W_U), TOKENS).loss.backward()
        gradients.append(W_U.grad)
    torch.testing.assert_close(*gradients)
