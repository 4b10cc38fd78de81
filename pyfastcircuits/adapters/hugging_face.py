"""Hugging Face causal language models in memory: their weights as views, and one forward pass recorded by hooks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family
from pyfastcircuits.adapters.forward import Layer, ModelForward, layers_of, watch
from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.patterns import Pattern, QKPattern, apply_pattern, softmax_pattern

FAMILIES = ("gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # config.model_type, a module each


def family_of(model_type: str | None, where: str) -> Family:
    """The description of a model type's family.

    Raises:
        ValueError: the family is not supported.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    family: Family = import_module(f"pyfastcircuits.adapters.{model_type}").FAMILY
    return family


def read_checkpoint(family: Family, checkpoint: Checkpoint) -> CircuitWeights:
    """The circuits of a checkpoint, without its MLPs: `attention_only` is False."""
    checkpoint.refuse("quantization_config", "quantized weights are not supported")
    return CircuitWeights(**family.read(checkpoint), attention_only=False)


def weights_of(model: Any) -> CircuitWeights:
    """Views of the weights of a model in memory; errors as CircuitWeights.from_model."""
    where, config = type(model).__name__, model.config.to_dict()
    family = family_of(config.get("model_type"), where)
    if not hasattr(model, family.body):
        raise ValueError(f"{where} has no {family.body!r}: expected the family's causal language model")
    tensors = {name: lambda tensor=tensor: tensor for name, tensor in model.state_dict().items()}
    return read_checkpoint(family, Checkpoint(where, config, tensors, family.body))


def record(
    model: Any, weights: CircuitWeights, tokens: Tensor, mask: Tensor | None, store: str = "patterns"
) -> Recording:
    """Record one forward pass of the model below its output embedding."""
    family = family_of(model.config.model_type, type(model).__name__)
    body = model.get_submodule(family.body)
    layers = list(body.get_submodule(family.layers))
    attentions = [layer.get_submodule(family.attention) for layer in layers]
    norms = [tuple(own.get_submodule(name) for name in family.head_norms) for own in attentions]
    seen, options = Recording(), []
    attend = partial(_tiled, padding=mask) if store == "qk" else _eager

    def attend_and_keep(module: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, **given: Any) -> Any:
        options.append({"attention_mask": hidden, **given})
        return attend(module, q, k, v, attention_mask=hidden, **given)

    with torch.no_grad(), _attending(body.config, attend_and_keep, masked=store != "qk"), Hooks(model) as hooks:
        for layer, attention, head_norms in zip(layers, attentions, norms, strict=True):
            watch(hooks, seen, layer, attention, head_norms)
            hooks.before(layer, lambda x, _: seen.streams.append(x))
            hooks.after(attention, lambda _, out: _keep_attention(out, seen))
            if family.post_norm is not None:
                hooks.after(layer.get_submodule(family.post_norm), lambda x, out: _keep_post_norm(x, out, seen))
        norm = body.get_submodule(family.final_norm)
        hooks.before(norm, lambda x, _: seen.streams.append(x))
        hooks.after(norm, lambda _, out: setattr(seen, "normed", out))
        body(input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False)
    own = layers_of(seen, weights, list(zip(layers, attentions, norms, strict=True)), options)
    seen.forward = HuggingFaceForward(model, weights, own, seen.streams[0].dtype, len(tokens), mask, store == "qk")
    return seen


def _keep_attention(out: tuple[Tensor, Pattern | None], seen: Recording) -> None:
    written, pattern = out
    if pattern is None:
        raise RuntimeError("the model's attention gave no pattern, though it was given a function that does")
    seen.written.append(written)
    seen.patterns.append(pattern)


def _keep_post_norm(attended: Tensor, written: Tensor, seen: Recording) -> None:
    seen.attended.append(attended)
    seen.written[-1] = written


@dataclass(frozen=True, eq=False)
class HuggingFaceForward(ModelForward):
    """The Forward through transformers' attention interface: a function of ours stands where values are mixed."""

    tiled: bool  # the clean run worked on tiles and kept no patterns

    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ModelForward."""
        with _attending(layer.attention.config, _stop):
            try:
                layer.attention_call(layer.attention, read)
            except _Made as made:
                return made.tensors
        raise RuntimeError(f"{type(layer.attention).__name__} does not call transformers' attention interface")

    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ModelForward."""
        out: Tensor = self._attend(len(q))(layer.attention, q, k, v, **layer.options)[0]
        return out.transpose(1, 2)

    def run(self, layer: Layer, stream: Tensor) -> Tensor:
        """See ModelForward."""
        with _attending(layer.attention.config, self._attend(len(stream))):
            return super().run(layer, stream)

    def _attend(self, rows: int) -> Callable[..., tuple[Tensor, Pattern]]:
        """The attention function of the clean run, for so many rows of tokens."""
        if not self.tiled:
            return _eager
        return partial(_tiled, padding=None if self.mask is None else self.mask.repeat(rows // self.batch, 1))


class _Made(Exception):
    """The way out of an attention that has made its queries, keys and values."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.tensors = q, k, v


def _stop(_: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **given: Any) -> None:
    raise _Made(q, k, v)


def _eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Pattern]:
    """Attention by the family's own eager function, which gives heads [B, T, H, r] and patterns [B, H, T, T]."""
    if getattr(module, "reorder_and_upcast_attn", False):  # of GPT-2, which asks for "eager" by its name
        out: tuple[Tensor, Tensor] = module._upcast_and_reordered_attn(q, k, v, attention_mask)
    else:
        family = sys.modules[type(module).__module__]
        out = family.eager_attention_forward(module, q, k, v, attention_mask, **given)
    return out


def _tiled(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    padding: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **given: Any,
) -> tuple[Tensor, Pattern]:
    """The same attention in memory that grows with T; gradients of queries or keys still need a layer's patterns."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    pattern: Pattern
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        pattern = softmax_pattern(q, k, scaling, padding, sliding_window, softcap)
    else:
        pattern = QKPattern.of(q, k, scaling, padding, sliding_window, softcap)
    return apply_pattern(pattern, v[None])[0].transpose(1, 2).to(dtype), pattern


@contextmanager
def _attending(config: Any, attend: Callable[..., Any], *, masked: bool = False) -> Iterator[None]:
    """Put another attention function into a configuration's modules; if `masked`, it is given masks as "eager" is."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "pyfastcircuits_masked" if masked else "pyfastcircuits"
    if masked:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    implementation = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[name]
