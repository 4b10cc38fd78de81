"""The families of Hugging Face models by `config.model_type`, each a table of what is particular about it.

What only shapes a pattern (windows, caps of scores, ALiBi, padding) is in the patterns of a run and in no table. MLPs,
experts among them, are in none either: what they write is a frozen source.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyfastcircuits.adapters import latent
from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family, Kind, biases_if

NO_CAUSE = "attention that is not causal is not supported"
OF_THE_STREAM = "a norm of the whole residual stream"


def _of_each_head(rows: Tensor, kind: Kind, heads: int, kv: int) -> Tensor:
    """Rows [H * 3 * r, ...]: a head's queries, keys and values lie together."""
    by_head: Tensor = rows.unflatten(0, (heads, 3, -1))
    return by_head[:, "QKV".index(kind)]


def _thirds(rows: Tensor, kind: Kind, heads: int, kv: int) -> Tensor:
    """Rows [3 * H * r, ...]: all queries, all keys, all values."""
    thirds: Tensor = rows.unflatten(0, (3, heads, -1))
    return thirds["QKV".index(kind)]


def _blocks(rows: Tensor, kind: Kind, heads: int, kv: int) -> Tensor:
    """Rows [(H + 2 * Hkv) * r, ...]: all queries, all keys, all values."""
    first, count = {"Q": (0, heads), "K": (heads, kv), "V": (heads + kv, kv)}[kind]
    by_head: Tensor = rows.unflatten(0, (heads + 2 * kv, -1))
    return by_head[first : first + count]


def _groups(rows: Tensor, kind: Kind, heads: int, kv: int) -> Tensor:
    """Rows [Hkv * (H / Hkv + 2) * r, ...]: the queries of a group, then its keys and its values."""
    grouped: Tensor = rows.unflatten(0, (kv, heads // kv + 2, -1))
    return grouped[:, :-2].flatten(0, 1) if kind == "Q" else grouped[:, -2 if kind == "K" else -1]


def _falcon(rows: Tensor, kind: Kind, heads: int, kv: int) -> Tensor:
    return _of_each_head(rows, kind, heads, kv) if kv == heads else _groups(rows, kind, heads, kv)


def _gemma(c: Checkpoint, found: dict[str, Any]) -> dict[str, Any]:
    cap = c.config.get("final_logit_softcapping", 30.0 if c.config.get("model_type") == "gemma2" else None)
    options = {"embed_scale": c.option("hidden_size") ** 0.5, "logit_cap": cap}
    if c.model is None and c.config.get("model_type") != "gemma":
        options["attention_scale"] = float(c.option("query_pre_attn_scalar", 256)) ** 0.5
    return options


def _causal(c: Checkpoint) -> None:
    c.refuse("use_bidirectional_attention", NO_CAUSE)


def _gpt2(c: Checkpoint) -> None:
    c.refuse("add_cross_attention", "attention to another model is not supported")
    if c.model is None:
        c.refuse("scale_attn_by_inverse_layer_idx", "of a model on disk this is not read: load the model itself")


def _bloom(c: Checkpoint) -> None:
    c.refuse("apply_residual_connection_post_layernorm", f"{OF_THE_STREAM} is not supported")


def _opt(c: Checkpoint) -> None:
    if not c.option("do_layer_norm_before", True) or c.option("_remove_final_layer_norm", False):
        raise ValueError(
            f"{c.where}: do_layer_norm_before is {c.option('do_layer_norm_before', True)} and _remove_final_layer_norm "
            f"{c.option('_remove_final_layer_norm', False)}, and {OF_THE_STREAM} is not supported"
        )
    if c.option("word_embed_proj_dim", c.option("hidden_size")) != c.option("hidden_size"):
        raise ValueError(f"{c.where}: word_embed_proj_dim is not hidden_size, and projected embeddings are unsupported")


def _olmo(c: Checkpoint) -> None:
    if c.config.get("clip_qkv") is not None:
        raise ValueError(f"{c.where}: clip_qkv is {c.config['clip_qkv']!r}, and clipped values are no linear function")


def _never(c: Checkpoint) -> bool:
    return False


def _always(c: Checkpoint) -> bool:
    return True


def _falcon_keys(c: Checkpoint, heads: int) -> int:
    if c.option("new_decoder_architecture", False):
        return int(c.option("num_kv_heads", heads))
    return 1 if c.option("multi_query", True) else heads


def _granite(c: Checkpoint, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "embed_scale": float(c.option("embedding_multiplier", 1.0)),
        "write_scale": float(c.option("residual_multiplier", 1.0)),
        "attention_scale": 1 / float(c.option("attention_multiplier", 1.0)),
    }


def _every_fourth_is_plain(c: Checkpoint, layer: int) -> bool:
    """SmolLM 3's default."""
    rotates = c.option("no_rope_layers", None)
    every = int(c.option("no_rope_layer_interval", 4))
    return bool(rotates[layer]) if rotates else (layer + 1) % every != 0


def _in_windows(c: Checkpoint, layer: int) -> bool:
    kinds = c.option("layer_types", None)
    every = int(c.option("sliding_window_pattern", 4))
    return kinds[layer] == "sliding_attention" if kinds else (layer + 1) % every != 0


def _sinks(c: Checkpoint, found: dict[str, Any]) -> dict[str, Any]:
    return {"sinks": c.stack(LLAMA.in_attention("sinks"), len(found["W_Q"][0]))}


def _biased(which: str) -> Callable[[Checkpoint], str]:
    return lambda c: which


LLAMA = Family()
LAYERNORMS = replace(LLAMA, norm_kind="layernorm", norm_parts=("weight", "bias"), default_eps=1e-5)
GPT2 = replace(
    LAYERNORMS, body="transformer", embedding="wte", positions="wpe", layers="h", norm="ln_1", attention="attn",
    joint="c_attn", split=_thirds, transposed=True, out="c_proj", final_norm="ln_f", heads="n_head", rotary=_never,
    check=_gpt2, tied=True, biases=_biased("QKVO"),
    options=lambda c, found: {} if c.model or c.option("scale_attn_weights", True) else {"attention_scale": 1.0},
)  # fmt: skip
NEOX = replace(
    LAYERNORMS, body="gpt_neox", embedding="embed_in", attention="attention", joint="query_key_value",
    split=_of_each_head, out="dense", final_norm="final_layer_norm", rotary_share=0.25,
    biases=lambda c: biases_if(c, "attention_bias", True),
)  # fmt: skip
GEMMA = replace(LLAMA, gain=1.0, options=_gemma, tied=True, check=_causal)
GEMMA2 = replace(GEMMA, post_norm="post_attention_layernorm")
OLMO2 = replace(
    LLAMA, norm=None, post_norm="post_attention_layernorm", qk_norm_kind="rmsnorm of all heads", qk_norms=_always,
    default_eps=1e-5,
)  # fmt: skip
MISTRAL = replace(LLAMA, biases=_biased(""))
QWEN3 = replace(LLAMA, qk_norms=_always)
COHERE = replace(
    LAYERNORMS, norm_parts=("weight",), qk_norm_kind="layernorm", qk_norms=lambda c: c.option("use_qk_norm", False),
    rotary_pairs="adjacent", rotary_base=5e5, tied=True,
    logit_scale=lambda c: float(c.option("logit_scale", 0.0625)),
)  # fmt: skip
DEEPSEEK = replace(
    LLAMA, rotary_pairs="adjacent", latent_norms=("q_a_layernorm", "kv_a_layernorm"), qk_norm_kind="of a run",
    read_heads=latent.heads, options=latent.scale,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "bloom": replace(
        LAYERNORMS, body="transformer", embedding="word_embeddings", embedding_norm="word_embeddings_layernorm",
        layers="h", attention="self_attention", joint="query_key_value", split=_of_each_head, out="dense",
        final_norm="ln_f", heads="n_head", rotary=_never, interface="products", adds_residual=True, tied=True,
        biases=_biased("QKVO"), check=_bloom,
    ),
    "cohere": COHERE,
    "cohere2": replace(COHERE, rotates=_in_windows, rotary_base=1e4),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "falcon": replace(
        LAYERNORMS, body="transformer", embedding="word_embeddings", layers="h", attention="self_attention",
        norm=("input_layernorm", "ln_attn"), joint="query_key_value", split=_falcon, out="dense", final_norm="ln_f",
        key_heads=_falcon_keys, rotary=lambda c: not c.option("alibi", False), interface="sdpa", tied=True,
        biases=lambda c: biases_if(c, "bias", False),
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, qk_norms=_always, scaled_rotary=True),
    "gpt2": GPT2,
    "gpt_neo": replace(
        GPT2, attention="attn.attention", joint=None, split=LLAMA.split, transposed=False, out="out_proj",
        heads="num_heads", interface="products", check=LLAMA.check, options=lambda c, found: {"attention_scale": 1.0},
        biases=_biased("O"),
    ),
    "gpt_neox": NEOX,
    "gpt_oss": replace(
        LLAMA, options=_sinks, default_eps=1e-5, biases=lambda c: biases_if(c, "attention_bias", True),
        scaled_rotary=True,
    ),
    "gptj": replace(
        GPT2, positions=None, joint=None, split=LLAMA.split, transposed=False, out="out_proj", rotary=LLAMA.rotary,
        rotary_pairs="adjacent", check=LLAMA.check, options=LLAMA.options, tied=False,
        biases=_biased("U"),
    ),
    "granite": replace(LLAMA, options=_granite, logit_scale=lambda c: 1 / float(c.option("logits_scaling", 1.0))),
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": replace(MISTRAL, default_eps=1e-5, rotary_base=1e6),
    "olmo": replace(LAYERNORMS, norm_parts=(), check=_olmo),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, scaled_rotary=True),
    "opt": replace(
        LAYERNORMS, body="model.decoder", positions="embed_positions", first_position=2, norm="self_attn_layer_norm",
        out="out_proj", final_norm="final_layer_norm", rotary=_never, scales_queries=True, check=_opt, tied=True,
        biases=lambda c: biases_if(c, "enable_bias", True),
    ),
    "phi": replace(
        LAYERNORMS, out="dense", query_norm="q_layernorm", key_norm="k_layernorm", qk_norm_kind="layernorm",
        qk_norms=lambda c: c.option("qk_layernorm", False), final_norm="final_layernorm", rotary_share=0.5,
        biases=_biased("QKVOU"),
    ),
    "phi3": replace(MISTRAL, default_eps=1e-5, joint="qkv_proj", split=_blocks),
    "qwen2": replace(LLAMA, biases=_biased("QKV")),
    "qwen2_moe": replace(LLAMA, biases=lambda c: biases_if(c, "qkv_bias", True, "QKV")),
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3,
    "smollm3": replace(LLAMA, rotates=_every_fourth_is_plain, rotary_base=2e6, tied=True),
    "stablelm": replace(
        LAYERNORMS, query_norm="q_layernorm", key_norm="k_layernorm", qk_norm_kind="layernorm",
        qk_norms=lambda c: c.option("qk_layernorm", False), rotary_share=0.25,
        biases=lambda c: biases_if(c, "use_qkv_bias", False, "QKV"),
    ),
    "starcoder2": replace(LAYERNORMS, tied=True, biases=lambda c: biases_if(c, "use_bias", True)),
}  # fmt: skip


def family_of(model_type: str | None, where: str) -> Family:
    """The description of a model type's family.

    Raises:
        ValueError: the family is not supported.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
