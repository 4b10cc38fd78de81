"""Attention functions that stand in transformers' attention interface while a model runs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.run.patterns import Pattern, QKPattern, apply_pattern, softmax_pattern


class Made(Exception):
    """The way out of an attention that has made its queries, keys and values."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.tensors = q, k, v


def stop(_: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **given: Any) -> None:
    """Raise Made."""
    raise Made(q, k, v)


def eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Pattern]:
    """Attention by the family's own eager function, which gives heads [B, T, H, r] and patterns [B, H, T, T]."""
    if getattr(module, "reorder_and_upcast_attn", False):  # of GPT-2, which asks for "eager" by its name
        out: tuple[Tensor, Tensor] = module._upcast_and_reordered_attn(q, k, v, attention_mask)
    else:
        family = sys.modules[type(module).__module__]
        out = family.eager_attention_forward(module, q, k, v, attention_mask, **given)
    return out


def tiled(padding: Tensor | None) -> Callable[..., tuple[Tensor, Pattern]]:
    """The same attention in memory that grows with T; gradients of queries or keys still need a layer's patterns."""

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, Pattern]:
        dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        shape = {"window": sliding_window, "softcap": softcap, "sinks": None if s_aux is None else s_aux.to(wide)}
        pattern: Pattern
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            pattern = softmax_pattern(q, k, scaling, padding, **shape)
        else:
            pattern = QKPattern.of(q, k, scaling, padding, **shape)
        return apply_pattern(pattern, v[None])[0].transpose(1, 2).to(dtype), pattern

    return attend


@contextmanager
def attending(config: Any, attend: Callable[..., Any] | None, *, masked: bool = False) -> Iterator[None]:
    """Put another attention function into a configuration's modules; if `masked`, it is given masks as "eager" is.

    Without a function, modules that know no interface attend as "eager" does.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "pyfastcircuits_masked" if masked else "pyfastcircuits"
    if masked:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask)
    implementation = config._attn_implementation
    if attend is not None:
        ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        config._attn_implementation = name if attend is not None else "eager"
        yield
    finally:
        config._attn_implementation = implementation
        if attend is not None:
            del ALL_ATTENTION_FUNCTIONS[name]


def _mask(*args: Any, **given: Any) -> Tensor | None:
    """The mask of "eager" attention, in float64 too finite in the fp32 that softmax computes in: then a row of padding
    is no row of NaN.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **given)
    wide = mask is not None and mask.dtype == torch.float64
    return mask.clamp_min(torch.finfo(torch.float32).min) if wide and mask is not None else mask
