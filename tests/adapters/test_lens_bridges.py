"""TransformerBridges of many Hugging Face families, as loaded and processed: exact, by runs and by weights, or refused."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
transformers = pytest.importorskip("transformers")

from support.configurations import GROUPED, LLAMA3, SIZE, YARN, tokens  # noqa: E402
from test_lens import assert_exact, boot, bridge, logits_of  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.model.queries import queries_or_keys  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
GPT2 = {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32}
LARGE = {**SIZE, "num_attention_heads": 4}
MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 4.0,
}
CAPPED = {
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 4,
}
FALCON = {"vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
BRIDGED = {
    "gpt2, scores scaled by layer": ("GPT2LMHead", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, scores not scaled": ("GPT2LMHead", GPT2 | {"scale_attn_weights": False}),
    "gpt-j": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),
    "gpt-neo": ("GPTNeoForCausalLM", {"vocab_size": 89, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}),
    "llama 3": ("LlamaForCausalLM", {**SIZE, **GROUPED, "rope_parameters": LLAMA3}),
    "llama, yarn, biases, tied": ("LlamaForCausalLM", {**SIZE, **GROUPED, "rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {**SIZE, **GROUPED, "head_dim": 8}),
    "gemma 2": ("Gemma2ForCausalLM", {**SIZE, **GROUPED, "head_dim": 6, **CAPPED}),
    "gemma 3": ("Gemma3ForCausalLM", {**SIZE, **GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "phi": ("PhiForCausalLM", LARGE),
    "phi 3": ("Phi3ForCausalLM", {**SIZE, **GROUPED, "pad_token_id": 0}),
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon, alibi": ("FalconForCausalLM", FALCON | {"alibi": True}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 89, "hidden_size": 24, "n_layer": 3, "n_head": 4}),
    "opt": ("OPTForCausalLM", {**FALCON, "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 24}),
    "olmo": ("OlmoForCausalLM", {**SIZE, **GROUPED}),
    "olmo 2": ("Olmo2ForCausalLM", {**SIZE, **GROUPED}),
    "olmo 3": ("Olmo3ForCausalLM", {**SIZE, **GROUPED, "sliding_window": 4}),
    "granite": ("GraniteForCausalLM", {**SIZE, **GROUPED, **MULTIPLIED}),
    "cohere": ("CohereForCausalLM", {**SIZE, **GROUPED, "logit_scale": 0.5}),
    "cohere, norms of queries and keys": ("CohereForCausalLM", {**SIZE, **GROUPED, "use_qk_norm": True}),
    "stablelm": ("StableLmForCausalLM", {**SIZE, **GROUPED}),
    "stablelm, norms of queries and keys": ("StableLmForCausalLM", {**SIZE, **GROUPED, "qk_layernorm": True}),
    "starcoder 2": ("Starcoder2ForCausalLM", {**SIZE, **GROUPED}),
    "smollm 3": ("SmolLM3ForCausalLM", {**SIZE, **GROUPED, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
    "mixtral": ("MixtralForCausalLM", {**SIZE, **GROUPED, "num_local_experts": 4}),
    "qwen 3, experts": ("Qwen3MoeForCausalLM", {**SIZE, **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gpt-oss": ("GptOssForCausalLM", {**SIZE, **GROUPED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
}  # fmt: skip
IN_FP32 = ("gpt-j", "gpt-neo", "olmo")  # the model's own code computes scores, logits or norms in fp32
ONLY_FP32 = ("mixtral", "qwen 3, experts", "gpt-oss")  # transformers' experts know no fp64
MASK = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])


def built(kind, options, dtype=torch.float64):
    model_class = getattr(transformers, kind if kind.endswith("LM") or "For" in kind else f"{kind}Model")
    model = model_class._from_config(model_class.config_class(**options), attn_implementation="eager").to(dtype).eval()
    g = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3
        norm = parameter.dim() == 1 and ("norm" in name or "ln_" in name) and not name.endswith("bias")
        parameter.data.copy_(noise + 1 if norm else noise)
    return model


def bridged(name, folder, processed=False):
    dtype = torch.float32 if name in ONLY_FP32 else torch.float64
    model = boot(built(*BRIDGED[name], dtype), folder, dtype)
    if processed:
        model.enable_compatibility_mode(disable_warnings=True)
    return model


def limit(name):
    return 1e-5 if name in ONLY_FP32 else 1e-6 if name in IN_FP32 else 1e-9


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", BRIDGED)
def test_the_sum_over_all_paths_is_the_models_own_logits(name, processed, tmp_path):
    model = bridged(name, tmp_path, processed)
    assert_exact(fc.trace(model, tokens()), logits_of(model, tokens()), limit(name))


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", [name for name in BRIDGED if name != "gpt-oss"])
def test_queries_and_keys_by_the_weights_make_the_models_patterns(name, processed, tmp_path):
    run = fc.trace(bridged(name, tmp_path, processed), tokens())
    w, positions = run.weights, torch.arange(11)
    for layer in range(w.n_layers):
        q, k = (queries_or_keys(w, kind, layer, run.normed(run.streams[layer], layer), positions) for kind in "QK")
        ours = w.score_scale(layer) * q @ k.repeat_interleave(w.n_heads // k.shape[1], 1).mT
        if name == "gemma 2":
            ours = 2 * (ours / 2).tanh()
        if name in ("falcon, alibi", "bloom"):
            continue
        pattern = run.pattern(layer)
        ours = ours.masked_fill(pattern == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(ours, pattern, rtol=2e-5, atol=2e-6)  # rotations and softmax are in fp32
        terms = fc.qk_terms(run, (layer, 1)).values.sum(0)
        if name != "gemma 2":
            terms = terms.masked_fill(pattern[:, 1] == 0, -torch.inf).softmax(-1)
            torch.testing.assert_close(terms, pattern[:, 1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BRIDGED)
def test_left_padding_gives_each_sequence_what_it_gives_alone(name, tmp_path):
    model, x = bridged(name, tmp_path), tokens()
    if name == "falcon, alibi":
        model = model.float()  # its own mask is infinite in the fp32 of its softmax
    run, alone = fc.trace(model, x, MASK), fc.trace(model, x[:1, 4:])
    assert run.logits().isfinite().all()
    torch.testing.assert_close(run.logits()[0, 4:], alone.logits()[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fc.order_losses(run[:1]), fc.order_losses(alone), rtol=1e-4, atol=1e-5)
    again = run.forward.block(0, run.embedded[None])[0]
    torch.testing.assert_close(again[MASK > 0], run.streams[1][MASK > 0], rtol=1e-4, atol=1e-5)


NATIVE = {
    "layernorm": {"normalization_type": "LN"},
    "layernorm, folded": {"normalization_type": "LNPre"},
    "rmsnorm, rotary": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 4, "final_rms": True},
    "rmsnorm, folded": {"normalization_type": "RMSPre", "n_key_value_heads": 2},
    "no norm": {"normalization_type": None},
    "caps": {"normalization_type": "LN", "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "attention scale, output vocabulary": {"normalization_type": "LN", "attn_scale": 1.7, "d_vocab_out": 5},
}  # fmt: skip


@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_bridge(name, attn_only):
    bridge()
    from transformer_lens.config import TransformerBridgeConfig

    sizes = {"n_layers": 3, "d_model": 24, "n_ctx": 32, "d_head": 6, "n_heads": 4, "d_vocab": 89, "act_fn": "gelu"}
    config = TransformerBridgeConfig(**sizes, d_mlp=40, attn_only=attn_only, seed=0, **NATIVE[name])
    model = bridge().boot_native(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    run = fc.trace(model, tokens())
    assert_exact(run, logits_of(model, tokens()), 1e-5)
    assert run.weights.attention_only == (attn_only and name != "caps")
    if run.weights.attention_only:
        assert_exact(fc.trace(run.weights, tokens()), logits_of(model, tokens()), 1e-5)
    padded, alone = fc.trace(model, tokens(), MASK), fc.trace(model, tokens()[:1, 4:])
    torch.testing.assert_close(padded.logits()[0, 4:], alone.logits()[0], rtol=1e-4, atol=1e-4)


REFUSED = {
    "gives no next-token logits": ("BertForMaskedLM", LARGE),
    "T5ForConditionalGeneration gives no next-token logits": ("T5ForConditionalGeneration", {"vocab_size": 89, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}),
    "model_type 'mamba' is not supported in a bridge; trace the Hugging Face model itself": ("MambaForCausalLM", {"vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2}),
    "model_type 'openai-gpt' is not supported in a bridge": ("OpenAIGPTLMHead", GPT2),
    "its latent attention has no W_Q and W_K in TransformerLens; trace the Hugging Face model": ("DeepseekV2ForCausalLM", {**LARGE, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "first_k_dense_replace": 3}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_named(message, tmp_path):
    model = boot(built(*REFUSED[message]), tmp_path)
    for call in (fc.CircuitWeights.from_model, lambda model: fc.trace(model, tokens())):
        with pytest.raises(ValueError, match=message):
            call(model)


UNNAMED = {  # of families without a table: exact, but for tables of scores
    "nemotron": ("NemotronForCausalLM", {**SIZE, **GROUPED}),
    "glm": ("GlmForCausalLM", {**SIZE, **GROUPED, "head_dim": 6, "pad_token_id": 0}),
    "seed": ("SeedOssForCausalLM", {**SIZE, **GROUPED, "head_dim": 6}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {**SIZE, **GROUPED, "head_dim": 6, "pad_token_id": 0}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT2),
    "mpt": ("MptForCausalLM", {"vocab_size": 89, "d_model": 24, "n_heads": 4, "n_layers": 3}),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_a_bridge_of_a_family_without_a_table(name, tmp_path):
    model = boot(built(*UNNAMED[name]), tmp_path, torch.float64)
    run = fc.trace(model, tokens())
    assert_exact(run, logits_of(model, tokens()), 1e-9)
    assert torch.isfinite(fc.head_ablation(run, attention="recomputed").values).all()
    if run.weights.positional != "standard":
        with pytest.raises(ValueError, match=r"weights\.qk_norm is 'of a run'"):
            fc.qk_tables(run.weights, (0, 0))
