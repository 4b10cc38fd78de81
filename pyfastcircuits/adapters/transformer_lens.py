"""TransformerLens models, both HookedTransformer (up to 3.9) and TransformerBridge (from 4), by what they offer.

Whatever processing a model was loaded with (folded norms, centred weights) is in its weights and in its own run.
"""

from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.layers import LayerStack
from pyfastcircuits.weights import CircuitWeights

__all__ = ["record", "weights_of"]


def weights_of(model: Any) -> CircuitWeights:
    """Views of the model's weights; errors as CircuitWeights.from_model."""
    cfg, attentions = model.cfg, [block.attn for block in model.blocks]
    _refuse(model)
    options: dict[str, Any] = {}
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        options[name] = LayerStack([_stored(attention, name) for attention in attentions])
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        biases = [_stored(attention, name) for attention in attentions]
        if all(bias is not None for bias in biases):
            options[name] = torch.stack(biases)
    if cfg.normalization_type is not None:
        options["norm"] = "layernorm" if cfg.normalization_type.startswith("LN") else "rmsnorm"
        options["eps"] = float(cfg.eps)
        before = [_parameters(block.ln1) for block in model.blocks]
        for name, values in zip(("ln_w", "ln_b"), zip(*before, strict=True), strict=True):
            if all(value is not None for value in values):
                options[name] = torch.stack(values)
        options["ln_final_w"], options["ln_final_b"] = _parameters(model.ln_final)
    if getattr(cfg, "use_normalization_before_and_after", False) or _post_norm(model.blocks[0]) is not None:
        options["ln_post_w"] = torch.stack([_parameters(_post_norm(block))[0] for block in model.blocks])
    options["positional"] = scheme = _positional(cfg)
    if scheme in ("standard", "shortformer"):
        options["W_pos"] = model.W_pos
    scale = getattr(cfg, "attn_scale", None)
    options["attention_scale"] = scale if scale is not None and scale > 0 else None
    options["embed_scale"] = float(getattr(_original(model.embed), "scalar_embed_scale", 1.0))
    options["logit_cap"] = _logit_cap(model)
    options["b_U"] = _stored(model, "b_U")
    options = {name: _plain(value) for name, value in options.items()}
    return CircuitWeights(
        W_E=_plain(model.W_E), W_U=_plain(model.W_U), **options, attention_only=_attention_only(cfg, options)
    )


def record(model: Any, tokens: Tensor, mask: Tensor | None) -> Recording:
    """One forward pass of the model. The padding of a mask shifts positions, as TransformerLens does it."""
    seen = Recording([], [], [], [], tokens)

    def keep_last(written: Tensor) -> None:
        seen.streams[len(model.blocks) :] = [written]  # every block's end, until the last one's

    with Hooks(model) as hooks:
        for block in model.blocks:
            hooks.after(block.hook_resid_pre, lambda _, out: seen.streams.append(out))
            hooks.after(block.attn.hook_pattern, lambda _, out: seen.patterns.append(out))
            hooks.after(block.hook_attn_out, lambda _, out: seen.written.append(out))
            if _post_norm(block) is not None:
                hooks.before(_post_norm(block), seen.attended.append)
        hooks.after(model.blocks[-1].hook_resid_post, lambda _, out: keep_last(out))
        if model.cfg.normalization_type is not None:
            hooks.after(model.ln_final, lambda _, out: setattr(seen, "normed", out))
        masked = {} if mask is None else {"attention_mask": mask.long()}
        model(tokens, return_type=None, **masked)
    if model.cfg.normalization_type is None:
        seen.normed = seen.streams[-1]
    return seen


def _refuse(model: Any) -> None:
    cfg, where = model.cfg, type(model).__name__
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise ValueError(
            f"{where}: attention_dir is {cfg.attention_dir!r}, and attention that is not causal is not supported"
        )
    if cfg.normalization_type not in (None, "LN", "LNPre", "RMS", "RMSPre"):
        raise ValueError(f"{where}: normalization_type {cfg.normalization_type!r} is not supported")
    if not len(model.blocks):
        raise ValueError(f"{where} has no blocks")


def _stored(owner: Any, name: str) -> Any:
    """A weight as it is stored, None if there is none: of key/value heads, before they are repeated for query heads."""
    try:
        own = getattr(owner, f"_{name}", None)
        return getattr(owner, name) if own is None else own
    except AttributeError:  # TransformerBridge raises where a model has no such bias
        return None


def _original(component: Any) -> Any:
    """The module that a component of a TransformerBridge stands in for."""
    return getattr(component, "original_component", component)


def _parameters(norm: Any) -> tuple[Any, Any]:
    """What a norm multiplies by and adds; None where that is folded away."""
    own = _original(norm)
    gain, bias = (getattr(own, long, getattr(own, short, None)) for long, short in (("weight", "w"), ("bias", "b")))
    return 1 + gain if gain is not None and getattr(norm, "uses_weight_offset", False) else gain, bias


def _post_norm(block: Any) -> Any:
    return getattr(block, "ln1_post", None)


def _positional(cfg: Any) -> str:
    scheme = cfg.positional_embedding_type
    return scheme if scheme in ("standard", "shortformer", "rotary") else "none"


def _logit_cap(model: Any) -> float | None:
    own = getattr(model.cfg, "output_logits_soft_cap", None)
    config = getattr(getattr(model, "original_model", None), "config", None)
    cap = own if own is not None and own > 0 else getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None


def _plain(value: Any) -> Any:
    """Weights without gradients, float16 as float32."""
    if isinstance(value, LayerStack):
        return LayerStack([_plain(layer) for layer in value])
    if isinstance(value, Tensor):
        return value.detach().float() if value.dtype == torch.float16 else value.detach()
    return value


def _attention_only(cfg: Any, options: dict[str, Any]) -> bool:
    """Whether CircuitWeights can make the patterns on their own, with nothing beside the heads."""
    special = ("use_local_attn", "use_qk_norm", "scale_attn_by_inverse_layer_idx", "parallel_attn_mlp")
    capped = (getattr(cfg, "attn_scores_soft_cap", None) or -1) > 0
    folded = options.get("ln_w") is None and options.get("ln_b") is None
    return (
        bool(getattr(cfg, "attn_only", False))
        and (cfg.positional_embedding_type == "standard" or (cfg.positional_embedding_type == "shortformer" and folded))
        and "ln_post_w" not in options
        and not capped
        and not any(getattr(cfg, name, False) for name in special)
    )
