"""Logsumexps of rows of logits that a low-rank product makes or changes, none of which is stored."""

import torch
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend

shapes.register_outputs("logits_lse", shapes.logits_lse_outputs)
register_no_gradient("pyfastcircuits::logits_lse", "logits_lse")


@public
def logits_lse(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    *,
    group: Tensor,
    cap: float | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor:
    """The logsumexp of `base[t] + delta[p, t] @ basis[group[p]]` for all p and t: the raw op. Not differentiable.

    Args:
        base: [T, V] logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [P, T, r], r >= 0.
        basis: [G, r, V].
        group: [P] integers below G.
        cap: logits x become cap * tanh(x / cap) (a soft cap).
        precision: "ieee", "tf32x3", "tf32" or "bf16"; see the module.
        backend: see the module; no "cuda".

    Returns:
        [P, T] in nats, fp64, whose error is that of a few roundings of the largest logit. Slices of the vocabulary
        are merged by torch.logaddexp.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values; a cap that is not
            positive.
        RuntimeError: a group outside [0, G) (CUDA tensors are not read to check this); a backend or precision that is
            not there.

    Source: the normaliser of the softmax that turns logits into predictions.
    """
    shapes.check_positive("cap", cap)
    chosen = resolve_backend(backend, base.device, "logits_lse")
    if chosen == "reference":
        return reference.logits_lse(base, delta, basis, group, cap)
    lse: Tensor = kernel_of("logits_lse", chosen)(base, delta, basis, group, precision, cap)
    return lse


def clean_logsumexp(base: Tensor, *, cap: float | None = None, backend: Backend = "auto") -> Tensor:
    """The logsumexp [T] of the clean logits [T, V], fp64: of an ablation that changes nothing."""
    delta, basis = base.new_empty(1, len(base), 0), base.new_empty(1, 0, base.shape[1])
    group = torch.zeros(1, dtype=torch.long, device=base.device)
    return logits_lse(base, delta, basis, group=group, cap=cap, backend=backend)[0]
