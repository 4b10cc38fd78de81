"""Losses of many ablations that each change the clean logits by a low-rank term."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import (
    DTYPES,
    Backend,
    Precision,
    check_cap,
    check_precision,
    check_range,
    resolve_backend,
)


def sweep_statistics(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None = None,  # [P, T]
    clean_lse: Tensor | None = None,  # [T]
    precision: Precision = "ieee",
    backend: Backend = "auto",
    cap: float | None = None,
    outer: Tensor | None = None,  # [G, r, d] where basis is [1, d, V]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a slice of the vocabulary adds to a sweep: the raw op, whose results of several slices can be merged.

    Logits are `scale[p, t] * (base[t] + delta[p, t] @ basis[group[p]])`, and where there is a `cap` then cap * tanh(. /
    cap), the clean ones too. Returns, in fp64, their logsumexp [P, T]; the
    logits of `tokens` [P, T, K], 0 for a token outside the slice; and, with `clean_lse` (logsumexp of the clean logits
    over the whole vocabulary), E[logits - clean logits] under the clean run's probabilities [P, T], else [0, T].

    With `outer` the bases are outer @ basis[0]; the CPU kernel makes them a stripe of the vocabulary at a time and
    stores none.
    """
    chosen = resolve_backend(backend, base.device)
    if outer is not None and chosen != "cpu":
        basis, outer = (outer.flatten(0, 1) @ basis[0]).unflatten(0, outer.shape[:2]), None
    check_precision(precision)
    check_cap(cap)
    if chosen == "reference":
        return reference.sweep_nll(base, delta, basis, tokens, group, scale, clean_lse, cap)
    arguments = base, delta, basis, tokens, group, scale, clean_lse, precision, cap
    if chosen == "triton":
        from pyfastcircuits.kernels.sweep_nll import sweep_nll_triton

        lse, picked, change = sweep_nll_triton(*arguments)
    else:
        lse, picked, change = torch.ops.pyfastcircuits.sweep_nll(*arguments, outer)
    return lse, picked, change


@torch.library.register_fake("pyfastcircuits::sweep_nll")  # type: ignore[untyped-decorator]
def sweep_nll_fake(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    tokens: Tensor,
    group: Tensor,
    scale: Tensor | None,
    clean_lse: Tensor | None,
    precision: str,
    cap: float | None = None,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes alone, for torch.compile."""
    pairs, positions, _ = delta.shape
    shapes = ((pairs, positions), (pairs, positions, tokens.shape[1]), (0 if clean_lse is None else pairs, positions))
    lse, picked, change = (base.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return lse, picked, change


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
    group = checked_group(group, delta, basis)
    chosen = [("targets", targets), *_named_pair(logit_difference)]
    check_sweep(base, delta, basis, group, scale, chosen)
    tokens = torch.stack([t.long() for _, t in chosen], -1)
    clean_lse = clean_logsumexp(base, precision, backend, cap) if kl else None
    lse, picked, change = sweep_statistics(base, delta, basis, tokens, group, scale, clean_lse, precision, backend, cap)
    out = [lse - picked[..., 0]]
    if clean_lse is not None:
        out.append(lse - clean_lse - change)
    if logit_difference is not None:
        out.append(picked[..., 1] - picked[..., 2])
    dtype = torch.float32 if base.dtype == torch.bfloat16 else base.dtype
    results = tuple(x.to(dtype) for x in out)
    return results[0] if len(results) == 1 else results


def clean_logsumexp(base: Tensor, precision: Precision, backend: Backend, cap: float | None) -> Tensor:
    """Logsumexp [T] of the clean logits, in fp64: of an ablation that changes nothing."""
    nothing = (base.new_empty(1, len(base), 0), base.new_empty(1, 0, base.shape[1]))
    zero = torch.zeros(1, dtype=torch.long, device=base.device)
    no_tokens = zero.new_empty(len(base), 0)
    return sweep_statistics(base, *nothing, no_tokens, zero, None, None, precision, backend, cap)[0][0]


def _named_pair(pair: tuple[Tensor, Tensor] | None) -> list[tuple[str, Tensor]]:
    return [] if pair is None else [(f"logit_difference[{i}]", tokens) for i, tokens in enumerate(pair)]


def checked_group(group: Tensor | None, delta: Tensor, basis: Tensor) -> Tensor:
    """Which basis each ablation writes through, as int64 [P]; what is wrong with it, delta's or basis' rank raises."""
    for name, tensor, shape in (("delta", delta, "[P, T, r]"), ("basis", basis, "[G, r, V]")):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if group is None:
        if len(basis) != 1:
            raise ValueError(f"basis holds {len(basis)} groups, but group is None; say which each ablation uses")
        return torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    if group.is_floating_point() or group.dtype == torch.bool:
        raise TypeError(f"group has dtype {group.dtype}, expected integers")
    return group.long()


def check_sweep(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    group: Tensor,
    scale: Tensor | None,
    tokens: list[tuple[str, Tensor]],
) -> None:
    """Raise what is wrong with the inputs of a sweep, named with both values; tokens by their names."""
    if base.dim() != 2:
        raise ValueError(f"base has shape {list(base.shape)}, expected [T, V]")
    positions, vocabulary = base.shape
    pairs, _, rank = delta.shape
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("delta", delta, (pairs, positions, rank)),
        ("basis", basis, (len(basis), rank, vocabulary)),
        ("group", group, (pairs,)),
    ]
    expected += [(name, t, (positions,)) for name, t in tokens]
    if scale is not None:
        expected.append(("scale", scale, (pairs, positions)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} "
                f"(base is {list(base.shape)}, delta {list(delta.shape)})"
            )
        if tensor.device != base.device:
            raise ValueError(f"{name} is on {tensor.device}, but base is on {base.device}")
    if base.dtype not in DTYPES:
        raise TypeError(f"base has dtype {base.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("delta", delta), ("basis", basis)):
        if tensor.dtype != base.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but base has {base.dtype}")
    if vocabulary == 0:
        raise ValueError(f"base has shape {list(base.shape)}: an empty vocabulary")
    for name, tensor in tokens:
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    if base.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, tensor in tokens:
            check_range(name, tensor, vocabulary)
        check_range("group", group, len(basis))
