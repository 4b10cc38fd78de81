"""Where the target stands among the logits of many ablations."""

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, check_precision, no_cuda_kernel, resolve_backend
from pyfastcircuits.ops.sweep_nll import check_sweep, checked_group

THRESHOLD_ELEMENTS = 1 << 22  # fp64 columns of the basis that are held at once


def rank_statistics(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T]
    group: Tensor,  # [P]
    thresholds: Tensor,  # [P, T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """What a slice of the vocabulary adds to ranks: the raw op, whose results of several slices add up to the whole.

    How many tokens of the slice, `tokens[t]` left out if it is there, have a logit `base[t] + delta[p, t] @
    basis[group[p]]` greater than `thresholds[p, t]` (fp64): [P, T] int64. NaN is greater than nothing, and nothing is
    greater than NaN.
    """
    chosen = resolve_backend(backend, base.device)
    check_precision(precision)
    if chosen == "reference":
        return reference.target_ranks(base, delta, basis, tokens, group, thresholds)
    if chosen == "cuda":
        raise no_cuda_kernel("target_ranks")
    if chosen == "triton":
        from pyfastcircuits.kernels.target_ranks import target_ranks_triton as kernel
    else:
        kernel = torch.ops.pyfastcircuits.target_ranks
    return kernel(base, delta, basis, tokens, group, thresholds, precision)  # type: ignore[no-any-return]


@torch.library.register_fake("pyfastcircuits::target_ranks")  # type: ignore[untyped-decorator]
def target_ranks_fake(
    base: Tensor, delta: Tensor, basis: Tensor, tokens: Tensor, group: Tensor, thresholds: Tensor, precision: str
) -> Tensor:
    """Shape alone, for torch.compile."""
    return base.new_empty(delta.shape[:2], dtype=torch.long)


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
    """How many tokens each ablation ranks above the target: 0 where the target is the model's first choice.

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
        precision: "ieee", "tf32" or "bf16"; see the module. With "bf16" the target's factors are rounded too.
        backend: see the module; no "cuda".

    Returns:
        [P, T] int64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values.
        IndexError: a target outside [0, V) or a group outside [0, G). CUDA tensors are not read to check this: such
            ranks are -1.
        RuntimeError: a backend or precision that is not there.
    """
    group = checked_group(group, delta, basis)
    check_sweep(base, delta, basis, group, None, [("targets", targets)])
    check_precision(precision)
    there = (targets >= 0) & (targets < base.shape[1])
    tokens = torch.where(there, targets.long(), 0)
    thresholds = _target_logits(base, delta, basis, tokens, group, precision)
    ranks = rank_statistics(base, delta, basis, tokens, group, thresholds, precision, backend)
    return torch.where(there, ranks, -1)


def _target_logits(
    base: Tensor, delta: Tensor, basis: Tensor, tokens: Tensor, group: Tensor, precision: Precision
) -> Tensor:
    """Logits of tokens[t] [P, T] in fp64, of the factors that `precision` multiplies."""

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
