"""Ablations and patching of Hugging Face models equal plain reruns with hooks on their own modules, in every family."""

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, tokens
from support.plain import Plain

import pyfastcircuits as fc

NAMES = ["gpt2", "pythia", "gpt-neox, MLP after the attention", "llama", "mistral, window", "qwen2", "qwen3", "gemma2, caps that bite"]  # fmt: skip
every_family = pytest.mark.parametrize("name", NAMES)


def nll(logits, given):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())


def assert_same(ours, theirs):
    """transformers computes RMS norms and softmax in fp32 whatever the model's dtype: what is made anew differs by that."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@every_family
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_heads_out(name, attention):
    model, given, frozen = build(name), tokens(), attention == "frozen"
    run, plain = fc.trace(model, given), Plain(model, given)
    assert_same(run.loss, nll(plain.clean_logits, given))
    sets = [[(0, 1)], [(1, 0)], [(0, 0), (1, 1), (1, 2)]]
    for mode in ("zero", "mean", "resample"):
        found = fc.head_ablation(run, mode, attention, heads=sets)
        for value, heads in zip(found.values, sets, strict=True):
            z = {head: plain.clean_z[head] for head in heads}
            z = {
                head: {"zero": 0 * x, "mean": x.mean((0, 1)).expand_as(x), "resample": x.roll(1, 0)}[mode]
                for head, x in z.items()
            }
            assert_same(value, nll(plain.run(z, frozen=frozen), given))


@every_family
@pytest.mark.parametrize("input", ["Q", "K", "V"])
def test_one_input_without_one_source(name, input):
    model, given = build(name), tokens()
    if getattr(model.config, "num_key_value_heads", None) not in (None, model.config.num_attention_heads):
        model = build(name, num_key_value_heads=model.config.num_attention_heads)
    run, plain = fc.trace(model, given), Plain(model, given)
    pairs = [((0, 1), (1, 0)), ((0, 0), (2, 1)), ((1, 2), (2, 2))]
    found = fc.composition_ablation(run, input, pairs=pairs)
    for i, (source, to) in enumerate(pairs):
        written = plain.clean_z[source] @ plain.out_weight(*source)
        stream = plain.clean_streams[to[0]] - plain.posted(written, source[0])
        assert_same(found.values[i], nll(plain.run(inputs={(*to, input): stream}), given))


@every_family
def test_activation_patching(name):
    model, given, others = build(name), tokens(), tokens(seed=1)
    clean, corrupted = Plain(model, given), Plain(model, others)
    found = fc.activation_patching(fc.trace(model, given), fc.trace(model, others), heads=[(0, 1), (1, 2)])
    for value, head in zip(found.values, [(0, 1), (1, 2)], strict=True):
        assert_same(value, nll(corrupted.run({head: clean.clean_z[head]}), given))
    assert_same(found.baseline, nll(corrupted.clean_logits, given))


@every_family
def test_first_order_and_exact(name):
    model, given = build(name), tokens()
    runs = fc.trace(model, given), fc.trace(model, tokens(seed=1))
    for effect in ("direct", "total"):
        found = fc.edge_attribution(*runs, "K", effect, exact=2)
        assert int(found.extra["error"].isfinite().sum()) == 2
        assert found.values.isfinite().all()


def test_padding_is_left_out():
    model, given = build("gpt2"), tokens()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    run, plain = fc.trace(model, given, mask), Plain(model, given, mask, position_ids=places)
    found = fc.head_ablation(run, "zero", "recomputed", heads=[(0, 1)])
    logits = plain.run({(0, 1): 0 * plain.clean_z[0, 1]})
    real = (mask[:, :-1] & mask[:, 1:]).bool()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][real], given[:, 1:][real])
    assert_same(found.values[0], expected)
