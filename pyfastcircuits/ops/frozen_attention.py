"""The attention patterns of a clean run, recomputed tile by tile and applied to other streams of values."""

import torch
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_frozen_attention
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend

shapes.register_outputs("frozen_attention", shapes.frozen_attention_outputs)
register_frozen_attention("pyfastcircuits::frozen_attention", torch.ops.pyfastcircuits.frozen_attention)


@public
def frozen_attention(
    q: Tensor,  # [B, H, T, r]
    k: Tensor,  # [B, Hkv, T, r]
    values: Tensor,  # [S, B, Hkv, T, s]
    lse: Tensor | None = None,  # [B, H, T]
    *,
    scale: float | None = None,
    pre: Tensor | None = None,  # [B, T]
    post: Tensor | None = None,  # [B, T]
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,  # [B, T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention patterns of q and k applied to S streams of values at once; no pattern is stored.

    `out[n, b, h] = diag(post[b]) A[b, h] diag(pre[b]) values[n, b, h // (H // Hkv)]` with
    `A = softmax(scale * q k.T)`. Linear in `values` and differentiable with respect to them; q, k, lse, pre and post
    are constants of a clean run. Deterministic: results do not depend on threads.

    Args:
        q: [B, H, T, r] queries; float32, float64 or bfloat16, as are k and values.
        k: [B, Hkv, T, r] keys; H is a multiple of Hkv, and query head h uses key head h // (H // Hkv).
        values: [S, B, Hkv, T, s].
        lse: [B, H, T], what `attention_lse` returns for the same q, k and options, precision included; None finds it
            first, at the cost of a second product of q and k. Any other gives weights that do not sum to 1; in float32
            it is off by a rounding of the largest score, which large scores make visible.
        scale: of the scores; None is 1 / sqrt(r).
        pre: [B, T] factors of source positions.
        post: [B, T] factors of destination positions.
        window: a source at this distance or further is hidden; None hides none.
        softcap: scores become softcap * tanh(scores / softcap).
        mask: [B, T], True for positions that may be a source. A destination that sees no source gets zeros; what
            values, pre and k hold where it is False does not matter.
        precision: "ieee", "tf32x3", "tf32" or "bf16"; see the module. "bf16" rounds q, k, values and patterns to
            2^-8 relative.
        backend: see the module.

    Returns:
        [S, B, H, T, s] in values' dtype (fp32 for bfloat16).

    Raises:
        ValueError: shapes, devices or options that do not fit, named with their values; a tensor other than values
            that requires a gradient.
        TypeError: dtypes that do not fit.
        RuntimeError: a backend or precision that is not there.

    Source: frozen attention patterns, "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021); tiles
    as in "FlashAttention" (Dao et al. 2022), with the logsumexp known beforehand.
    """
    return _attend(q, k, values, lse, pre, post, mask, scale, window, softcap, precision, backend)[0]


@public
def attention_lse(
    q: Tensor,  # [B, H, T, r]
    k: Tensor,  # [B, Hkv, T, r]
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,  # [B, T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """Logsumexp of every query's attention scores, [B, H, T] in fp64: what `frozen_attention` takes as `lse`.

    -inf where a query sees no key. Arguments and errors are those of `frozen_attention`.
    """
    none = k.new_empty(0, *k.shape)
    return _attend(q, k, none, None, None, None, mask, scale, window, softcap, precision, backend)[1]


def _attend(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    lse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    precision: Precision,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments, and gives the results and the logsumexp."""
    sizes = shapes.check_shapes(
        q=(q, "B H T r"),
        k=(k, "B Hkv T r"),
        values=(values, "S B Hkv T s"),
        lse=(lse, "B H T", float),
        pre=(pre, "B T", float),
        post=(post, "B T", float),
        mask=(mask, "B T", bool),
    )
    heads, kv = sizes["H"], sizes["Hkv"]
    if heads % kv if kv else heads:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}: {heads} heads are no multiple of {kv}")
    for name, constant in {"q": q, "k": k, "lse": lse, "pre": pre, "post": post}.items():
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but frozen patterns have none: pass {name}.detach()")
    if window is not None and window < 1:
        raise ValueError(f"window is {window!r}, expected an integer from 1 on")
    shapes.check_positive("softcap", softcap)
    shapes.check_positive("scale", scale)
    chosen = resolve_backend(backend, q.device, "frozen_attention")
    scale = max(sizes["r"], 1) ** -0.5 if scale is None else scale
    arguments = q, k, values, lse, pre, post, mask, scale, window, softcap, False
    if chosen == "reference":
        out, lse = reference.frozen_attention(*arguments)
        return out.to(shapes.work_dtype(q)), lse
    out, lse = kernel_of("frozen_attention", chosen)(*arguments, precision)
    return out, lse
