"""The names of modules in Hugging Face models of every family, and of the columns of their projections that heads own.

Written from the models themselves, for oracles: shares nothing with the library.
"""

import torch

LLAMA = {
    "layers": "model.layers", "attention": "self_attn", "Q": ["q_proj"], "K": ["k_proj"], "V": ["v_proj"],
    "out": "o_proj", "norm": "input_layernorm", "mlp": "mlp", "final": "model.norm",
}  # fmt: skip
JOINT = {kind: ["query_key_value"] for kind in "QKV"}
SANDWICH = {**LLAMA, "post": "post_attention_layernorm"}
OLMO2 = {**SANDWICH, "norm": None, "Q": ["q_proj", "q_norm"], "K": ["k_proj", "k_norm"]}  # one norm for all heads
GPT2 = {
    **LLAMA, **{kind: ["c_attn"] for kind in "QKV"}, "layers": "transformer.h", "attention": "attn", "out": "c_proj",
    "norm": "ln_1", "final": "transformer.ln_f",
}  # fmt: skip
GPTJ = {**LLAMA, "layers": "transformer.h", "attention": "attn", "out": "out_proj", "norm": "ln_1", "final": "transformer.ln_f"}  # fmt: skip
BLOOM = {
    **LLAMA, **JOINT, "layers": "transformer.h", "attention": "self_attention", "out": "dense",
    "mlp": "mlp.dense_4h_to_h", "final": "transformer.ln_f",
}  # fmt: skip
LATENT = {
    **LLAMA, "Q": ["q_a_proj", "q_a_layernorm", "q_b_proj"], "K": ["kv_b_proj"], "V": ["kv_b_proj"],
    "within": "kv_a_layernorm",
}  # fmt: skip
NAMES = {
    "bloom": BLOOM,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon": BLOOM,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "gpt2": GPT2,
    "gpt_neo": {**GPTJ, "attention": "attn.attention"},
    "gpt_neox": {**LLAMA, **JOINT, "layers": "gpt_neox.layers", "attention": "attention", "out": "dense", "final": "gpt_neox.final_layer_norm"},
    "gptj": GPTJ,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "opt": {**LLAMA, "layers": "model.decoder.layers", "out": "out_proj", "norm": "self_attn_layer_norm", "mlp": "fc2", "final": "model.decoder.final_layer_norm"},
    "phi": {**LLAMA, "out": "dense", "final": "model.final_layernorm"},
    "phi3": {**LLAMA, **{kind: ["qkv_proj"] for kind in "QKV"}},
}  # fmt: skip


def names_of(model) -> dict:
    """The names in this model: of a chain of modules those that it has."""
    config, names = model.config, dict(NAMES.get(model.config.model_type, LLAMA))
    if config.model_type.startswith("deepseek") and config.q_lora_rank is None:
        names["Q"] = ["q_proj"]
    if config.model_type == "falcon" and config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        names["norm"] = "ln_attn"
    return names


def counts_of(config) -> tuple[int, int]:
    """Heads, and key/value heads."""
    heads = config.num_attention_heads
    if config.model_type == "falcon":
        grouped = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        return heads, grouped
    return heads, getattr(config, "num_key_value_heads", None) or heads


def columns_of(config, kind: str, width: int) -> torch.Tensor:
    """[heads, r]: which of the columns that the last module of a chain gives are whose."""
    heads, kv = counts_of(config)
    own, every = heads if kind == "Q" else kv, torch.arange(width)
    which, family = "QKV".index(kind), config.model_type
    if family == "gpt2":
        return every.unflatten(0, (3, heads, -1))[which]
    if family in ("bloom", "gpt_neox") or (family == "falcon" and kv == heads):
        return every.unflatten(0, (heads, 3, -1))[:, which]
    if family == "falcon":
        grouped = every.unflatten(0, (kv, heads // kv + 2, -1))
        return grouped[:, :-2].flatten(0, 1) if kind == "Q" else grouped[:, which - 3]
    if family == "phi3":
        return every.unflatten(0, (heads + 2 * kv, -1))[{"Q": 0, "K": heads, "V": heads + kv}[kind] :][:own]
    if family.startswith("deepseek") and kind != "Q":
        still = config.qk_nope_head_dim
        return every.unflatten(0, (heads, -1))[:, :still] if kind == "K" else every.unflatten(0, (heads, -1))[:, still:]
    return every.unflatten(0, (own, -1))
