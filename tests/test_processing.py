"""process_weights: TransformerLens' default processing leaves log probabilities as they are; its parts do what they say.

tests/adapters/test_lens_processing.py compares with TransformerLens itself.
"""

from dataclasses import replace

import pytest
import torch
from support.random_models import random_tokens, random_weights
from test_norm_parameters import BIAS, FINAL_BIAS, FINAL_GAIN, GAIN

import pyfastcircuits as fc
from pyfastcircuits.model.layers import LayerStack

TOKENS = random_tokens()
HELD = {"ln_w": GAIN, "ln_b": BIAS, "ln_final_w": FINAL_GAIN, "ln_final_b": FINAL_BIAS}
NORMS = {"none": {}, "layernorm": HELD, "layernorm, folded": {}, "rmsnorm": HELD, "rmsnorm, no biases": {"ln_w": GAIN}}


def model(name, **more):
    norm = None if name == "none" else name.partition(",")[0]
    return replace(random_weights(norm=norm, positional="standard"), **NORMS[name], **more)


def log_probabilities(weights):
    return fc.trace(weights, TOKENS).logits().log_softmax(-1)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("scaled", [False, True])
def test_log_probabilities_do_not_change(name, scaled):
    weights = model(name, **({"embed_scale": 3.0, "write_scale": 0.5} if scaled else {}))
    processed = fc.process_weights(weights)
    torch.testing.assert_close(log_probabilities(processed), log_probabilities(weights))
    assert processed.b_V is None
    assert not [part for part, _ in processed.tensors() if part.startswith("ln_")]
    torch.testing.assert_close(processed.W_U.mean(1), torch.zeros(20, dtype=torch.float64))
    centred = name.startswith("layernorm")
    for tensor, dim in ((processed.W_E, -1), (processed.W_O, -1), (processed.b_O, -1), (processed.W_Q, 2)):
        assert bool((tensor.mean(dim).abs() < 1e-12).all()) == centred
    torch.testing.assert_close(fc.process_weights(processed).W_Q, processed.W_Q)


@pytest.mark.parametrize("part", ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"])
def test_each_part_alone(part):
    weights = model("layernorm")
    parts = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    one = fc.process_weights(weights, **{name: name == part for name in parts})
    torch.testing.assert_close(log_probabilities(one), log_probabilities(weights))
    assert (one.ln_w is None) == (part == "fold_ln")
    assert (one.b_V is None) == (part == "fold_value_biases")
    assert (float(one.W_E.mean(-1).abs().max()) < 1e-12) == (part == "center_writing_weights")
    assert (float(one.W_U.mean(-1).abs().max()) < 1e-12) == (part == "center_unembed")


def test_capped_logits_are_not_moved():
    weights = model("layernorm", logit_cap=3.0)
    torch.testing.assert_close(fc.trace(fc.process_weights(weights), TOKENS).loss, fc.trace(weights, TOKENS).loss)


def test_layers_apart_smaller_dtypes_and_no_layers():
    weights = model("layernorm").to(torch.bfloat16)
    apart = replace(
        weights, **{name: LayerStack(list(getattr(weights, name))) for name in ("W_Q", "W_K", "W_V", "W_O")}
    )
    ours, expected = fc.process_weights(apart), fc.process_weights(weights.to(torch.float64))
    torch.testing.assert_close(ours.W_K.double(), expected.W_K, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_probabilities(ours).double(), log_probabilities(expected), rtol=1e-2, atol=1e-1)
    none = fc.process_weights(random_weights(layers=0, norm="layernorm", positional="none"))
    assert none.n_layers == 0


def test_what_would_change_the_model_is_refused():
    weights = random_weights(norm="layernorm", positional="shortformer")
    shifted = replace(weights, ln_w=GAIN, attention_only=False)
    with pytest.raises(ValueError, match=r"weights.positional is 'shortformer', and its norms have parameters"):
        fc.process_weights(shifted)
    assert fc.process_weights(shifted, fold_ln=False).ln_w is GAIN
    torch.testing.assert_close(log_probabilities(fc.process_weights(weights)), log_probabilities(weights))
    sinks = replace(weights, sinks=torch.zeros(2, 4, dtype=torch.float64), attention_only=False)
    with pytest.raises(ValueError, match=r"weights.sinks is given"):
        fc.process_weights(sinks)
