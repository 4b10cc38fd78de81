"""Losses of pairs of ablations at once, each of which changes the clean logits by a low-rank term."""

from typing import Literal, overload

from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend
from pyfastcircuits.ops.logits_lse import clean_logsumexp
from pyfastcircuits.ops.sweep_nll import SweepPartial, centered, checked_sweep, clean_logits

shapes.register_outputs("joint_nll", shapes.joint_nll_outputs)
register_no_gradient("pyfastcircuits::joint_nll", "joint_nll")


@public
def joint_partial(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor,  # [T]
    *,
    group: Tensor,  # [S]
    cap: float | None = None,
    mean: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> SweepPartial:
    """The sums of a sweep of pairs over one slice of the vocabulary, as `sweep_partial` gives them for singles.

    The logits of pair p are `base[t] + C[pairs[p, 0], t] + C[pairs[p, 1], t]` with `C[i] = delta[i] @ basis[group[i]]`.
    """
    chosen = resolve_backend(backend, base.device, "joint_nll")
    shapes.check_positive("cap", cap)
    if chosen == "reference":
        return SweepPartial(*reference.joint_nll(base, delta, basis, tokens, group, pairs, clean_lse, mean, cap))
    kernel = kernel_of("joint_nll", chosen)
    return SweepPartial(*kernel(base, delta, basis, tokens, group, pairs, clean_lse, mean, precision, cap))


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
    effect: bool = False,
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
    effect: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
@public
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
    effect: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Next-token losses of P pairs of ablations, both at once, whose changes of the logits add; no logit is stored.

    The logits of pair p at position t are `base[t] + C[i, t] + C[j, t]`, where i, j = pairs[p] and `C[i] = delta[i] @
    basis[group[i]]` (an ablation passes minus what it removes): the two are independent, as heads of one layer are with
    frozen norms. Each C is made once, however many pairs it is in: a pair costs an addition and a polynomial for each
    logit. The change of the loss is measured itself, as in `sweep_nll`. Deterministic: results do not depend on threads
    or on how the work is cut. Not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [S, T, r], r >= 0: the single ablations.
        basis: [G, r, V].
        targets: [T] integer tokens.
        pairs: [P, 2] integers below S; in any order.
        group: [S] integers below G, which basis each ablation writes through; None where G is 1.
        cap: logits x become cap * tanh(x / cap) (a soft cap); `base` is given without it.
        kl: also return KL(clean || ablated) [P, T] in nats.
        effect: return the rise of the loss over the clean run's, instead of the loss, which rounds it away.
        precision: "ieee", "tf32x3", "tf32" or "bf16", which rounds products' factors to 2^-8 relative; see the module.
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
    group, tokens = checked_sweep(base, delta, basis, group, {"targets": targets})
    shapes.check_shapes(base=(base, "T V"), pairs=(pairs, "P 2", int))
    if base.device.type == "cpu":
        pairs = shapes.in_range("pairs", pairs, len(delta))
    resolve_backend(backend, base.device, "joint_nll")  # an error names this op, not the one that it calls first
    clean_lse = clean_logsumexp(base, cap=cap, backend=backend)
    sums = joint_partial(
        base, delta, centered(basis, cap), tokens, pairs.long(), clean_lse,
        group=group, cap=cap, mean=kl, precision=precision, backend=backend,
    )  # fmt: skip
    nll = sums.nll if effect else clean_lse - clean_logits(base, tokens, cap)[:, 0] + sums.nll
    nll = nll.to(shapes.work_dtype(base))
    return (nll, sums.divergence.to(nll.dtype)) if kl else nll
