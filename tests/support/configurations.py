"""Small models of every family, with the head counts, windows, rope settings and ties that real checkpoints use."""

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

# name: (model class, configuration class, options)
CONFIGURATIONS = {
    "gpt2": ("GPT2", {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32}),
    "gpt2, one layer, odd heads, not tied": (
        "GPT2",
        {"vocab_size": 90, "n_embd": 21, "n_head": 3, "n_layer": 1, "n_positions": 16, "tie_word_embeddings": False},
    ),
    "gpt2, unscaled scores": ("GPT2", {"vocab_size": 89, "n_embd": 24, "n_head": 4, "n_layer": 2, "scale_attn_weights": False}),
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
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """A model whose every parameter is random: norms and biases that differ from 1 and 0 are what an adapter may forget."""
    import transformers

    family, options = CONFIGURATIONS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    model_class = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model = model_class._from_config(config, attn_implementation="eager").to(dtype).eval()
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
