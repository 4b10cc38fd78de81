"""GPT-NeoX (Pythia): layernorms with biases, rotary positions of a part of each head, and a joint matrix of Q, K and V.

The MLPs read beside the attention and not after it, but that changes nothing here: they are frozen sources either way.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint, heads_out
from pyfastcircuits.adapters.family import Family, rotary


def read(c: Checkpoint) -> dict[str, Any]:
    """The arguments of CircuitWeights."""
    d, V, H = c.option("hidden_size"), c.option("vocab_size"), c.option("num_attention_heads")
    layer = "gpt_neox.layers.{}."
    out: dict[str, Any] = {
        "W_E": c.tensor("gpt_neox.embed_in.weight", V, d),
        "W_O": c.layers(layer + "attention.dense.weight", d, d, view=heads_out(H)),
        "norm": "layernorm",
        "eps": c.option("layer_norm_eps", 1e-5),
        "ln_w": c.stack(layer + "input_layernorm.weight", d),
        "ln_b": c.stack(layer + "input_layernorm.bias", d),
        "ln_final_w": c.tensor("gpt_neox.final_layer_norm.weight", d),
        "ln_final_b": c.tensor("gpt_neox.final_layer_norm.bias", d),
        **rotary(replace(c, config={"rotary_pct": 0.25, **c.config}), d // H),
    }
    head = "embed_out.weight" if c.has("embed_out.weight") else "lm_head.weight"  # folders, models in memory
    out["W_U"] = out["W_E"].T if c.option("tie_word_embeddings", False) else c.tensor(head, V, d).T
    biased = c.option("attention_bias", True)
    if biased:
        out["b_O"] = c.stack(layer + "attention.dense.bias", d)
    joint = layer + "attention.query_key_value."
    for i, name in enumerate("QKV"):
        out[f"W_{name}"] = c.layers(joint + "weight", 3 * d, d, view=partial(_third, i, H))
        if biased:
            out[f"b_{name}"] = c.stack(joint + "bias", 3 * d, view=partial(_third, i, H))
    return out


def _third(part: int, heads: int, joint: Tensor) -> Tensor:
    """One of queries, keys and values out of [H * 3 * r, d]: [H, d, r]; of a bias [H * 3 * r]: [H, r]."""
    third: Tensor = joint.unflatten(0, (heads, 3, -1))[:, part].movedim(1, -1)
    return third


FAMILY = Family(body="gpt_neox", layers="layers", attention="attention", final_norm="final_layer_norm", read=read)
