"""Attention functions that stand in transformers' attention interface while a model runs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyfastcircuits.adapters.family import Interface
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
        shape: dict[str, Any] = {
            "window": sliding_window,
            "softcap": softcap,
            "sinks": None if s_aux is None else s_aux.to(wide),
        }
        pattern: Pattern
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            pattern = softmax_pattern(q, k, scaling, padding, **shape)
        else:
            pattern = QKPattern.of(q, k, scaling, padding, **shape)
        return apply_pattern(pattern, v[None])[0].transpose(1, 2).to(dtype), pattern

    return attend


class ScaledDotProduct(TorchFunctionMode):
    """Within it another attention function stands in the place of torch's scaled_dot_product_attention."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch."""
        kwargs = kwargs or {}
        if called is not torch.nn.functional.scaled_dot_product_attention:
            return called(*args, **kwargs)
        q, k, v = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        given = {"scaling": scale, "is_causal": kwargs.get("is_causal", False)}
        return self._attend(None, q, k, v, mask, **given)[0].transpose(1, 2)


def plain(
    _: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, *, scaling: float, is_causal: bool
) -> tuple[Tensor, Pattern]:
    """What torch's scaled_dot_product_attention computes, with its pattern; the result is [B, T, H, r]."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = scaling * (q @ k.mT)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    hidden = scores.isneginf().all(-1, keepdim=True)  # padding, to which torch gives zeros
    pattern = scores.softmax(-1).masked_fill(hidden, 0)
    return (pattern @ v).transpose(1, 2), pattern


@contextmanager
def attending(
    config: Any, attend: Callable[..., Any] | None, interface: Interface, *, masked: bool = False
) -> Iterator[None]:
    """Put another attention function into a configuration's modules, by the interface through which they attend.

    Args:
        config: the configuration that the modules read.
        attend: the function; None without an interface, where modules then attend as "eager" does.
        interface: see Family.
        masked: whether modules are given masks as those with "eager" attention.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = {"products": "eager", "sdpa": "sdpa"}.get(interface, "pyfastcircuits_masked" if masked else "pyfastcircuits")
    if masked:
        ALL_MASK_ATTENTION_FUNCTIONS.register("pyfastcircuits_masked", _mask)
    implementation = config._attn_implementation
    if interface == "transformers":
        ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        config._attn_implementation = name
        with ScaledDotProduct(attend) if interface == "sdpa" and attend is not None else nullcontext():
            yield
    finally:
        config._attn_implementation = implementation
        if interface == "transformers":
            del ALL_ATTENTION_FUNCTIONS[name]


def _mask(*args: Any, **given: Any) -> Tensor | None:
    """The mask of "eager" attention, in float64 too finite in the fp32 that softmax computes in: then a row of padding
    is no row of NaN.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **given)
    wide = mask is not None and mask.dtype == torch.float64
    return mask.clamp_min(torch.finfo(torch.float32).min) if wide and mask is not None else mask
