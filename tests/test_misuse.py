"""What is no argument at all: other keywords, missing packages, layers that are none, tensors without values, bad files."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits import ops

WEIGHTS, TOKENS = random_weights(), random_tokens()
RUN = fc.trace(WEIGHTS, TOKENS)
NONE = random_weights(0)
BARE = fc.trace(NONE, TOKENS)
CLASSES = [name for name in fc.__all__ if isinstance(getattr(fc, name), type)]


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_keyword_names_the_class_that_was_called(name):
    with pytest.raises(TypeError, match=rf"^{name}\.__(init|new)__\(\) got an unexpected keyword argument 'colour'"):
        getattr(fc, name)(colour=3)


def test_a_wrong_keyword_of_a_method_names_it_alone():
    for method in (RUN.pattern, RUN.logits, RUN.attend, WEIGHTS.layer, fc.head_ablation(RUN).top):
        with pytest.raises(TypeError, match=rf"^{method.__name__}\(\) got an unexpected keyword argument 'colour'"):
            method(colour=3)


@pytest.mark.parametrize("call", [lambda f: WEIGHTS.save(f), lambda f: fc.load_weights("induction-2l")])
def test_without_safetensors(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs? (the )?safetensors( package)?: pip install "):
        call(tmp_path / "model.safetensors")


def test_circuit_weights_are_no_model_of_another_library():
    with pytest.raises(TypeError, match="model is a CircuitWeights already, expected a model of another library"):
        fc.CircuitWeights.from_model(WEIGHTS)
    for call in (fc.head_scores, fc.induction_heads):
        with pytest.raises(ValueError, match="weights is given, but the model is a CircuitWeights itself"):
            call(WEIGHTS, weights=random_weights())


def test_queries_and_keys_of_weights_that_learn():
    """No message speaks of tensors that users do not have."""
    learning = random_weights()
    learning.W_V.requires_grad_()
    with pytest.raises(ValueError, match=r"store is 'qk'.*trace under torch\.no_grad\(\), or with store='patterns'"):
        fc.trace(learning, TOKENS, store="qk")
    with torch.no_grad():
        run = fc.trace(learning, TOKENS, store="qk")
    fc.head_ablation(run).values.sum().backward()
    assert learning.W_V.grad.abs().max() > 0


LAYERS = {
    "pattern": lambda run, x: run.pattern(x),
    "z": lambda run, x: run.z(x),
    "attend": lambda run, x: run.attend(run.final, x),
    "post norm": lambda run, x: run.apply_post_norm(run.final, x),
    "weights": lambda run, x: run.weights.layer("W_Q", x),
    "head of weights": lambda run, x: run.weights.head("W_Q", x, 0),
    "bias": lambda run, x: run.weights.bias("Q", x),
    "circuit": lambda run, x: fc.ov_circuit(run.weights, (x, 0)),
    "tables": lambda run, x: fc.qk_tables(run.weights, (x, 0)),
    "path": lambda run, x: fc.path_logits(run, [(x, 0)]),
    "ablation": lambda run, x: fc.head_ablation(run, heads=[(x, 0)]),
    "terms": lambda run, x: fc.qk_terms(run, (x, 0)),
    "ends": lambda run, x: fc.virtual_weights(run.weights, (x, 0), (1, 0)),
    "skip-trigrams": lambda run, x: fc.skip_trigrams(run.weights, (x, 0)),
}


@pytest.mark.parametrize("place", LAYERS)
def test_layers_that_are_none(place):
    with pytest.raises(IndexError, match="the model has no layers"):
        LAYERS[place](BARE, 0)
    for layer in (2, -1):
        with pytest.raises(IndexError, match=rf"{layer}.*(expected 0 to 1|the model has layers 0 to 1)"):
            LAYERS[place](RUN, layer)


def test_streams_stand_in_front_of_layers_or_of_the_final_norm():
    for layer in (-1, 3, 2**40):
        for call in (RUN.non_head_stream, lambda x: RUN.normed(RUN.final, x)):
            with pytest.raises(IndexError, match=rf"layer is {layer}, expected 0 to 2 \(the final norm\)"):
                call(layer)


def test_a_model_without_layers_is_one():
    assert fc.fold_value_biases(NONE) is NONE
    other = fc.trace(NONE, TOKENS.flip(1))
    for found in (fc.head_ablation(BARE), fc.layer_ablation(BARE), fc.composition_ablation(BARE, "K"), fc.sweep(NONE, TOKENS).result, fc.edge_attribution(BARE, other, "Q"), fc.head_scores(NONE, length=4)):  # fmt: skip
        assert found.top(3) == []
    with pytest.raises(ValueError, match="max_order is 1, expected 0 to 0"):
        fc.order_losses(BARE, 1)


def test_no_heads():
    heads = torch.ones(1, 0, 4, 2)
    with pytest.raises(ValueError, match=r"W_Q \[1, 0, 4, 2\].*must not be zero"):
        fc.CircuitWeights(torch.ones(3, 4), heads, heads, heads, heads.mT, torch.ones(4, 3))


def test_a_vocabulary_of_one_token():
    weights, tokens = random_weights(vocabulary=1), torch.zeros(2, 5).long()
    run = fc.trace(weights, tokens)
    assert not fc.order_losses(run).any()
    assert fc.head_ablation(run, kl=True).kl.abs().max() < 1e-12
    assert not fc.head_ablation(run, metric="rank").values.any()
    assert fc.copying_accuracy(weights).top1.all()
    assert fc.skip_trigrams(weights, (0, 0), k=1).top(1) == []
    with pytest.raises(ValueError, match="a vocabulary of 1 token"):
        fc.head_scores(weights, length=4)
    assert fc.head_scores(weights, tokens=tokens).values.isfinite().all()
    with pytest.raises(IndexError, match=r"tokens\[0, 0\] is 1, expected 0 to 0"):
        fc.trace(weights, tokens + 1)


LONG = {
    "seed": lambda x: fc.head_scores(WEIGHTS, length=4, seed=x),
    "offset": lambda x: fc.qk_circuit(random_weights(positional="rotary"), (0, 1), offset=x),
    "order": lambda x: fc.enumerate_paths(2, 2, x),
    "window": lambda x: ops.attention_lse(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), window=x),
    "targets": lambda x: fc.head_ablation(RUN, targets=x),
    "positions": lambda x: fc.head_ablation(RUN, positions=[x]),
    "rows": lambda x: fc.top_per_row(fc.bigrams(WEIGHTS), 2, rows=[x]),
    "source_tokens": lambda x: fc.skip_trigrams(WEIGHTS, (0, 0), [x]),
    "among": lambda x: fc.skip_trigrams(WEIGHTS, (0, 0), [1], among=[x]),
}


@pytest.mark.parametrize("name", LONG)
def test_integers_beyond_64_bits(name):
    for number in (2**70, -(2**70)):
        with pytest.raises(
            (TypeError, ValueError), match=rf"{name} is .*, expected (an integer|integers) of at most 64 bits"
        ):
            LONG[name](number)


def test_ids_beyond_int64_do_not_wrap():
    ids = torch.tensor([[2**63 + 1, 1]], dtype=torch.uint64)
    with pytest.raises(IndexError, match=rf"tokens\[0, 0\] is {2**63 + 1}, expected 0 to 96"):
        fc.trace(WEIGHTS, ids)
    with pytest.raises(IndexError, match=r"targets\[0\] is \d+, expected 0 to 11"):
        ops.sweep_nll(torch.ones(2, 12), torch.ones(1, 2, 4), torch.ones(1, 4, 12), ids[0])


def test_top_of_fewer_than_none():
    with pytest.raises(ValueError, match="n is -1, expected at least 0"):
        fc.head_ablation(RUN).top(-1)


META = {
    "tokens": lambda x: fc.trace(WEIGHTS, x(TOKENS)),
    "W_E": lambda x: WEIGHTS.to("meta"),
    "targets": lambda x: fc.head_ablation(RUN, targets=x(TOKENS)),
    "positions": lambda x: fc.head_ablation(RUN, positions=x(TOKENS > 3)),
    "direction": lambda x: fc.project(RUN, x(WEIGHTS.W_U[:, 0])),
    "stream": lambda x: RUN.attend(x(RUN.final), 0),
    "streams": lambda x: RUN.stream_losses(x(RUN.final[None])),
    "losses": lambda x: RUN.mean(x(RUN.token_losses)),
    "sequences": lambda x: RUN[x(torch.tensor([0]))],
    "rows": lambda x: fc.top_per_row(fc.bigrams(WEIGHTS), 1, rows=x(torch.tensor([1]))),
    "row_weights": lambda x: fc.top_entries(fc.bigrams(WEIGHTS), 1, row_weights=x(torch.ones(97))),
    "scores": lambda x: fc.composition_z_scores(WEIGHTS, "K", x(fc.composition_scores(WEIGHTS, "K"))),
    "gain": lambda x: fc.fold_norm(random_weights(norm="rmsnorm", positional="none"), x(torch.ones(2, 20)), torch.ones(20)),
    "B": lambda x: fc.FactoredMatrix(torch.ones(2, 2), x(torch.ones(2, 2))),
    "other": lambda x: fc.FactoredMatrix(torch.ones(2, 2), torch.ones(2, 2)) @ x(torch.ones(2, 2)),
    "basis": lambda x: ops.sweep_nll(torch.ones(3, 12), torch.ones(2, 3, 4), x(torch.ones(1, 4, 12)), torch.tensor([1, 5, 11])),
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_tensors_without_values_are_named(name):
    """torch itself gives memory that nobody wrote for the product of a tensor on the CPU and one on meta."""
    with pytest.raises(ValueError, match=rf"^{name}(\[0\])? is on meta, "):
        META[name](lambda tensor: tensor.to("meta"))


def test_factors_and_streams_are_tensors_of_numbers():
    eye = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8)
    for wrong in (None, [[1.0]], np.eye(3), eye.to_sparse(), quantised, eye.to(torch.float8_e4m3fn), eye[0]):
        with pytest.raises((TypeError, ValueError), match=r"^A (is|has) .*, expected "):
            fc.FactoredMatrix(wrong, eye)
    for dtype in (torch.int64, torch.bool):
        whole = fc.FactoredMatrix(eye.to(dtype), eye.to(dtype))
        for call in (whole.svd, whole.norm, lambda m=whole: fc.top_entries(m, 1)):
            with pytest.raises(TypeError, match=rf"matrix has dtype {dtype}, expected floating point"):
                call()
    with pytest.raises(TypeError, match=r"matrix has dtype torch\.complex64, expected floating point"):
        fc.top_entries(fc.FactoredMatrix(eye.cfloat(), eye.cfloat()), 1)
    with pytest.raises(ValueError, match="A or B holds NaN or infinity"):
        fc.FactoredMatrix(eye * torch.nan, eye).svd()
    with pytest.raises(TypeError, match=r"eigenvalues has dtype torch\.bool, expected complex"):
        fc.positivity(eye.bool())
    assert fc.positivity(torch.tensor([torch.nan, 1])).isnan()
    for wrong in (RUN.final.long(), RUN.final.cfloat()):
        with pytest.raises(TypeError, match=r"stream has dtype .*, expected floating point"):
            RUN.attend(wrong, 0)
    for wrong in (RUN.final[0], RUN.final[:, :3], RUN.final[..., :4]):
        with pytest.raises(ValueError, match=r"stream has shape .*, expected \[\.\.\., 2, 9, 20\]"):
            RUN.attend(wrong, 0)
    for name, index in (("tokens", TOKENS.cfloat()), ("mask", TOKENS.cfloat())):
        with pytest.raises(TypeError, match=rf"{name} is torch\.complex64, expected a tensor of"):
            fc.trace(WEIGHTS, **({"tokens": TOKENS} | {name: index}))


def test_sequences_of_a_trace():
    assert torch.equal(RUN[torch.tensor([-1, 0])].tokens, TOKENS.flip(0))
    assert torch.equal(RUN[torch.tensor([False, True])].tokens, TOKENS[1:])
    for wrong in (torch.tensor([2]), torch.tensor([-3])):
        with pytest.raises(IndexError, match=r"sequences\[0\] is -?\d, expected 0 to 1"):
            RUN[wrong]
    for wrong in (torch.tensor([True]), TOKENS, torch.tensor(1)):
        with pytest.raises(ValueError, match="sequences has shape "):
            RUN[wrong]
    with pytest.raises(TypeError, match=r"sequences has dtype torch\.float32, expected integers or a mask"):
        RUN[torch.ones(2)]


FILES = {
    "rotary_base": [0, -1, float("nan"), float("inf"), "3", True, None],
    "attention_scale": ["3", -1, 0, float("nan"), [1]],
    "embed_scale": [float("nan"), "x", None],
    "logit_cap": [float("inf"), 0, "x"],
    "eps": [float("nan"), -1, "x"],
    "rotary_dim": [1.5, 3, True, "4", 100],
    "norm": ["x", 3],
    "attention_only": ["yes", 1, None],
    "W_E": [3],
}


@pytest.mark.parametrize("option", FILES)
def test_options_in_files_are_checked(option, tmp_path):
    file = tmp_path / "model.safetensors"
    random_weights(positional="rotary").save(file)
    tensors = load_file(file)
    for value in FILES[option]:
        save_file(tensors, file, {"pyfastcircuits": json.dumps({"positional": "rotary", option: value})})
        with pytest.raises(
            ValueError, match=rf"model\.safetensors does not hold a CircuitWeights: {option} is .*expected"
        ):
            fc.load_weights(file)


@pytest.mark.parametrize("text", ["[1]", '"x"', "null", "{", "[" * 100_000])
def test_options_in_files_are_an_object(text, tmp_path):
    file = tmp_path / "model.safetensors"
    random_weights().save(file)
    save_file(load_file(file), file, {"pyfastcircuits": text})
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold a CircuitWeights: "):
        fc.load_weights(file)
