"""Losses of many ablations, each of which changes the clean logits by a low-rank term."""

from collections.abc import Mapping
from functools import partial, reduce
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend, room

shapes.register_outputs("sweep_nll", shapes.sweep_nll_outputs)
register_no_gradient("pyfastcircuits::sweep_nll", "sweep_nll")

FUSED_GROUPS = 8  # a task of the CPU kernel makes the bases of whole groups: with fewer, threads would go idle
SCRATCH = 22 << 20  # bytes of bases that are multiplied out at a time, and of the copies a product makes of factors
COLUMNS = 384  # of the vocabulary, at least, and in multiples: whole tiles of every kernel


class SweepPartial(NamedTuple):
    """The sums over one slice of the vocabulary, in fp64; `merged` joins slices."""

    lse: Tensor  # [P, T] logsumexp of the slice's logits
    picked: Tensor  # [P, T, K] logits of the tokens, 0 for those outside the slice
    change: Tensor  # [P, T] expected change of the logits under the clean run; [0, T] if not asked for

    def merged(self, other: "SweepPartial") -> "SweepPartial":
        """The sums over both slices together."""
        lse = torch.logaddexp(self.lse, other.lse)
        return SweepPartial(lse, self.picked + other.picked, self.change + other.change)


@public
def sweep_partial(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    *,
    group: Tensor,  # [P]
    scale: Tensor | None = None,  # [P, T]
    clean_lse: Tensor | None = None,  # [T]
    cap: float | None = None,
    outer: Tensor | None = None,  # [G, r, d] where basis is [1, d, V]
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> SweepPartial:
    """The sums of a sweep over one slice of the vocabulary: the raw op, whose results can be merged.

    The logits of ablation p are `scale[p, t] * (base[t] + delta[p, t] @ basis[group[p]])`, and where there is a `cap`
    they become cap * tanh(. / cap), the clean ones too. With `clean_lse`, the logsumexp of the clean logits over the
    whole vocabulary, the result's `change` is E[logits - clean logits] under the clean run's probabilities.

    With `outer` the bases are the products outer @ basis[0]: of heads, W_O[head] @ W_U. From FUSED_GROUPS groups on the
    CPU kernel makes them a stripe of the vocabulary at a time and stores none; else they are multiplied out in slices
    of the vocabulary, SCRATCH bytes at a time (more on a GPU). Shapes alone decide, so that no result depends on
    threads.
    """
    chosen = resolve_backend(backend, base.device)
    shapes.check_positive("cap", cap)
    if outer is not None and not (chosen == "cpu" and len(outer) >= FUSED_GROUPS):
        bytes_a_column = base.element_size() * (outer[..., 0].numel() + 2 * len(basis[0]))
        width = max(COLUMNS, room(base.device, SCRATCH) // max(bytes_a_column, 1) // COLUMNS * COLUMNS)
        slices = (slice(first, first + width) for first in range(0, max(base.shape[1], 1), width))
        of_slice = partial(
            sweep_partial, group=group, scale=scale, clean_lse=clean_lse, cap=cap, precision=precision, backend=backend
        )
        rows = outer.flatten(0, 1)
        parts = (
            of_slice(base[:, c], delta, (rows @ basis[0][:, c]).unflatten(0, outer.shape[:2]), tokens - c.start)
            for c in slices
        )
        return reduce(SweepPartial.merged, parts)
    if chosen == "reference":
        return SweepPartial(*reference.sweep_nll(base, delta, basis, tokens, group, scale, clean_lse, cap))
    arguments = base, delta, basis, tokens, group, scale, clean_lse, precision, cap
    return SweepPartial(*kernel_of("sweep_nll", chosen)(*arguments, *([] if outer is None else [outer])))


@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: Literal[False] = False,
    logit_difference: None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]: ...
@public
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Next-token losses of P ablations that each change the clean logits by a low-rank term; no logit is stored.

    The logits of ablation p at position t are `base[t] + delta[p, t] @ basis[group[p]]` (an ablation passes minus what
    its path writes), times `scale[p, t]` if given (a recomputed final norm). Deterministic: results do not depend on
    threads or on how the work is cut. Not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [P, T, r], r >= 0.
        basis: [G, r, V].
        targets: [T] integer tokens.
        group: [P] integers below G, which basis each ablation writes through; None where G is 1.
        scale: [P, T], positive.
        cap: logits x, scaled ones too, become cap * tanh(x / cap) (a soft cap); `base` is given without it.
        kl: also return KL(clean || ablated) [P, T] in nats.
        logit_difference: two [T] tensors of tokens; also return logit(first) - logit(second) [P, T].
        precision: "ieee", "tf32" or "bf16"; see the module. "bf16" rounds each product's factors to 2^-8 relative.
        backend: see the module.

    Returns:
        nll [P, T] in nats, in base's dtype (fp32 for bfloat16); with `kl` or `logit_difference`, a tuple of nll and
        what was asked for, in that order.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values; a cap that is not
            positive.
        IndexError: a token outside [0, V) or a group outside [0, G). CUDA tensors are not read to check this.
        RuntimeError: a backend or precision that is not there.

    Source: the loss of "term importance" ablations in "A Mathematical Framework for Transformer Circuits"
    (Elhage et al. 2021), section "Two-Layer Attention-Only Transformers", computed from the path's rank-r term.
    """
    chosen = {"targets": targets}
    chosen |= {f"logit_difference[{i}]": tokens for i, tokens in enumerate(logit_difference or ())}
    group, tokens = checked_sweep(base, delta, basis, group, chosen, scale)
    clean_lse = clean_logsumexp(base, cap, precision, backend) if kl else None
    lse, picked, change = sweep_partial(
        base, delta, basis, tokens,
        group=group, scale=scale, clean_lse=clean_lse, cap=cap, precision=precision, backend=backend,
    )  # fmt: skip
    out = [lse - picked[..., 0]]
    if clean_lse is not None:
        out.append(lse - clean_lse - change)
    if logit_difference is not None:
        out.append(picked[..., 1] - picked[..., 2])
    results = tuple(x.to(shapes.work_dtype(base)) for x in out)
    return results[0] if len(results) == 1 else results


def clean_logsumexp(base: Tensor, cap: float | None, precision: Precision, backend: Backend) -> Tensor:
    """Logsumexp [T] of the clean logits, in fp64: of an ablation that changes nothing."""
    delta, basis = base.new_empty(1, len(base), 0), base.new_empty(1, 0, base.shape[1])
    group = torch.zeros(1, dtype=torch.long, device=base.device)
    tokens = group.new_empty(len(base), 0)
    return sweep_partial(base, delta, basis, tokens, group=group, cap=cap, precision=precision, backend=backend).lse[0]


def checked_sweep(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    group: Tensor | None,
    targets: Mapping[str, Tensor],  # [T] each
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The basis that each ablation writes through [P], and the tokens [T, K], int64; wrong inputs of a sweep raise."""
    tokens_of: dict[str, shapes.Argument] = {name: (tokens, "T", int) for name, tokens in targets.items()}
    shapes.check_sweep(base, delta, basis, group, scale=(scale, "P T", float), **tokens_of)
    shapes.check_positive_entries("scale", scale)
    if base.shape[1] == 0:
        raise ValueError(f"base has shape {list(base.shape)}: an empty vocabulary")
    if group is None:
        if len(basis) != 1:
            raise ValueError(f"basis holds {len(basis)} groups, but group is None; say which each ablation uses")
        group = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    tokens = list(targets.values())
    if base.device.type == "cpu":
        tokens = [shapes.in_range(name, t, base.shape[1]) for name, t in zip(targets, tokens, strict=True)]
        group = shapes.in_range("group", group, len(basis))
    return group.long(), torch.stack([t.long() for t in tokens], -1)
