"""Families without a table: exact by observation, or refused; held to what the tables say where there is one."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, nothing_in_fp32, tokens  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.adapters import families, hugging_face  # noqa: E402
from pyfastcircuits.model.norms import normalized  # noqa: E402
from pyfastcircuits.model.queries import queries_or_keys  # noqa: E402
from pyfastcircuits.run.paths import order_streams  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 89, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
UNKNOWN = {  # config.model_type has no table
    "Arcee": {}, "Ernie4_5": {}, "Exaone4": {"head_dim": 8, "sliding_window": 4}, "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 8}, "Helium": {"head_dim": 8}, "Nemotron": {}, "Persimmon": {}, "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    "GPTBigCode": {"n_embd": 32, "n_layer": 3, "n_head": 4}, "HunYuanDenseV1": {"head_dim": 8},
}  # fmt: skip
OF_A_RUN = ("HunYuanDenseV1",)  # the norms of its queries and keys come after they have turned
KNOWN = (
    "llama 3, grouped", "qwen3", "gemma2", "olmo2", "cohere", "phi", "phi3", "granite", "smollm3, a layer that does not rotate",
    "stablelm", "pythia", "starcoder2, window", "falcon, one kv head, parallel",
)  # fmt: skip


def unknown(name):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**SIZES, **UNKNOWN[name]))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    return model.double().eval()


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_that_nobody_named(name):
    model = unknown(name)
    run = fc.trace(model, tokens())
    with torch.no_grad():
        theirs = model(tokens(), use_cache=False).logits
    w = run.weights
    summed = run.unembed(order_streams(run, w.n_layers).sum(0))
    assert float((summed - theirs).abs().max() / theirs.abs().max()) <= 1e-9
    assert torch.isfinite(fc.head_ablation(run, attention="recomputed").values).all()
    stream = run.embedded
    if name in OF_A_RUN:
        with pytest.raises(ValueError, match=r"weights\.qk_norm is 'of a run'.*qk_terms"):
            fc.qk_tables(w, (0, 0))
        return
    read, places = normalized(stream, w), torch.arange(stream.shape[1])
    q, k = (queries_or_keys(w, kind, 0, read, places) for kind in ("Q", "K"))
    scores = w.score_scale(0) * q @ k.repeat_interleave(w.n_heads // k.shape[-3], -3).mT
    pattern = run.pattern(0)
    hidden = pattern == 0
    made = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(made, pattern, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_observed_is_what_the_table_says(name, monkeypatch):
    model = build(name)
    with nothing_in_fp32(model):
        expected = fc.trace(model, tokens())
        monkeypatch.setattr(hugging_face, "FAMILIES", {})
        run = fc.trace(model, tokens())
    torch.testing.assert_close(run.logits(), expected.logits())
    torch.testing.assert_close(fc.head_ablation(run).values, fc.head_ablation(expected).values)
    for layer in range(run.weights.n_layers):
        for weight in ("W_V", "W_O", "W_Q", "W_K"):
            ours, theirs = (x.weights.layer(weight, layer) for x in (run, expected))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gpt_neo, windows",
            "has no table, and its attention goes through neither transformers' interface nor torch's",
        ),
        ("deepseek_v3", "no Linear in model.layers.0.self_attn makes its queries, keys or values by itself"),
    ],
)
def test_what_cannot_be_observed_is_refused(name, message, monkeypatch):
    monkeypatch.setattr(hugging_face, "FAMILIES", {})
    with pytest.raises(ValueError, match=message):
        fc.trace(build(name), tokens())


def test_every_table_is_of_a_model_that_transformers_has():
    known = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(families.FAMILIES) <= known


def test_the_text_model_of_one_that_sees_images():
    sizes = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**sizes, "image_size": 14, "patch_size": 14}
    config = transformers.Gemma3Config(text_config={**SIZES, "head_dim": 8, "sliding_window": 4}, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    model.set_attn_implementation("eager")
    run = fc.trace(model, tokens())
    torch.testing.assert_close(run.logits(), model(tokens(), use_cache=False).logits.detach())
    assert torch.isfinite(fc.head_ablation(run, attention="recomputed").values).all()
