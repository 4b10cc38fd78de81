"""`fc.sweep`: the sum of its parts."""

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.sweeps.sweep import count_steps

WEIGHTS, TOKENS = random_weights(3, norm="rmsnorm"), random_tokens(3)


@pytest.mark.parametrize("scope", ["path", "direct", "edge", "joint", "head", "layer"])
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_a_sweep_is_its_parts(scope, attention):
    if (scope, attention) == ("path", "recomputed"):
        with pytest.raises(ValueError, match="paths exist under frozen patterns alone"):
            fc.sweep(WEIGHTS, TOKENS, scope, attention=attention)
        return
    found, run, done = (
        fc.sweep(WEIGHTS, TOKENS, scope, "mean", attention, progress=[].append),
        fc.trace(WEIGHTS, TOKENS),
        [],
    )
    fc.sweep(WEIGHTS, TOKENS, scope, "mean", attention, progress=done.append)
    whole = {"head": fc.head_ablation, "layer": fc.layer_ablation}.get(scope)
    expected = (
        fc.pair_ablation(run, scope, "mean", attention, kl=True)
        if whole is None
        else whole(run, "mean", attention, kl=True)
    )
    assert torch.equal(found.result.values, expected.values)
    assert torch.equal(found.result.kl, expected.kl)
    assert list(found.result.labels) == list(expected.labels)
    assert torch.equal(found.orders, fc.order_losses(run))
    assert all(torch.equal(a, b) for a, b in zip(found.marginals, fc.layer_marginals(run), strict=True))
    steps = count_steps(WEIGHTS, scope)
    assert len(expected.labels) == steps["ablations"]
    assert sum(done) == pytest.approx(sum(steps.values()))
    assert found.seconds > 0


@pytest.mark.parametrize("scope", ["path", "head", "layer"])
@pytest.mark.parametrize("metric", ["nll", "probability"])
def test_examples_are_the_positions_that_are_harmed_most(scope, metric):
    found = fc.sweep(WEIGHTS, TOKENS, scope, metric=metric)
    examples = found.examples(4, context=3)
    again = fc.sweep(WEIGHTS, TOKENS, scope, metric=metric, per_token=True).result
    sign = -1 if metric == "probability" else 1
    for (label, _), example in zip(found.result.top(4), examples, strict=True):
        harm = sign * again.delta.flatten(0, -3)[again.labels.index(label)]
        assert sign * (example.ablated - example.clean) == pytest.approx(float(harm.max()))
        sequence, position = divmod(int(harm.argmax()), harm.shape[1])
        assert example.target == TOKENS[sequence, position + 1]
        assert example.context == TOKENS[sequence, max(0, position - 2) : position + 1].tolist()


def test_an_unknown_scope_is_named():
    with pytest.raises(ValueError, match="scope is 'paths', expected one of path, direct, edge, joint, head, layer"):
        fc.sweep(WEIGHTS, TOKENS, "paths")


def test_weights_are_read_once(monkeypatch):
    """Scores of many runs, and a trace that is given weights, do not read a model's weights again."""
    import pyfastcircuits.adapters.tracing as tracing

    reads = []

    class Library:
        @staticmethod
        def weights_of(model):
            reads.append(model)
            return WEIGHTS

        @staticmethod
        def record(model, weights, given, store):
            raise InterruptedError

    monkeypatch.setattr(tracing, "_library", lambda model: (model, Library))
    model = object()
    weights = fc.CircuitWeights.from_model(model)
    for call in (
        lambda: fc.trace(model, TOKENS, weights=weights),
        lambda: fc.head_scores(model, tokens=TOKENS, weights=weights),
    ):
        with pytest.raises(InterruptedError):
            call()
    assert len(reads) == 1
    with pytest.raises(InterruptedError):
        fc.head_scores(model, tokens=TOKENS)
    assert len(reads) == 2
    with pytest.raises(ValueError, match="weights is given, but the model is a CircuitWeights itself"):
        fc.trace(WEIGHTS, TOKENS, weights=random_weights())
