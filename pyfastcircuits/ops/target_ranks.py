"""Ranks of the target under many ablations, from logits that are never stored."""

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend
from pyfastcircuits.ops.sweep_nll import checked_sweep
from pyfastcircuits.shapes import register_outputs, target_ranks_outputs

register_outputs("target_ranks", target_ranks_outputs)

THRESHOLD_ELEMENTS = 1 << 22  # fp64 columns of the basis that are held at once


@public
def rank_partial(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T]
    thresholds: Tensor,  # [P, T]
    *,
    group: Tensor,  # [P]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """The part of ranks that one slice of the vocabulary adds: the raw op, whose results add up to the whole.

    It counts the tokens of the slice, `tokens[t]` left out if it is there, whose logit `base[t] + delta[p, t] @
    basis[group[p]]` is greater than `thresholds[p, t]` (fp64): [P, T] int64. NaN is greater than nothing, and nothing
    is greater than NaN.
    """
    chosen = resolve_backend(backend, base.device, "target_ranks")
    if chosen == "reference":
        return reference.target_ranks(base, delta, basis, tokens, group, thresholds)
    kernel = kernel_of("target_ranks", chosen)
    ranks: Tensor = kernel(base, delta, basis, tokens, group, thresholds, precision)
    return ranks


@public
def target_ranks(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """The number of tokens that each ablation ranks above the target: 0 where it is the model's first choice.

    The logits of ablation p at position t are `base[t] + delta[p, t] @ basis[group[p]]`, as in `sweep_nll`; none is
    stored. Neither a scale nor a soft cap is asked for: both are increasing, so that no rank depends on them.

    The target's own logit is made in fp64 and the others by `precision`: a token counts if it is greater by more than
    their rounding; one that ties with the target to within that may count or not. NaN is greater than nothing, and
    nothing is greater than a target of NaN, so that its rank is 0. Deterministic; not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [P, T, r], r >= 0.
        basis: [G, r, V].
        targets: [T] integer tokens.
        group: [P] integers below G, which basis each ablation writes through; None where G is 1.
        precision: "ieee", "tf32x3", "tf32" or "bf16"; see the module. With "bf16" the target's factors are rounded too.
        backend: see the module; no "cuda".

    Returns:
        [P, T] int64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values.
        IndexError: a target outside [0, V) or a group outside [0, G). CUDA tensors are not read to check this: such
            ranks are -1.
        RuntimeError: a backend or precision that is not there.
    """
    group, tokens = checked_sweep(base, delta, basis, group, {"targets": targets})
    there = (tokens[:, 0] >= 0) & (tokens[:, 0] < base.shape[1])
    tokens = torch.where(there, tokens[:, 0], 0)
    thresholds = _target_logits(base, delta, basis, tokens, group, precision)
    ranks = rank_partial(base, delta, basis, tokens, thresholds, group=group, precision=precision, backend=backend)
    return torch.where(there, ranks, -1)


def _target_logits(
    base: Tensor, delta: Tensor, basis: Tensor, tokens: Tensor, group: Tensor, precision: Precision
) -> Tensor:
    """Logits [P, T] of tokens[t] in fp64, from the factors as `precision` rounds them."""

    def factor(x: Tensor) -> Tensor:
        return (x.bfloat16() if precision == "bf16" else x).double()

    columns = basis[..., tokens].mT  # [G, T, r]
    group = group.clamp(0, len(basis) - 1)
    step = max(1, THRESHOLD_ELEMENTS // max(columns[:1].numel(), 1))
    moved = [
        (factor(some) * factor(columns[which])).sum(-1)
        for some, which in zip(delta.split(step), group.split(step), strict=True)
    ]
    return base.gather(1, tokens[:, None])[:, 0].double() + torch.cat(moved)
