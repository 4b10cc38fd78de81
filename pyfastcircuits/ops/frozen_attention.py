"""Attention of a clean run, made again tile by tile, for streams of values that it never saw."""

from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import DTYPES, Backend, Precision, check_precision, resolve_backend


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
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds q, k, values and patterns to 2^-8 relative.
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
    arguments = _checked(q, k, values, lse, pre, post, mask, scale, window, softcap)
    return _run(arguments, precision, backend)[0]


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
    return _run(_checked(q, k, none, None, None, None, mask, scale, window, softcap), precision, backend)[1]


Arguments = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    float,
    int | None,
    float | None,
    bool,
]


def _run(arguments: Arguments, precision: str, backend: str) -> tuple[Tensor, Tensor]:
    q = arguments[0]
    if backend == "cuda":
        raise RuntimeError("backend='cuda': frozen_attention has no CUDA C++ kernel; use 'triton'")
    chosen = resolve_backend(backend, q.device)
    check_precision(precision)
    if chosen == "reference":
        out, lse = reference.frozen_attention(*arguments)
        return out.to(_result_dtype(q)), lse
    if chosen == "triton":
        from pyfastcircuits.kernels.frozen_attention import frozen_attention_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.frozen_attention
    out, lse = kernel(*arguments, precision)
    return out, lse


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype == torch.bfloat16 else q.dtype


@torch.library.register_fake("pyfastcircuits::frozen_attention")  # type: ignore[untyped-decorator]
def frozen_attention_fake(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    lse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    transposed: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    streams, batches, _, positions, width = values.shape
    heads = (k if transposed else q).shape[1]
    out = values.new_empty(streams, batches, heads, positions, width, dtype=_result_dtype(q))
    return out, q.new_empty(batches if lse is None else 0, q.shape[1], positions, dtype=torch.float64)


def save_patterns(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward of every backend needs."""
    q, k, values, lse, pre, post, mask, *options = inputs
    ctx.save_for_backward(q, k, output[1] if lse is None else lse, pre, post, mask)
    ctx.options, ctx.dtype = options, values.dtype
    ctx.mark_non_differentiable(output[1])


def transposed_patterns(kernel: Any) -> Any:
    """Backward of a linear op: the same patterns, transposed."""

    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, pre, post, mask = ctx.saved_tensors
        scale, window, softcap, transposed, precision = ctx.options
        q, k = (x.to(gradient.dtype) for x in (q, k))
        out = kernel(q, k, gradient, lse, pre, post, mask, scale, window, softcap, not transposed, precision)[0]
        return None, None, out.to(ctx.dtype), *[None] * 9

    return backward


torch.library.register_autograd(
    "pyfastcircuits::frozen_attention",
    transposed_patterns(torch.ops.pyfastcircuits.frozen_attention),
    setup_context=save_patterns,
)


def _checked(
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
) -> Arguments:
    for name, tensor, shape in (("q", q, "[B, H, T, r]"), ("k", k, "[B, Hkv, T, r]")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if values.dim() != 5:
        raise ValueError(f"values has shape {list(values.shape)}, expected [S, B, Hkv, T, s]")
    batches, heads, positions, rank = q.shape
    kv = k.shape[1]
    if heads % kv if kv else heads:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}: {heads} heads are no multiple of {kv}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("k", k, (batches, kv, positions, rank)),
        ("values", values, (len(values), batches, kv, positions, values.shape[4])),
        ("lse", lse, (batches, heads, positions)),
        ("pre", pre, (batches, positions)),
        ("post", post, (batches, positions)),
        ("mask", mask, (batches, positions)),
    ]
    for name, given, wanted in expected:
        if given is None:
            continue
        if tuple(given.shape) != wanted:
            raise ValueError(
                f"{name} has shape {list(given.shape)}, expected {list(wanted)} "
                f"(q is {list(q.shape)}, k {list(k.shape)})"
            )
        if given.device != q.device:
            raise ValueError(f"{name} is on {given.device}, but q is on {q.device}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("k", k), ("values", values)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but q has {q.dtype}")
    constants = {"q": q, "k": k, "lse": lse, "pre": pre, "post": post}
    for name, given in constants.items():
        if given is not None and not given.is_floating_point():
            raise TypeError(f"{name} has dtype {given.dtype}, expected floating point")
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but frozen patterns have none: pass {name}.detach()")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window is {window!r}, expected an integer from 1 on")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap!r}, expected a positive number")
    if scale is None:
        scale = max(rank, 1) ** -0.5
    return q, k, values, lse, pre, post, mask, scale, window, softcap, False
