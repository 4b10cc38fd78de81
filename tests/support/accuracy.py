"""The one rule of accuracy: at most twice the error of torch at the same dtype, both against fp64."""

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor, tiny: float = 1e-12) -> None:
    """Fail unless max|ours - exact| <= 2 max|theirs - exact| + tiny, with the worst element of all three.

    Infinities and NaN of `exact` must be met exactly. Where torch itself leaves a number that `exact` has, its error
    there says nothing and is not counted.
    """
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, expected {list(exact.shape)}"
    ours, theirs, exact = (x.detach().double().cpu().reshape(-1) for x in (ours, theirs, exact))
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    finite = exact.isfinite()
    wrong = ~same & ~finite
    assert not wrong.any(), _element("not the same", int(wrong.nonzero()[0]), ours, theirs, exact)
    error = torch.where(same, 0.0, (ours - exact).abs()).nan_to_num(torch.inf, torch.inf)
    allowed = torch.where(finite, (theirs - exact).abs(), 0.0).nan_to_num(0.0, 0.0)
    if error.numel() and error.max() > 2 * allowed.max() + tiny:
        worst = int(error.argmax())
        limit = f"error {error.max():.3g}, allowed 2 * {allowed.max():.3g} + {tiny:.3g}"
        raise AssertionError(_element(limit, worst, ours, theirs, exact))


def _element(what: str, i: int, ours: Tensor, theirs: Tensor, exact: Tensor) -> str:
    return f"{what}: element {i} is {ours[i]:.17g}, torch's {theirs[i]:.17g}, exact {exact[i]:.17g}"
