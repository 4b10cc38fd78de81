"""The clean run, against the model written out head by head."""

import pytest
import torch
from support import naive
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_trace_is_the_model(layers, norm, positional):
    w = random_weights(layers, norm=norm, positional=positional)
    tokens = random_tokens()
    run, expected = fc.trace(w, tokens), naive.Run(w, tokens)
    torch.testing.assert_close(run.logits(), expected.logits, rtol=1e-11, atol=1e-11)
    for layer in range(layers):
        torch.testing.assert_close(run.pattern(layer), expected.patterns[layer], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(run.pattern(layer).sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
        torch.testing.assert_close(run.scales[layer], expected.scales[layer][..., 0])
    nll = -expected.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(run.token_losses, nll, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(run.loss, nll.mean())


def test_no_biases_and_a_scale_of_ones_own():
    w = fc.CircuitWeights(**dict(random_weights(biases=False, positional="none").tensors()), attention_scale=0.7)
    torch.testing.assert_close(fc.trace(w, random_tokens()).logits(), naive.Run(w, random_tokens()).logits)


def test_one_sequence_may_come_without_a_batch():
    w, tokens = random_weights(), random_tokens()
    both, one = fc.trace(w, tokens), fc.trace(w, tokens[1])
    torch.testing.assert_close(one.logits(), both.logits()[1:])
    torch.testing.assert_close(both[1:].logits(), both.logits()[1:])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_lower_precision_weights_compute_in_fp32(dtype, error):
    w = random_weights(3, norm="layernorm", dtype=dtype)
    run, exact = fc.trace(w, random_tokens()), fc.trace(w.to(torch.float64), random_tokens())
    assert run.logits().dtype == torch.float32
    assert run.loss.dtype == torch.float32
    torch.testing.assert_close(run.logits().double(), exact.logits(), rtol=error, atol=error * 10)


BAD = {
    "empty": (torch.zeros(2, 0, dtype=torch.long), ValueError, r"tokens has shape \[2, 0\]: .* at least 2 tokens"),
    "one token": (torch.zeros(1, dtype=torch.long), ValueError, r"tokens has shape \[1\]"),
    "no sequence": (torch.zeros(0, 5, dtype=torch.long), ValueError, r"tokens has shape \[0, 5\]"),
    "too long": (torch.zeros(40, dtype=torch.long), ValueError, "tokens has 40 positions, but W_pos has only 32"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.long), ValueError, r"expected \[T\] or \[B, T\]"),
    "out of range": (torch.tensor([[1, 2], [3, 97]]), IndexError, r"tokens\[1, 1\] is 97, expected 0 to 96"),
    "negative": (torch.tensor([1, -2]), IndexError, r"tokens\[1\] is -2, expected 0 to 96"),
    "floats": (torch.tensor([1.0, 2.0]), TypeError, "tokens is torch.float32"),
    "a list": ([1, 2], TypeError, "tokens is a list, expected a tensor"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tokens_are_named(what):
    tokens, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.trace(random_weights(), tokens)


def test_weights_of_another_type_and_layers_that_are_not_there():
    with pytest.raises(TypeError, match="model is a dict, expected CircuitWeights"):
        fc.trace({}, random_tokens())
    with pytest.raises(IndexError, match="layer is 2, expected 0 to 1"):
        fc.trace(random_weights(), random_tokens()).pattern(2)
