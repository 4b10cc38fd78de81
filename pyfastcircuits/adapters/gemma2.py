"""Gemma 2: Llama with norms after the heads too, scaled embeddings, and caps of scores and logits."""

from dataclasses import replace
from typing import Any

from pyfastcircuits.adapters import llama
from pyfastcircuits.adapters.checkpoint import Checkpoint


def read(c: Checkpoint) -> dict[str, Any]:
    """The arguments of CircuitWeights: Llama's, but gains are 1 + weight, and embeddings are tied by default."""
    c.refuse("use_bidirectional_attention", "attention that is not causal is not supported")
    d = c.option("hidden_size")
    tied = {"tie_word_embeddings": c.option("tie_word_embeddings", True), "head_dim": c.option("head_dim", 256)}
    out = llama.read(replace(c, config={**c.config, **tied}))
    return out | {
        "ln_w": out["ln_w"] + 1,
        "ln_final_w": out["ln_final_w"] + 1,
        "ln_post_w": c.stack("model.layers.{}.post_attention_layernorm.weight", d) + 1,
        "embed_scale": d**0.5,
        "logit_cap": c.option("final_logit_softcapping", None),
        "attention_scale": c.option("query_pre_attn_scalar", 256) ** 0.5,
    }


FAMILY = replace(llama.FAMILY, read=read, post_norm="post_attention_layernorm")
