"""TransformerLens models, HookedTransformer and TransformerBridge: the sum over orders is the model's own logits."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import build, tokens  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.run.paths import order_streams  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "n_layers": 3,
    "d_model": 24,
    "n_ctx": 32,
    "d_head": 6,
    "n_heads": 4,
    "d_vocab": 89,
    "act_fn": "gelu",
    "dtype": torch.float64,
}
HOOKED = {
    "layernorm": {"normalization_type": "LN"},
    "layernorm, folded": {"normalization_type": "LNPre"},
    "rmsnorm, rotary, grouped": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6, "n_key_value_heads": 2, "gated_mlp": True},
    "rmsnorm, folded, rotary by pairs, parallel": {"normalization_type": "RMSPre", "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
    "no norm": {"normalization_type": None},
    "attention only, shortformer": {"normalization_type": "LNPre", "attn_only": True, "positional_embedding_type": "shortformer"},
    "attention only, shortformer, norms with parameters": {"normalization_type": "LN", "attn_only": True, "positional_embedding_type": "shortformer"},
    "attention only, layernorm": {"normalization_type": "LN", "attn_only": True},
    "alibi": {"normalization_type": "LN", "positional_embedding_type": "alibi"},
    "local": {"normalization_type": "LN", "use_local_attn": True, "window_size": 3, "attn_types": ["local", "global", "local"]},
    "gemma 2's": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6, "n_key_value_heads": 2, "use_normalization_before_and_after": True, "output_logits_soft_cap": 3.0, "attn_scores_soft_cap": 2.0},
    "norms of queries and keys": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6, "use_qk_norm": True},
}  # fmt: skip
BRIDGED = ["gpt2", "pythia", "llama", "mistral, window", "qwen2", "qwen3", "gemma2, caps that bite"]


def randomised(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3
            parameter.copy_(noise + 1 if "ln" in name and name.endswith(".w") else noise)
    return model


def hooked(name):
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    sizes = SIZES if HOOKED[name].get("attn_only") else SIZES | {"d_mlp": 40}
    return randomised(
        lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, **HOOKED[name], device="cpu", seed=0))
    )


def logits_of(model, *arguments, **options):
    with torch.no_grad():
        return model(*arguments, **options)


def assert_exact(run, theirs, limit=1e-9, real=None):
    summed = run.unembed(order_streams(run, run.weights.n_layers).sum(0))
    cap = run.weights.logit_cap
    for ours in (run.logits(), summed if cap is None else cap * (summed / cap).tanh()):
        difference = (ours - theirs) if real is None else (ours - theirs)[real]
        error = float(difference.abs().max() / theirs.abs().max())
        assert error <= limit, f"relative error {error:.3g}"


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_transformer(name):
    model = hooked(name)
    run = fc.trace(model, tokens())
    assert_exact(run, logits_of(model, tokens()))
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for weight in (
        run.weights.W_E,
        run.weights.W_U,
        *run.weights.W_Q,
        *run.weights.W_K,
        *run.weights.W_V,
        *run.weights.W_O,
    ):
        assert weight.untyped_storage().data_ptr() in kept
    assert run.weights.W_V.shape[1] == HOOKED[name].get("n_key_value_heads", 4)


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(name, padding):
    model = hooked(name)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    if padding == "right":
        mask = mask.flip(1)
    run = fc.trace(model, tokens(), mask)
    assert_exact(run, logits_of(model, tokens(), attention_mask=mask), real=mask.bool())


@pytest.mark.parametrize("name", [name for name in HOOKED if name.startswith("attention only")])
def test_attention_only_models_need_no_run_of_theirs(name):
    model = hooked(name)
    weights = fc.CircuitWeights.from_model(model)
    if name.endswith("parameters"):
        assert not weights.attention_only
        return
    assert_exact(fc.trace(weights, tokens()), logits_of(model, tokens()))


def test_ablations_of_a_whole_model():
    model = hooked("layernorm")
    run = fc.trace(model, tokens())
    with torch.no_grad():
        loss = model(tokens(), return_type="loss")
    torch.testing.assert_close(run.loss, loss)
    path = ((0, 1), (2, 3))
    without = (run.logits() - fc.path_logits(run, path))[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(without, tokens()[:, 1:].flatten())
    torch.testing.assert_close(fc.path_ablation(run, [path]).loss[0], expected)


def test_what_is_not_supported_is_named():
    model = hooked("layernorm")
    model.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match="attention_dir is 'bidirectional', and attention that is not causal"):
        fc.CircuitWeights.from_model(model)


def bridge():
    if "HookedTransformer" in vars(lens):
        pytest.skip("TransformerBridge: from TransformerLens 4 on")
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge


def bridged(name, folder, dtype=torch.float64):
    return boot(build(name, dtype), folder, dtype)


def boot(model, folder, dtype=torch.float64):
    """A TransformerBridge around a model of transformers."""
    booted = bridge().boot_transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    words = {"[BOS]": 0, "[PAD]": 1, "word": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word")), bos_token="[BOS]", eos_token="[BOS]", pad_token="[PAD]")  # fmt: skip
    tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return booted(str(folder), hf_model=model, tokenizer=tokenizer, dtype=dtype, device="cpu")


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", BRIDGED)
def test_a_bridge(name, processed, tmp_path):
    model = bridged(name, tmp_path)
    if processed:
        model.enable_compatibility_mode(disable_warnings=True)
    run, theirs = fc.trace(model, tokens()), logits_of(model, tokens())
    assert_exact(run, theirs)


def test_a_native_bridge():
    boot = bridge().boot_native
    from transformer_lens.config import TransformerBridgeConfig

    sizes = {**SIZES, "dtype": torch.float32, "d_mlp": 40, "normalization_type": "LN", "seed": 0}
    model = boot(TransformerBridgeConfig(**sizes))
    assert_exact(fc.trace(model, tokens()), logits_of(model, tokens()), 1e-5)
