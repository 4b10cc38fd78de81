"""The rule of accuracy of effects: an error in proportion to what an ablation changes, however little that is."""

from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.ops import SweepPartial, reference

TINY = 1e-10  # nats


def assert_effects_within(
    ours: tuple[Tensor, ...],  # gain, log_total, picked, mean of the whole vocabulary
    case: Any,  # Sweep or Joint of support.sweep_cases
    cap: float | None = None,
    relative: float = 2e-6,
    tiny: float = TINY,
) -> None:
    """Fail unless every single effect is within relative * size + tiny of that of the reference, in fp64.

    The rise of a token's loss has size E|change| + |change of the token|, KL(clean || changed) and the rise of the
    logsumexp E|change|, the expectation under the clean run. What is not finite must be met exactly.
    """
    form = reference.joint_nll if "pairs" in case._fields else reference.sweep_nll
    truth = SweepPartial(*form(*case._replace(mean=True), cap))
    every = torch.arange(case.base.shape[1], device=case.base.device).expand_as(case.base)
    changes = form(*case._replace(tokens=every), cap)[2]
    log_p = _capped(case.base.double(), cap) - case.clean_lse.double()[:, None]
    weighed = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * changes.abs())
    size = weighed.sum(-1)
    partial = SweepPartial(*ours)
    for k in range(case.tokens.shape[1]):
        of_token = size + truth.picked[..., k].abs()
        right, mine = (x.rise - x.picked[..., k] for x in (truth, partial))
        _assert_within(f"effect on token {k}", mine, right, relative * of_token + tiny)
    _assert_within("rise", partial.rise, truth.rise, relative * size + tiny)
    if case.mean:
        _assert_within("KL", partial.divergence, truth.divergence, relative * size + tiny)


def assert_ranked_as(found: Tensor, exact: Tensor) -> None:
    """Fail unless two of the effects stand in the order of the exact ones where these differ by 1e-4 of the larger."""
    apart = exact[:, None] - exact
    clear = apart.abs() > 1e-4 * torch.maximum(exact[:, None].abs(), exact.abs())
    wrong = clear & ((found[:, None] - found).sign() != apart.sign())
    assert not wrong.any(), f"{int(wrong.sum()) // 2} of {int(clear.sum()) // 2} pairs of effects change places"


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def _assert_within(what: str, ours: Tensor, right: Tensor, allowed: Tensor) -> None:
    """Element by element, with the worst of them in the error."""
    assert ours.shape == right.shape, f"{what}: shape {list(ours.shape)}, expected {list(right.shape)}"
    if not ours.numel():
        return
    same = (ours == right) | (ours.isnan() & right.isnan())
    error = torch.where(same, 0.0, (ours - right).abs())
    ratio = (error / allowed).nan_to_num(torch.inf, torch.inf)
    ratio = torch.where(same, 0.0, ratio)
    if ratio.max() > 1:
        place = divmod(int(ratio.argmax()), ours.shape[1])
        x, y, limit = (float(z[place]) for z in (ours, right, allowed))
        raise AssertionError(
            f"{what} of row {place} is {x:.17g}, exact {y:.17g}: {abs(x - y):.3g}, allowed {limit:.3g}"
        )
