"""GPT-2: layernorms with biases, learned positions, queries, keys and values in one matrix kept as [in, out]."""

from functools import partial
from typing import Any

from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family


def read(c: Checkpoint) -> dict[str, Any]:
    """The arguments of CircuitWeights."""
    c.refuse("add_cross_attention", "attention to another model is not supported")
    c.refuse("scale_attn_by_inverse_layer_idx", "attention scales that differ between layers are not supported")
    d, V, H = c.option("n_embd"), c.option("vocab_size"), c.option("n_head")
    layer = "transformer.h.{}."
    out: dict[str, Any] = {
        "W_E": c.tensor("transformer.wte.weight", V, d),
        "W_pos": c.tensor("transformer.wpe.weight", c.option("n_positions"), d),
        "positional": "standard",
        "attention_scale": None if c.option("scale_attn_weights", True) else 1.0,
        "W_O": c.layers(layer + "attn.c_proj.weight", d, d, view=lambda w: w.view(H, -1, d)),
        "b_O": c.stack(layer + "attn.c_proj.bias", d),
        "norm": "layernorm",
        "eps": c.option("layer_norm_epsilon", 1e-5),
        "ln_w": c.stack(layer + "ln_1.weight", d),
        "ln_b": c.stack(layer + "ln_1.bias", d),
        "ln_final_w": c.tensor("transformer.ln_f.weight", d),
        "ln_final_b": c.tensor("transformer.ln_f.bias", d),
    }
    out["W_U"] = out["W_E"].T if c.option("tie_word_embeddings", True) else c.tensor("lm_head.weight", V, d).T
    for i, name in enumerate("QKV"):
        out[f"W_{name}"] = c.layers(layer + "attn.c_attn.weight", d, 3 * d, view=partial(_third, i, H))
        out[f"b_{name}"] = c.stack(layer + "attn.c_attn.bias", 3 * d, view=partial(_third, i, H))
    return out


def _third(part: int, heads: int, joint: Tensor) -> Tensor:
    """One of queries, keys and values out of [d, 3 * H * r]: [H, d, r]; of a bias [3 * H * r]: [H, r]."""
    third: Tensor = joint.unflatten(-1, (3, heads, -1)).select(-3, part).movedim(-2, 0)
    return third


FAMILY = Family(body="transformer", layers="h", attention="attn", final_norm="ln_f", read=read)
