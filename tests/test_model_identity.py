"""Runs of two models are told apart wherever they differ, and a trace notices that its weights have been changed."""

from dataclasses import replace

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.model.layers import LayerStack


def runs(change, **options):
    """A run of a model, and one of the same model with something changed."""
    weights = random_weights(3, norm="rmsnorm", positional="rotary", **options)
    tokens = random_tokens()
    return fc.trace(weights, tokens), fc.trace(change(weights), tokens)


def edited(weights, name, *place):
    tensor = getattr(weights, name).clone()
    tensor[place] += 1e-3
    return replace(weights, **{name: tensor})


CHANGES = {
    "W_O of the last layer": (lambda w: edited(w, "W_O", -1, -1, -1, -1), "its W_O differs"),
    "W_K of the second layer": (lambda w: edited(w, "W_K", 1, 0, 0, 0), "its W_K differs"),
    "the last token's embedding": (lambda w: edited(w, "W_E", -1, -1), "its W_E differs"),
    "the last column of W_U": (lambda w: edited(w, "W_U", -1, -1), "its W_U differs"),
    "eps": (lambda w: replace(w, eps=1e-4), "its eps is 0.0001, ours 1e-05"),
    "attention scale": (lambda w: replace(w, attention_scale=3.0), "its attention_scale is 3.0, ours None"),
    "positions": (lambda w: replace(w, positional="none", rotary_dim=None), "its positional is 'none', ours 'rotary'"),
    "rotary base": (lambda w: replace(w, rotary_base=5e5), "its rotary_base is 500000.0, ours 10000.0"),
    "norm": (lambda w: replace(w, norm="layernorm"), "its norm is 'layernorm', ours 'rmsnorm'"),
    "a cap": (lambda w: replace(w, logit_cap=30.0), "its logit_cap is 30.0, ours None"),
    "a bias": (lambda w: replace(w, b_O=None), "only one of the two has b_O"),
    "dtype": (lambda w: w.to(torch.float32), "its W_E is torch.float32, ours torch.float64"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_model_is_refused(what):
    change, message = CHANGES[what]
    run, other = runs(change)
    for call in (
        lambda: fc.path_patching(run, other, "K"),
        lambda: fc.activation_patching(run, other),
        lambda: fc.edge_attribution(run, other, "K"),
        lambda: fc.head_ablation(run, "mean", reference=other),
    ):
        with pytest.raises(ValueError, match=r"(corrupted|reference) is a run of another model: " + message):
            call()


def test_equal_weights_in_other_tensors_are_the_same_model():
    def copied(weights):
        return replace(weights, **{name: tensor.clone() for name, tensor in weights.tensors()})

    def apart(weights):
        return replace(weights, **{f"W_{x}": LayerStack(list(getattr(weights, f"W_{x}").clone())) for x in "QKVO"})

    for change in (copied, apart):
        run, other = runs(change)
        assert fc.head_ablation(run, "resample", reference=other).delta.abs().max() < 1e-12


USES = {
    "loss": lambda run: run.loss,
    "token losses": lambda run: run.token_losses,
    "logits": lambda run: run.logits(),
    "orders": fc.order_losses,
    "marginals": fc.layer_marginals,
    "a path": lambda run: fc.path_logits(run, [(0, 1)]),
    "heads": fc.head_ablation,
    "recomputed": lambda run: fc.head_ablation(run, attention="recomputed"),
    "pairs": fc.pair_ablation,
    "composition": lambda run: fc.composition_ablation(run, "K"),
    "attribution": fc.direct_logit_attribution,
    "lens": fc.logit_lens,
    "terms": lambda run: fc.qk_terms(run, (1, 0)),
    "virtual head": lambda run: fc.virtual_head(run, (0, 0), (1, 1)),
    "subspaces": lambda run: fc.subspaces(run, (0, 0), (1, 1)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["W_U", "W_Q", "b_V"])
def test_weights_that_change_after_a_trace_are_noticed(use, name):
    weights = random_weights(2)
    run = fc.trace(weights, random_tokens())
    USES[use](run)
    with torch.no_grad():
        getattr(weights, name).mul_(1.5)
    for stale in (run, run[:1]):
        with pytest.raises(RuntimeError, match=rf"changed in place since this run was made \({name}"):
            USES[use](stale)
    USES[use](fc.trace(weights, random_tokens()))


def test_an_optimiser_step_makes_a_trace_stale_and_the_next_trace_is_right():
    weights = random_weights(2, norm="layernorm")
    learning = replace(weights, b_U=weights.b_U.clone().requires_grad_(), W_E=weights.W_E.clone().requires_grad_())
    optimiser = torch.optim.SGD([learning.b_U, learning.W_E], lr=0.1)
    losses = []
    for _ in range(3):
        run = fc.trace(learning, random_tokens())
        assert fc.head_ablation(run).baseline.item() == pytest.approx(run.loss.item())
        assert fc.order_losses(run)[-1].item() == pytest.approx(run.loss.item())
        losses.append(run.loss.item())
        run.loss.backward()
        optimiser.step()
        with pytest.raises(RuntimeError, match="trace the model again"):
            fc.head_ablation(run)
    assert losses[0] > losses[1] > losses[2]


def test_tensors_of_inference_mode_have_no_counter_and_work():
    with torch.inference_mode():
        run = fc.trace(random_weights(2), random_tokens())
    assert fc.head_ablation(run).baseline.item() == pytest.approx(run.loss.item())


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("heads", [2, 5, 9])
def test_results_do_not_depend_on_threads(threads, heads):
    """Bit by bit, also where bases of several heads are made: whether the kernel makes them is a matter of shapes.

    Widths are multiples of 16: torch's products of others depend on threads on some processors.
    """
    weights = random_weights(3, heads, heads, 96, 16, 1201, norm="rmsnorm", positional="none", dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            run = fc.trace(weights, random_tokens(2, 40, 1201))
            results = [fc.head_ablation(run, effect="direct", kl=True), fc.head_ablation(run), fc.pair_ablation(run)]
            found.append([x for result in results for x in (result.values, result.baseline)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
