"""head_scores of models of other libraries: by the model's own patterns and its whole logits."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.adapters.start import start_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def copying(run):
    """From every source's logits [B, T, V], as every destination sees them."""
    weights, out = run.weights, []
    for layer in range(weights.n_layers):
        stream = run.non_head_stream(layer) + sum(run.attend(x, i) for i, x in enumerate(out))
        out.append(stream)
    scores = torch.zeros(weights.n_layers, weights.n_heads, dtype=torch.float64)
    silent = run.unembed(torch.zeros_like(run.final))
    for layer, stream in enumerate(out):
        for head in range(weights.n_heads):
            own = every = 0.0
            written = run.normed(stream, layer) @ weights.head("W_V", layer, head) @ weights.head("W_O", layer, head)
            for s in range(run.tokens.shape[1]):
                everywhere = written[:, s : s + 1].expand_as(run.final)
                logits = run.unembed(run.apply_post_norm(everywhere, layer)) - silent
                for b, row in enumerate(run.tokens):
                    different, token = row.unique(), row[s]
                    raised = (logits[b][:, different] - logits[b][:, different].mean(-1, keepdim=True)).relu()
                    raised = raised * run.pattern(layer)[b, head, :, s : s + 1]
                    own += raised[:, different == token].sum()
                    every += raised.sum()
            scores[layer, head] = 2 * own / every - 1
    return scores


@pytest.mark.parametrize("name", ["gpt2", "llama 3, grouped", "gemma2, caps that bite"])
def test_scores(name):
    model = build(name)
    copies = torch.randperm(88, generator=torch.Generator().manual_seed(0))[:10].view(2, 5) + 1
    tokens = torch.cat((torch.zeros(2, 1, dtype=torch.long), copies, copies), 1)
    scores = fc.head_scores(model, tokens=tokens)
    with torch.no_grad():
        patterns = torch.stack(model(tokens, output_attentions=True).attentions)  # [L, B, H, T, T]
    behind = patterns.diagonal(-4, -2, -1)[..., 2:]
    torch.testing.assert_close(scores.induction, behind.mean((1, 3)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        scores.duplicate_token, patterns.diagonal(-5, -2, -1)[..., 1:].mean((1, 3)), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(scores.previous_token, patterns.diagonal(-1, -2, -1).mean((1, 3)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scores.copying, copying(fc.trace(model, tokens)), rtol=1e-9, atol=1e-9)
    assert len(fc.induction_heads(model, scores).labels) == (scores.values.shape[0] - 1) * scores.values.shape[1]


def test_a_transformer_lens_model():
    lens = pytest.importorskip("transformer_lens")
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    sizes = {"n_layers": 2, "d_model": 24, "n_ctx": 32, "d_head": 6, "n_heads": 4, "d_vocab": 89, "attn_only": True}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, dtype=torch.float64, device="cpu", seed=0))
    scores = fc.head_scores(model, length=6, batch=3, batches=1)
    same = fc.head_scores(fc.CircuitWeights.from_model(model), length=6, batch=3, batches=1)
    for name in scores.measured:
        torch.testing.assert_close(getattr(scores, name), getattr(same, name), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="length is 16, 2 copies and the token in front are 33"):
        fc.head_scores(model, length=16)


def test_the_start_token_is_the_models_own():
    assert build("llama 3, grouped").config.bos_token_id == start_of(build("llama 3, grouped"), 89) == 1
    assert start_of(build("gpt2"), 89) is None  # its configuration names one that this small model does not have


def test_the_start_token_of_a_transformer_lens_model():
    lens = pytest.importorskip("transformer_lens")
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "d_vocab": 89, "attn_only": True}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, device="cpu"))
    assert start_of(model, 89) is None
    model.tokenizer = SimpleNamespace(bos_token_id=5)
    assert start_of(model, 89) == 5
    model.cfg.default_prepend_bos = False
    assert start_of(model, 89) is None
