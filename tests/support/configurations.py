"""Small models of every family, with the head counts, windows, rope settings and ties that real checkpoints use."""

import sys
from contextlib import contextmanager

import pytest
import torch

SIZE = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.5, 2.0, 2.5], "short_factor": [1.1, 1.2, 1.3], "original_max_position_embeddings": 16}  # fmt: skip
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # where the defaults lie beyond so few tokens
FALCON = {"vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "parallel_attn": True}
DEEPSEEK = {
    **SIZE, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip

# name: (model class, configuration class, options)
CONFIGURATIONS = {
    "gpt2": ("GPT2", {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32}),
    "gpt2, one layer, odd heads, not tied": (
        "GPT2",
        {"vocab_size": 90, "n_embd": 21, "n_head": 3, "n_layer": 1, "n_positions": 16, "tie_word_embeddings": False},
    ),
    "gpt2, unscaled scores": ("GPT2", {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 2, "scale_attn_weights": False}),
    "gpt2, scores scaled by layer": (
        "GPT2",
        {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32, "scale_attn_by_inverse_layer_idx": True},
    ),
    "pythia": ("GPTNeoX", {**SIZE, "num_attention_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "gpt-neox, MLP after the attention": ("GPTNeoX", {**SIZE, "num_attention_heads": 3, "use_parallel_residual": False}),
    "gpt-neox, no biases, linear rope": (
        "GPTNeoX",
        {**SIZE, "num_attention_heads": 2, "attention_bias": False, "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}},
    ),
    "llama": ("Llama", {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama 3, grouped": ("Llama", {**SIZE, **GROUPED, "rope_parameters": LLAMA3}),
    "llama, one kv head, tied, wide heads": (
        "Llama",
        {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "llama, biases, yarn": ("Llama", {**SIZE, **GROUPED, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "mistral, window": ("Mistral", {**SIZE, **GROUPED, "sliding_window": 4}),
    "mistral, no window, wide heads": ("Mistral", {**SIZE, **GROUPED, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {**SIZE, **GROUPED}),
    "qwen2, windows in upper layers, tied": (
        "Qwen2",
        {**SIZE, **GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2, yarn": ("Qwen2", {**SIZE, **GROUPED, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {**SIZE, **GROUPED, "head_dim": 8}),
    "qwen3, tied": ("Qwen3", {**SIZE, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**SIZE, **GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma2, caps that bite": (
        "Gemma2",
        {**SIZE, **GROUPED, "head_dim": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, no caps": (
        "Gemma2",
        {**SIZE, **GROUPED, "head_dim": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "llama, dynamic rope": ("Llama", {**SIZE, **GROUPED, "max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "gemma": ("Gemma", {**SIZE, **GROUPED, "head_dim": 8}),
    "gemma3, windows, a rope for each kind of layer": (
        "Gemma3",
        {**SIZE, **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 12, "rope_parameters": {
            "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}, **WINDOWS},
    ),
    "gemma3, windows, dynamic rope": (
        "Gemma3",
        {**SIZE, **GROUPED, "head_dim": 8, "max_position_embeddings": 16, "rope_parameters": {
            "full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}, **WINDOWS},
    ),
    "gemma3, caps, biases": (
        "Gemma3",
        {**SIZE, **GROUPED, "head_dim": 6, "attention_bias": True, "final_logit_softcapping": 3.0,
         "attn_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 3},
    ),
    "qwen2_moe": ("Qwen2Moe", {**SIZE, **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen2_moe, a layer without experts, no biases": (
        "Qwen2Moe",
        {**SIZE, **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen3_moe": ("Qwen3Moe", {**SIZE, **GROUPED, **EXPERTS, "head_dim": 8}),
    "mixtral, window": ("Mixtral", {**SIZE, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "olmo": ("Olmo", {**SIZE, **GROUPED}),
    "olmo2": ("Olmo2", {**SIZE, **GROUPED}),
    "olmo2, biases": ("Olmo2", {**SIZE, "num_attention_heads": 4, "attention_bias": True}),
    "olmo3, windows, yarn": ("Olmo3", {**SIZE, **GROUPED, **WINDOWS, "rope_parameters": YARN}),
    "phi": ("Phi", {**SIZE, "num_attention_heads": 3}),
    "phi, norms of queries and keys, grouped": ("Phi", {**SIZE, **GROUPED, "hidden_size": 32, "qk_layernorm": True}),
    "phi3": ("Phi3", {**SIZE, **GROUPED, **SPECIAL}),
    "phi3, window, partial rotary": ("Phi3", {**SIZE, **GROUPED, **SPECIAL, "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}}),
    "phi3, longrope": ("Phi3", {**SIZE, **GROUPED, **SPECIAL, "original_max_position_embeddings": 16, "rope_parameters": LONG}),
    "granite": (
        "Granite",
        {**SIZE, **GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
         "logits_scaling": 5.0},
    ),
    "granite, biases, tied": (
        "Granite",
        {**SIZE, **GROUPED, "residual_multiplier": 0.4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "cohere": ("Cohere", {**SIZE, **GROUPED}),
    "cohere, norms of queries and keys, biases": ("Cohere", {**SIZE, **GROUPED, "use_qk_norm": True, "attention_bias": True}),
    "cohere2, windows, layers that do not rotate": ("Cohere2", {**SIZE, **GROUPED, **WINDOWS}),
    "smollm3, a layer that does not rotate": ("SmolLM3", {**SIZE, **GROUPED, **SPECIAL, "no_rope_layers": [1, 0, 1]}),
    "stablelm": ("StableLm", {**SIZE, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "stablelm, biases, parallel, norms of queries and keys": (
        "StableLm",
        {**SIZE, **GROUPED, "hidden_size": 32, "use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2, window": ("Starcoder2", {**SIZE, **GROUPED, "sliding_window": 4}),
    "starcoder2, no biases, not tied": ("Starcoder2", {**SIZE, **GROUPED, "use_bias": False, "tie_word_embeddings": False}),
    "gptj": ("GPTJ", {"vocab_size": 89, "n_embd": 24, "n_layer": 3, "n_head": 3, "rotary_dim": 4, "n_positions": 32}),
    "gpt_neo, windows": (
        "GPTNeo",
        {"vocab_size": 89, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "window_size": 4,
         "attention_types": [[["global", "local", "local"], 1]], "max_position_embeddings": 32},
    ),
    "opt": ("OPT", {**SIZE, **SPECIAL, "num_attention_heads": 4, "ffn_dim": 40, "word_embed_proj_dim": 24}),
    "opt, no biases": (
        "OPT",
        {**SIZE, **SPECIAL, "num_attention_heads": 3, "ffn_dim": 40, "word_embed_proj_dim": 24, "enable_bias": False},
    ),
    "bloom": ("Bloom", {"vocab_size": 89, "hidden_size": 24, "n_layer": 3, "n_head": 4}),
    "falcon, alibi": ("Falcon", {**FALCON, "alibi": True, "multi_query": False, "bias": True, "parallel_attn": False}),
    "falcon, alibi, one kv head, parallel": ("Falcon", {**FALCON, "alibi": True, "multi_query": True}),
    "falcon, one kv head, parallel": ("Falcon", {**FALCON, "multi_query": True}),
    "falcon, grouped, two norms": ("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon, grouped, one norm, biases": (
        "Falcon",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "gpt_oss, sinks, windows, yarn": ("GptOss", {**SIZE, **GROUPED, **EXPERTS, **WINDOWS, "num_local_experts": 4, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": 12}),
    "deepseek_v2, queries without a latent": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v2, yarn": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": 12, "rope_parameters": YARN | {"mscale_all_dim": 0.5}}),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": 12}),
    "deepseek_v3, yarn": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
}  # fmt: skip


FAMILIES = list({family: name for name, (family, _) in reversed(CONFIGURATIONS.items())}.values())[::-1]  # one of each
LATENT = [name for name in CONFIGURATIONS if name.startswith("deepseek")]
ADDED = [name for name in CONFIGURATIONS if name.startswith(("gpt2", "gpt_neo,", "opt"))]  # positions, to the stream
ALONE = [name for name in CONFIGURATIONS if name not in LATENT + ADDED]  # whose first scores tables hold
WITHOUT_QK = [name for name in CONFIGURATIONS if name.startswith(("bloom", "falcon", "gpt_neo,"))]


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """A model whose every parameter is random: norms and biases that differ from 1 and 0 are what an adapter may forget.

    Experts run as the plain loop that takes fp64. Falcon runs with torch's attention function: its own eager attention
    adds ALiBi twice.
    """
    import transformers

    family, options = CONFIGURATIONS[name]
    kind = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    model_class = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    attention = "sdpa" if family == "Falcon" else "eager"
    model = model_class._from_config(kind(**{**options, **changes}), attn_implementation=attention).to(dtype).eval()
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3
            parameter.copy_(
                noise + 1 if ("norm" in parameter_name or "ln_" in parameter_name) and parameter.dim() == 1 else noise
            )
    return model


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 89, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def nothing_in_fp32(model):
    """Their norms and softmax are in fp32 whatever the model's dtype: here in fp64, so that nothing but ours rounds."""

    class Wide:
        def __getattr__(self, name):
            return torch.float64 if name in ("float32", "float") else getattr(torch, name)

    families = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for family in families:
            if not family.startswith("torch.") and hasattr(sys.modules[family], "torch"):
                patch.setattr(sys.modules[family], "torch", Wide())
        yield
