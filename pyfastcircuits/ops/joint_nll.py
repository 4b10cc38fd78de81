"""Losses of pairs of ablations at once, each of which changes the clean logits by a low-rank term."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import (
    Backend,
    Precision,
    check_cap,
    check_precision,
    check_range,
    no_cuda_kernel,
    resolve_backend,
)
from pyfastcircuits.ops.sweep_nll import check_sweep, checked_group, clean_logsumexp


def joint_statistics(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [S]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor | None = None,  # [T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a slice of the vocabulary adds to a sweep of pairs: the raw op, whose results of slices can be merged.

    Logits are `base[t] + C[pairs[p, 0], t] + C[pairs[p, 1], t]` with `C[i] = delta[i] @ basis[group[i]]`. Returns what
    `sweep_statistics` does: logsumexp [P, T], logits of `tokens` [P, T, K], expected change [P, T] (or [0, T]).
    """
    chosen = resolve_backend(backend, base.device)
    check_precision(precision)
    check_cap(cap)
    if chosen == "reference":
        return reference.joint_nll(base, delta, basis, tokens, group, pairs, clean_lse, cap)
    if chosen == "cuda":
        raise no_cuda_kernel("joint_nll")
    if chosen == "triton":
        from pyfastcircuits.kernels.joint_nll import joint_nll_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.joint_nll
    lse, picked, change = kernel(base, delta, basis, tokens, group, pairs, clean_lse, precision, cap)
    return lse, picked, change


@torch.library.register_fake("pyfastcircuits::joint_nll")  # type: ignore[untyped-decorator]
def joint_nll_fake(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    tokens: Tensor,
    group: Tensor,
    pairs: Tensor,
    clean_lse: Tensor | None,
    precision: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    P, T = len(pairs), len(base)
    shapes = ((P, T), (P, T, tokens.shape[1]), (0 if clean_lse is None else P, T))
    lse, picked, change = (base.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return lse, picked, change


@overload
def joint_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    pairs: Tensor,
    *,
    group: Tensor | None = None,
    cap: float | None = None,
    kl: Literal[False] = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def joint_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    pairs: Tensor,
    *,
    group: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def joint_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    pairs: Tensor,
    *,
    group: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Next-token losses of P pairs of ablations, both at once, whose changes of the logits add; no logit is stored.

    The logits of pair p at position t are `base[t] + C[i, t] + C[j, t]`, where i, j = pairs[p] and `C[i] = delta[i] @
    basis[group[i]]` (an ablation passes minus what it removes): the two are independent, as heads of one layer are with
    frozen norms. Each C is made once, however many pairs it is in: a pair costs two additions and an exponential for
    each logit. Deterministic: results do not depend on threads or on how the work is cut. Not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [S, T, r], r >= 0: the single ablations.
        basis: [G, r, V].
        targets: [T] integer tokens.
        pairs: [P, 2] integers below S; in any order.
        group: [S] integers below G, which basis each ablation writes through; None where G is 1.
        cap: logits x become cap * tanh(x / cap) (a soft cap); `base` is given without it.
        kl: also return KL(clean || ablated) [P, T] in nats.
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds each product's factors to 2^-8 relative.
        backend: see the module; no "cuda".

    Returns:
        nll [P, T] in nats, in base's dtype (fp32 for bfloat16); with `kl`, nll and the divergences.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values; a cap that is not
            positive.
        IndexError: a token outside [0, V), a group outside [0, G), an ablation outside [0, S). CUDA tensors are not
            read to check this.
        RuntimeError: a backend or precision that is not there.

    Source: with frozen patterns and norms the heads of a layer write independently into the residual stream
    (Elhage et al. 2021, section "Attention Heads as Independent and Additive").
    """
    group = checked_group(group, delta, basis)
    check_sweep(base, delta, basis, group, None, [("targets", targets)])
    _check_pairs(pairs, base, len(delta))
    tokens = targets.long()[:, None]
    clean_lse = clean_logsumexp(base, precision, backend, cap) if kl else None
    lse, picked, change = joint_statistics(
        base, delta, basis, tokens, group, pairs.long(), clean_lse, precision, backend, cap
    )
    dtype = torch.float32 if base.dtype == torch.bfloat16 else base.dtype
    nll = (lse - picked[..., 0]).to(dtype)
    return nll if clean_lse is None else (nll, (lse - clean_lse - change).to(dtype))


def _check_pairs(pairs: Tensor, base: Tensor, singles: int) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs has shape {list(pairs.shape)}, expected [P, 2]")
    if pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise TypeError(f"pairs has dtype {pairs.dtype}, expected integers")
    if pairs.device != base.device:
        raise ValueError(f"pairs is on {pairs.device}, but base is on {base.device}")
    if base.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range("pairs", pairs, singles)
