"""Llama, and what most families since share with it: RMS norms, rotary positions, grouped key/value heads."""

from typing import Any

from pyfastcircuits.adapters.checkpoint import Checkpoint, by_head, heads_in, heads_out
from pyfastcircuits.adapters.family import Family, rotary


def read(c: Checkpoint, *, qkv_bias: bool | None = None) -> dict[str, Any]:
    """The arguments of CircuitWeights. `qkv_bias` says whether Q, K and V have biases; if None, the options say it."""
    d, V, H = c.option("hidden_size"), c.option("vocab_size"), c.option("num_attention_heads")
    kv, r = c.option("num_key_value_heads", H), c.option("head_dim", d // H)
    attention = "model.layers.{}.self_attn."
    everywhere = c.option("attention_bias", False)
    out: dict[str, Any] = {
        "W_E": c.tensor("model.embed_tokens.weight", V, d),
        "W_Q": c.layers(attention + "q_proj.weight", H * r, d, view=heads_in(H)),
        "W_K": c.layers(attention + "k_proj.weight", kv * r, d, view=heads_in(kv)),
        "W_V": c.layers(attention + "v_proj.weight", kv * r, d, view=heads_in(kv)),
        "W_O": c.layers(attention + "o_proj.weight", d, H * r, view=heads_out(H)),
        "norm": "rmsnorm",
        "eps": c.option("rms_norm_eps", 1e-6),
        "ln_w": c.stack("model.layers.{}.input_layernorm.weight", d),
        "ln_final_w": c.tensor("model.norm.weight", d),
        **rotary(c, r),
    }
    out["W_U"] = out["W_E"].T if c.option("tie_word_embeddings", False) else c.tensor("lm_head.weight", V, d).T
    if everywhere if qkv_bias is None else qkv_bias:
        for name, count in (("q", H), ("k", kv), ("v", kv)):
            bias = attention + f"{name}_proj.bias"
            out[f"b_{name.upper()}"] = c.stack(bias, count * r, view=by_head(count))
    if everywhere:
        out["b_O"] = c.stack(attention + "o_proj.bias", d)
    return out


FAMILY = Family(body="model", layers="layers", attention="self_attn", final_norm="norm", read=read)
