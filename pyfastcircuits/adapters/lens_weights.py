"""CircuitWeights of TransformerLens models, as their modules hold them.

A TransformerBridge keeps a Hugging Face model: its tensors are those of the bridge, which may have processed them, and
what is particular about them (rotations, norms of queries and keys, scales) is in the table of families.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.families import FAMILIES
from pyfastcircuits.adapters.family import Family
from pyfastcircuits.adapters.hugging_face import family_and_checkpoint, refuse_encoder
from pyfastcircuits.adapters.reading import own_eps, qk_norms, score_scales
from pyfastcircuits.adapters.rotary_table import rates_of
from pyfastcircuits.adapters.rotation import rotation
from pyfastcircuits.model.layers import LayerStack
from pyfastcircuits.model.weights import CircuitWeights

NORM_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")  # ln1 is behind the heads, and none in front of them
NORM_OF_ALL_HEADS = ("OlmoeForCausalLM", *NORM_AFTER)  # of queries and of keys
POSITIONAL = ("standard", "shortformer", "rotary", "alibi")


@dataclass(frozen=True)
class Source:
    """A model, and the family that a bridge's Hugging Face model is of."""

    model: Any
    family: Family | None = None
    checkpoint: Any = None  # the Checkpoint of that model
    unnamed: bool = False  # whether that family has no table: what a bridge's configuration says counts

    @staticmethod
    def of(model: Any) -> "Source":
        """Of a model that this library supports; errors as CircuitWeights.from_model."""
        where, inner = type(model).__name__, getattr(model, "original_model", None)
        if inner is not None and hasattr(getattr(inner, "config", None), "model_type"):
            refuse_encoder(inner)
            source = Source(model, unnamed=True)
            if inner.config.model_type in FAMILIES:
                family, checkpoint = family_and_checkpoint(inner)
                held: Any = _Originals(inner)
                source = Source(model, family, replace(checkpoint, model=held))
                source.check_family(where)
            elif not hasattr(model, "ln_final") or not all(hasattr(block, "attn") for block in model.blocks):
                raise ValueError(
                    f"{where}: model_type {inner.config.model_type!r} is not supported in a bridge; trace the Hugging "
                    "Face model itself"
                )
        else:
            source = Source(model)
            _check_config(model, where)
        if not len(model.blocks):
            raise ValueError(f"{where} has no blocks")
        return source

    @property
    def attentions(self) -> list[Any]:
        """Of all layers."""
        return [block.attn for block in self.model.blocks]

    @property
    def normed(self) -> bool:
        """Whether the model has norms."""
        return self.family is not None or self.model.cfg.normalization_type is not None

    @property
    def norm_before_heads(self) -> bool:
        """Whether heads read the residual stream through a norm."""
        if self.family is not None:
            return self.family.norm is not None
        return getattr(self.model.cfg, "original_architecture", None) not in NORM_AFTER

    def post_norm(self, block: Any) -> Any:
        """The norm after a layer's heads; None if there is none."""
        norm = getattr(block, "ln1_post", None) if self.norm_before_heads or self.family else block.ln1
        return None if isinstance(original(norm), torch.nn.Identity) else norm

    def head_norms(self, attention: Any) -> tuple[Any, ...]:
        """The norms of queries and of keys in an attention."""
        names = ("q_norm", "k_norm") if self.family is None else (self.family.query_norm, self.family.key_norm)
        held = (getattr(attention, name, None) for name in names)
        return tuple(norm for norm in held if norm is not None)

    def check_family(self, where: str) -> None:
        """Raise ValueError for a Hugging Face model with an unsupported option, or one that a bridge does not show."""
        assert self.family is not None
        self.family.check(self.checkpoint)
        if self.family.latent_norms:
            raise ValueError(
                f"{where}: its latent attention has no W_Q and W_K in TransformerLens; trace the Hugging Face model "
                "itself"
            )


def weights_of(model: Any) -> CircuitWeights:
    """Views of the model's weights; errors as CircuitWeights.from_model."""
    source = Source.of(model)
    options = _projections(source) | _positions(source) | _qk_norms(source) | _scales(source)
    if source.family is not None:
        options |= source.family.options(source.checkpoint, options)
    options |= _ends(source, options) | _norms(source)
    options = {name: _plain(value) for name, value in options.items() if value is not None}
    return CircuitWeights(**options, attention_only=_attention_only(source, options))


class _Originals:
    """The modules of a bridge's Hugging Face model, without what the bridge has put around them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def get_submodule(self, name: str) -> Any:
        """See nn.Module."""
        return original(self._model.get_submodule(name))

    def parameters(self) -> Iterator[Tensor]:
        """See nn.Module."""
        return self._model.parameters()


def original(component: Any) -> Any:
    """The module that a component of a TransformerBridge stands in for; any other as it is."""
    own = getattr(component, "original_component", None)
    return component if own is None else own


def _check_config(model: Any, where: str) -> None:
    """Raise ValueError for a HookedTransformer, or a bridge of TransformerLens' own model, that is not supported."""
    cfg = model.cfg
    if hasattr(model, "mlm_head") or not all(hasattr(model, part) for part in ("embed", "blocks", "unembed")):
        raise ValueError(f"{where} gives no next-token logits: it is an encoder, and its attention is not causal")
    if cfg.attention_dir != "causal":
        raise ValueError(
            f"{where}: attention_dir is {cfg.attention_dir!r}, and attention that is not causal is not supported"
        )
    if cfg.normalization_type not in (None, "LN", "LNPre", "RMS", "RMSPre"):
        raise ValueError(f"{where}: normalization_type {cfg.normalization_type!r} is not supported")
    if cfg.final_rms and (cfg.normalization_type or "").startswith("LN"):
        raise ValueError(
            f"{where}: final_rms is True, but normalization_type is {cfg.normalization_type!r}, and a final norm of "
            "another kind than those before it is not supported"
        )
    if cfg.positional_embedding_type not in POSITIONAL:
        raise ValueError(f"{where}: positional_embedding_type {cfg.positional_embedding_type!r} is not supported")
    if getattr(cfg, "clip_qkv", None) is not None:
        raise ValueError(f"{where}: clip_qkv is {cfg.clip_qkv!r}, and clipped values are no linear function")
    if cfg.load_in_4bit:
        raise ValueError(f"{where}: load_in_4bit is True, and packed weights are not supported")


def _projections(source: Source) -> dict[str, Any]:
    """The weights of heads, of key/value heads before they are repeated, and their biases."""
    out: dict[str, Any] = {}
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        out[name] = LayerStack([_stored(attention, name) for attention in source.attentions])
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        out[name] = _stacked([_stored(attention, name) for attention in source.attentions])
    return out


def _positions(source: Source) -> dict[str, Any]:
    """Positions of the residual stream, or the rotation of queries and keys."""
    model, cfg = source.model, source.model.cfg
    if source.family is not None and source.family.rotary(source.checkpoint):
        width = source.attentions[0].W_Q.shape[-1]
        return rotation(source.family, source.checkpoint, width)
    scheme = cfg.positional_embedding_type
    if source.family is not None:
        scheme = "standard" if source.family.positions is not None else "alibi"
    if scheme in ("standard", "shortformer"):
        return {"positional": scheme, "W_pos": model.W_pos}
    if scheme == "alibi" or source.unnamed:
        return {}
    return _rotation(source)


def _rotation(source: Source) -> dict[str, Any]:
    """What the tables in the attentions hold."""
    cfg, found = source.model.cfg, []
    for layer, attention in enumerate(source.attentions):
        where, native = f"blocks.{layer}.attn", getattr(original(attention), "rotary", None)
        pairs = "adjacent" if native is not None or cfg.rotary_adjacent_pairs else "halves"
        cos, sin = (
            (attention.rotary_cos, attention.rotary_sin) if native is None else (native.cos_cached, native.sin_cached)
        )
        if getattr(cfg, "use_dynamic_ntk_rope", False):  # the tables are those of the last sequence
            base = attention._rotary_base()
            sin, cos = attention.calculate_sin_cos_rotary(cfg.rotary_dim, len(cos), base=base, dtype=cos.dtype)
        found.append(rates_of(cos, sin, pairs, where))
    rates, scales = [own for own, _ in found], {scale for _, scale in found}
    if len(scales) > 1:
        raise ValueError(f"{type(source.model).__name__}: factors of its rotary tables differ between layers: {scales}")
    alike = all(torch.equal(own, rates[0]) for own in rates)
    length = (cfg.train_seq_length or cfg.n_ctx) if getattr(cfg, "use_dynamic_ntk_rope", False) else None
    return {
        "positional": "rotary",
        "rotary_frequencies": (rates[0] if alike else torch.stack(rates)).to(source.model.W_E.device),
        "rotary_scale": scales.pop(),
        "rotary_pairs": pairs,
        "rotary_length": length,
    }


def _qk_norms(source: Source) -> dict[str, Any]:
    """The norms of queries and keys, where the model has them."""
    r = source.attentions[0].W_Q.shape[-1]
    if source.family is not None:
        return qk_norms(source.family, source.checkpoint, r)
    if source.unnamed:
        return {"qk_norm": "of a run"}
    norms = [source.head_norms(attention) for attention in source.attentions]
    if not norms[0]:
        return {}
    together = source.model.cfg.original_architecture in NORM_OF_ALL_HEADS and not source.model.cfg.use_qk_norm
    return {
        "qk_norm": "rmsnorm of all heads" if together else "rmsnorm",
        "qk_eps": float(norms[0][0].eps),
        "ln_q_w": torch.stack([q.w.reshape(-1, r) for q, _ in norms]),
        "ln_k_w": torch.stack([k.w.reshape(-1, r) for _, k in norms]),
    }


def _scales(source: Source) -> dict[str, Any]:
    """What the attention scores are divided by, as the attentions have it."""
    cfg, r = source.model.cfg, source.attentions[0].W_Q.shape[-1]
    if source.family is not None and source.family.joint is None:
        return score_scales(source.family, source.checkpoint, r)
    if source.family is not None:  # a bridge's own attention, which knows no other options
        by_layer = cfg.scale_attn_by_inverse_layer_idx
        divisors = tuple(r**0.5 * (layer + 1 if by_layer else 1) for layer in range(len(source.attentions)))
    else:
        attentions = [original(attention) for attention in source.attentions]
        divisors = tuple(_divisor(attention, r) for attention in attentions)
    return {"attention_scale": divisors[0] if len(set(divisors)) == 1 else divisors}


def _divisor(attention: Any, r: int) -> float:
    """What an attention divides its scores by, as TransformerLens or transformers keeps it; sqrt(r) without either."""
    own = getattr(attention, "attn_scale", None) or getattr(attention, "scale", None)
    factor = getattr(attention, "scaling", None)
    return float(own) if own is not None else 1 / float(factor) if isinstance(factor, float) else r**0.5


def _ends(source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """Embeddings, with their norm, and unembedding."""
    model, cfg, W_E = source.model, source.model.cfg, source.model.W_E
    with torch.no_grad():
        if hasattr(model, "embed_ln"):
            W_E = model.embed_ln(W_E)
        elif getattr(model.embed, "ln", None) is not None:
            W_E = model.embed.ln(W_E)
    own_scale, cap = getattr(original(model.embed), "scalar_embed_scale", None), cfg.output_logits_soft_cap
    sinks = [getattr(attention, "sinks", None) for attention in source.attentions]
    found = {
        "W_E": W_E,
        "W_U": model.W_U,
        "b_U": _stored(model, "b_U"),
        "embed_scale": options.get("embed_scale", 1.0) if own_scale is None else float(own_scale),
        "logit_cap": float(cap) if cap is not None and cap > 0 else options.get("logit_cap"),
        "sinks": options.get("sinks", _stacked(sinks)),
    }
    scale = logit_scale(source)
    return found if scale == 1 or found["b_U"] is None else found | {"b_U": found["b_U"] * scale}


def logit_scale(source: Source) -> float:
    """What the logits are multiplied by; a bridge that has folded it into W_U has set it to 1."""
    if source.family is None:
        return 1.0
    own = getattr(source.model.original_model, "logit_scale", None)
    return source.family.logit_scale(source.checkpoint) if own is None else float(own)


def _norms(source: Source) -> dict[str, Any]:
    """The norms of the residual stream; the scale of the logits joins the gain of the final one."""
    model, cfg = source.model, source.model.cfg
    if not source.normed:
        return {}
    kind, final = _kind(source), model.ln_final
    out: dict[str, Any] = {"norm": kind, "norm_before_heads": source.norm_before_heads}
    held = [final]
    if source.norm_before_heads:
        before = [block.ln1 for block in model.blocks]
        out["ln_w"], out["ln_b"] = (_stacked(list(part)) for part in zip(*map(parameters, before), strict=True))
        held += before
    after = [norm for norm in map(source.post_norm, model.blocks) if norm is not None]
    if after:
        out["ln_post_w"] = torch.stack([parameters(norm)[0] for norm in after])
    out["ln_final_w"], out["ln_final_b"] = parameters(final)
    scale = logit_scale(source)
    if scale != 1:
        gain, bias = out["ln_final_w"], out["ln_final_b"]
        out["ln_final_w"] = model.W_E.new_full((model.W_E.shape[1],), scale) if gain is None else gain * scale
        out["ln_final_b"] = None if bias is None else bias * scale
    found = {own_eps(original(norm)) for norm in (*held, *after)} - {None}
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__}: the eps of its norms differ, {found}, and this is not supported")
    return out | {"eps": found.pop() if found else float(cfg.eps)}


def _kind(source: Source) -> str:
    if source.family is not None:
        return source.family.norm_kind
    return "layernorm" if source.model.cfg.normalization_type.startswith("LN") else "rmsnorm"


def parameters(norm: Any) -> tuple[Any, Any]:
    """The gain and the bias of a norm; None where they are folded away."""
    own = original(norm)
    gain, bias = (getattr(own, long, getattr(own, short, None)) for long, short in (("weight", "w"), ("bias", "b")))
    return 1 + gain if gain is not None and getattr(norm, "uses_weight_offset", False) else gain, bias


def _stored(owner: Any, name: str) -> Any:
    """A weight as it is stored, before key/value heads are repeated for query heads; None if there is none."""
    try:
        own = getattr(owner, f"_{name}", None)
        return getattr(owner, name) if own is None else own
    except AttributeError:  # TransformerBridge raises where a model has no such bias
        return None


def _stacked(tensors: list[Any]) -> Tensor | None:
    """Small tensors of all layers as one; None if a layer has none."""
    return None if any(tensor is None for tensor in tensors) else torch.stack(tensors)


def _plain(value: Any) -> Any:
    """A weight without gradients, float16 as float32; an option as it is."""
    if isinstance(value, LayerStack):
        return LayerStack([_plain(layer) for layer in value])
    if isinstance(value, Tensor):
        return value.detach().float() if value.dtype == torch.float16 else value.detach()
    return value


def _attention_only(source: Source, options: dict[str, Any]) -> bool:
    """Whether the heads are the whole model, and CircuitWeights can make their patterns at every length."""
    cfg = source.model.cfg
    shaped = ("use_logn_attn", "use_dynamic_ntk_rope")
    beyond = any(getattr(cfg, name, False) for name in shaped) and (cfg.train_seq_length or cfg.n_ctx) < cfg.n_ctx
    windowed = any(getattr(a, "attn_type", "") == "local" and cfg.window_size < cfg.n_ctx for a in source.attentions)
    capped = cfg.attn_scores_soft_cap is not None and cfg.attn_scores_soft_cap > 0
    folded = "ln_w" not in options and "ln_b" not in options
    return (
        source.family is None
        and not source.unnamed
        and cfg.attn_only
        and cfg.positional_embedding_type != "alibi"
        and (cfg.positional_embedding_type != "shortformer" or folded)
        and not ({"ln_post_w", "sinks"} & options.keys() or beyond or windowed or capped)
    )
