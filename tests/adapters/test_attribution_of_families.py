"""Attributions of real models: sums are the model's own logits, streams and attention patterns."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, nothing_in_fp32, tokens  # noqa: E402
from test_hugging_face import logits_of  # noqa: E402

import pyfastcircuits as fc  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("gpt2", "pythia", "llama, biases, yarn", "mistral, window", "qwen2", "qwen3", "gemma2, caps that bite")
every_name = pytest.mark.parametrize("name", NAMES)


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def traced(name, padded=False):
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0 if padded else 1
    model = build(name)
    with nothing_in_fp32(model):
        return (
            model,
            fc.trace(model, tokens(), mask),
            logits_of(model, tokens(), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)),
        )


@every_name
@pytest.mark.parametrize("padded", [False, True])
def test_components_sum_to_the_models_own_logit(name, padded):
    _, run, logits = traced(name, padded)
    cap = run.weights.logit_cap
    uncapped = logits if cap is None else cap * (logits / cap).atanh()
    result = fc.direct_logit_attribution(run, targets=5, against=7, positions=range(4, 11), per_token=True)
    exact(result.values.sum(0)[:, 4:], (uncapped[..., 5] - uncapped[..., 7])[:, 4:])
    paths = [path for order in range(4) for path in fc.enumerate_paths(3, run.weights.n_heads, order)]
    by_path = fc.direct_logit_attribution(run, "path", paths=paths, targets=5, against=7, positions=range(4, 11))
    exact(by_path.values.sum(), result.values.sum(0)[:, 4:].mean())
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    for layer in range(4):
        exact(
            fc.project(run, direction, layer=layer, positions=10, per_token=True).values.sum(0)[:, 10],
            run.streams[layer][:, 10] @ direction,
        )
    lens = fc.logit_lens(run, final_norm="frozen")
    exact(lens.values[-1], lens.baseline)
    exact(lens.baseline, run.loss)


@every_name
@pytest.mark.parametrize("padded", [False, True])
def test_terms_sum_to_the_scores_behind_the_models_own_pattern(name, padded):
    model, run, _ = traced(name, padded)
    cap = getattr(model.config, "attn_logit_softcapping", None)
    kv = run.weights.n_heads // run.weights.W_K.shape[1]
    for layer, h in [(0, 2), (2, 1)]:
        with nothing_in_fp32(model):
            q, k, _ = run.forward.qkv(layer, run.normed(run.streams[layer], layer)[None], frozen=True)
            results = [fc.qk_terms(run, (layer, h), by) for by in ("layer", "component")]
        scores = run.forward.score_scale(layer) * q[0, :, h] @ k[0, :, h // kv].mT
        pattern = run.pattern(layer)[:, h, 4:]  # what padding attends to is the family's own affair
        for result in results:
            total = result.values.sum(0)
            exact(total, scores)
            exact(result.share.sum(), torch.tensor(1.0, dtype=torch.float64))
            capped = total if cap is None else cap * (total / cap).tanh()
            exact(capped[:, 4:].masked_fill(pattern == 0, -torch.inf).softmax(-1), pattern)


@pytest.mark.parametrize("name", ["layernorm, folded", "rmsnorm, folded, rotary by pairs, parallel", "no norm"])
def test_heads_are_those_of_transformer_lens(name):
    pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
    from test_lens import hooked

    model, ids = hooked(name), tokens()
    _, cache = model.run_with_cache(ids)
    heads, labels = cache.stack_head_results(layer=-1, return_labels=True)
    targets, against = tokens(seed=1), tokens(seed=2)
    run = fc.trace(model, ids)
    for other in (None, against):
        theirs = cache.logit_attrs(heads, targets, other)
        ours = fc.direct_logit_attribution(
            run, "head", targets=targets, against=other, positions=range(11), per_token=True
        )
        exact(ours.values.flatten(0, 1), theirs)
    assert labels == [f"L{layer}H{head}" for ((layer, head),) in ours.labels]
