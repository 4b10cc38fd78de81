"""Of Hugging Face models too: two models are told apart wherever they differ, and an optimiser step is noticed."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, tokens

import pyfastcircuits as fc


def changed(model, name):
    """A copy with the last parameter of this name changed in one entry."""
    other = copy.deepcopy(model)
    last = [parameter for full, parameter in other.named_parameters() if name in full][-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    return other


@pytest.mark.parametrize(("name", "part", "named"), [("gpt2", "mlp.c_proj.weight", "mlp.c_proj.weight"), ("llama 3, grouped", "mlp.up_proj", "mlp.up_proj"), ("qwen3", "q_norm", "ln_q_w")])  # fmt: skip
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_models_that_differ_outside_their_circuits_are_told_apart(name, part, named, attention):
    model = build(name)
    run, other = fc.trace(model, tokens()), fc.trace(changed(model, part), tokens())
    with pytest.raises(ValueError, match=f"reference is a run of another model: its .*{named}.* differs"):
        fc.head_ablation(run, "mean", attention, reference=other)


def test_models_whose_options_differ_are_told_apart():
    model = build("llama")
    other = copy.deepcopy(model)
    other.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="corrupted is a run of another model: its hidden_act is 'gelu', ours 'silu'"):
        fc.activation_patching(fc.trace(model, tokens()), fc.trace(other, tokens()))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_same_model_read_twice_is_the_same(name):
    model = build(name)
    runs = [fc.trace(x, tokens()) for x in (model, model, copy.deepcopy(model))]
    for other in runs[1:]:
        assert (
            fc.head_ablation(runs[0], "resample", "recomputed", reference=other).delta.abs().max() < 1e-5
        )  # fp32 norms


@pytest.mark.parametrize(("name", "part"), [("gpt2", "mlp.c_proj.weight"), ("gpt2", "attn.c_attn.weight"), ("llama", "norm.weight")])  # fmt: skip
def test_an_edit_in_place_makes_the_trace_stale(name, part):
    model = build(name)
    run = fc.trace(model, tokens())
    fc.head_ablation(run)
    with torch.no_grad():
        next(p for full, p in model.named_parameters() if part in full).mul_(1.1)
    for use in (lambda: run.loss, lambda: fc.order_losses(run), lambda: fc.head_ablation(run, attention="recomputed")):
        with pytest.raises(RuntimeError, match="changed in place since this run was made"):
            use()


def test_weights_that_were_read_before_give_the_same_run():
    model = build("qwen2")
    weights = fc.CircuitWeights.from_model(model)
    run, again = fc.trace(model, tokens(), weights=weights), fc.trace(model, tokens())
    assert run.weights is weights
    assert torch.equal(run.token_losses, again.token_losses)
