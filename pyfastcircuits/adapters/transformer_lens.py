"""TransformerLens models, both HookedTransformer (up to 3.9) and TransformerBridge (from 4), by what they offer.

Whatever processing a model was loaded with (folded norms, centred weights) is in its weights and in its own run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.forward import Layer, ModelForward, layers_of, watch
from pyfastcircuits.adapters.products import Products, Reached
from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.adapters.tokens import Tokens
from pyfastcircuits.model.layers import LayerStack
from pyfastcircuits.model.norms import normalized
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.patterns import QKPattern


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
    options["attention_scale"] = _attention_scale(model)
    options["embed_scale"] = float(getattr(_original(model.embed), "scalar_embed_scale", 1.0))
    options["logit_cap"] = _logit_cap(model)
    options["b_U"] = _stored(model, "b_U")
    options = {name: _plain(value) for name, value in options.items()}
    return CircuitWeights(
        W_E=_plain(model.W_E), W_U=_plain(model.W_U), **options, attention_only=_attention_only(cfg, options)
    )


def record(model: Any, weights: CircuitWeights, given: Tokens, store: str = "patterns") -> Recording:
    """Record one forward pass of the model. The padding of a mask shifts positions, as TransformerLens does it."""
    if given.chosen:
        raise ValueError(f"position_ids is given, but {type(model).__name__} takes none")
    tokens, mask, seen = given.tokens, given.mask, Recording(model=model)
    norms = [_head_norms(block.attn) for block in model.blocks]

    def keep_last(written: Tensor) -> None:
        seen.streams[len(model.blocks) :] = [written]  # every block's end, until the last one's

    with torch.no_grad(), Hooks(model) as hooks:
        for block, head_norms in zip(model.blocks, norms, strict=True):
            watch(hooks, seen, block, block.attn, head_norms)
            hooks.after(block.hook_resid_pre, lambda _, out: seen.streams.append(out))
            hooks.after(block.hook_attn_out, lambda _, out: seen.written.append(out))
            if store == "patterns":
                hooks.after(block.attn.hook_pattern, lambda _, out: seen.patterns.append(out))
            if _post_norm(block) is not None:
                hooks.before(_post_norm(block), lambda x, _: seen.attended.append(x))
        hooks.after(model.blocks[-1].hook_resid_post, lambda _, out: keep_last(out))
        if model.cfg.normalization_type is not None:
            hooks.after(model.ln_final, lambda _, out: setattr(seen, "normed", out))
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
        if hasattr(model, "original_model"):
            options["use_cache"] = False
        model(tokens, return_type=None, **options)
    modules = [(block, block.attn, own) for block, own in zip(model.blocks, norms, strict=True)]
    layers = layers_of(seen, weights, modules, [{}] * len(modules))
    forward = TransformerLensForward(model, weights, layers, seen.streams[0].dtype, len(tokens), mask)
    if store == "qk":
        seen.patterns = [forward.pattern(layer, seen.streams[layer]) for layer in range(len(layers))]
    seen.forward = forward
    return seen


@dataclass(frozen=True, eq=False)
class TransformerLensForward(ModelForward):
    """The Forward through TransformerLens' attention.

    Its scores and its mixtures of values are its only products of two activations, and are caught there.
    """

    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ModelForward."""
        values: list[Tensor] = []
        with Hooks(layer.attention) as hooks:
            hooks.after(_values(layer.attention), lambda _, out: values.append(out))
            q, keys = self._until(Products(1), layer, read)
        heads, kv = q.shape[1], self.weights.W_K.shape[1]
        v = values[0].view(*read.shape[:2], -1, self.weights.d_head).transpose(1, 2)
        return q, keys.mT[:, :: heads // kv], v[:, :: v.shape[1] // kv]

    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ModelForward."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        read = q.new_zeros(*v.shape[:1], v.shape[2], self.weights.d_model, dtype=self.dtype)
        pattern, _ = self._until(Products(2, q, k.mT), layer, read)
        return pattern.to(v.dtype) @ v

    def score_scale(self, layer: int) -> float:
        """See Forward."""
        own = getattr(self.layers[layer].attention, "attn_scale", None)
        return super().score_scale(layer) if own is None else 1 / float(own)

    def pattern(self, layer: int, stream: Tensor) -> QKPattern:
        """A layer's patterns in the clean run, whose residual stream [B, T, d] before it is given.

        Raises:
            ValueError: patterns that a QKPattern does not express.
        """
        cfg, own = self.model.cfg, self.layers[layer].attention
        if cfg.positional_embedding_type == "alibi":
            raise ValueError("store is 'qk', but positional_embedding_type is 'alibi': its patterns must be kept")
        native = _original(own)
        window = cfg.window_size if getattr(own, "attn_type", None) == "local" else None
        for holder in (getattr(native, "config", None), native):  # of all layers, or of some
            window = getattr(holder, "sliding_window", window)
        cap = getattr(native, "attn_logit_softcapping", getattr(cfg, "attn_scores_soft_cap", None))
        stream = stream.to(self.weights.compute_dtype)
        q, k, _ = self.qkv(layer, normalized(stream, self.weights)[None])
        return QKPattern.of(q[0], k[0], self.score_scale(layer), self.mask, window, cap if cap and cap > 0 else None)

    def _until(self, products: Products, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor]:
        """Run an attention on [N * B, T, d] up to the product that `products` stops at, and give its two factors."""
        shift = layer.block_call.kwargs.get("shortformer_pos_embed")
        placed = read if shift is None else read + shift
        try:
            with _one_input(self.model.cfg), products:
                if hasattr(layer.attention, "original_component"):  # a TransformerBridge's
                    layer.attention_call(layer.attention, read)
                else:
                    given = layer.attention_call.kwargs
                    layer.attention(query_input=placed, key_input=placed, value_input=read, **given)
        except Reached as reached:
            return reached.factors[-1]
        raise RuntimeError(f"{type(layer.attention).__name__} makes no product of queries and keys")


@contextmanager
def _one_input(cfg: Any) -> Iterator[None]:
    """Let attention take one input for all its heads."""
    split = [name for name in ("use_split_qkv_input", "use_attn_in") if getattr(cfg, name, False)]
    try:
        for name in split:
            setattr(cfg, name, False)
        yield
    finally:
        for name in split:
            setattr(cfg, name, True)


def _values(attention: Any) -> Any:
    """The module whose output is the values, with or without a dimension of heads."""
    return attention.v if hasattr(attention, "original_component") else attention.hook_v


def _head_norms(attention: Any) -> tuple[Any, ...]:
    """The norms of queries and of keys in an attention."""
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return tuple(norm for norm in norms if norm is not None)


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
    """A weight as it is stored, before key/value heads are repeated for query heads; None if there is none."""
    try:
        own = getattr(owner, f"_{name}", None)
        return getattr(owner, name) if own is None else own
    except AttributeError:  # TransformerBridge raises where a model has no such bias
        return None


def _original(component: Any) -> Any:
    """The module that a component of a TransformerBridge stands in for."""
    return getattr(component, "original_component", component)


def _parameters(norm: Any) -> tuple[Any, Any]:
    """The gain and the bias of a norm; None where they are folded away."""
    own = _original(norm)
    gain, bias = (getattr(own, long, getattr(own, short, None)) for long, short in (("weight", "w"), ("bias", "b")))
    return 1 + gain if gain is not None and getattr(norm, "uses_weight_offset", False) else gain, bias


def _post_norm(block: Any) -> Any:
    return getattr(block, "ln1_post", None)


def _positional(cfg: Any) -> str:
    scheme = cfg.positional_embedding_type
    return scheme if scheme in ("standard", "shortformer", "rotary") else "none"


def _attention_scale(model: Any) -> float | None:
    """The divisor of attention scores; a TransformerBridge has it in the attention that it stands in for."""
    scaling = getattr(_original(model.blocks[0].attn), "scaling", None)
    scale = getattr(model.cfg, "attn_scale", None) if scaling is None else 1 / scaling
    return float(scale) if scale is not None and scale > 0 else None


def _logit_cap(model: Any) -> float | None:
    own = getattr(model.cfg, "output_logits_soft_cap", None)
    config = getattr(getattr(model, "original_model", None), "config", None)
    cap = own if own is not None and own > 0 else getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None


def _plain(value: Any) -> Any:
    """A weight without gradients, float16 as float32; an option as it is."""
    if isinstance(value, LayerStack):
        return LayerStack([_plain(layer) for layer in value])
    if isinstance(value, Tensor):
        return value.detach().float() if value.dtype == torch.float16 else value.detach()
    return value


def _attention_only(cfg: Any, options: dict[str, Any]) -> bool:
    """Whether the heads are the whole model, and CircuitWeights can make their patterns."""
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
