"""The one rule of accuracy: at most twice the error of torch at the same dtype, row by row, both against fp64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_as_accurate(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    tiny: float = 1e-12,
    rows: Sequence[int] | None = None,
    through: Tensor | None = None,
) -> None:
    """Fail unless |ours - exact| <= 2 max|theirs - exact| + tiny in every row, with the worst element of all three.

    `rows` names the axes that tell rows apart; the maximum is over all others. A row is what is summed or normalised
    together: one row of logits or of a product, so that a huge one excuses no other. By default it is the last axis. Of
    a sweep's results [P, T] each entry is a row of logits of its own, and torch's error in one number may be zero by
    chance: those of one position, which share their base logits, are taken together (`rows=[1]`).

    `tiny` is for rows of values near 1. Where a row's largest value is larger, so are the roundings that no algorithm
    avoids, and torch may have been lucky in a short row: two units in the last place, in the dtype of `theirs`, of the
    row's largest value are allowed at least. `through` holds values that were rounded on the way to each result (the
    logits behind a mean, the scores behind an output), where they are larger than the results: it has the shape of
    `exact`, or one that expands to it. Whatever it allows, no row may be more wrong than twice torch's worst, and `tiny`.

    Infinities and NaN of `exact` must be met exactly. Where torch itself leaves a number that `exact` has, its error
    there says nothing and is not counted.
    """
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, expected {list(exact.shape)}"
    unit = torch.finfo(theirs.dtype).eps
    through = exact if through is None else through.expand_as(exact)
    ours, theirs, exact, through = (_by_row(x.detach().double().cpu(), rows) for x in (ours, theirs, exact, through))
    if not exact.numel():
        return
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    finite = exact.isfinite()
    wrong = ~same & ~finite
    if wrong.any():
        raise AssertionError(_element("not the same", wrong.flatten().int().argmax(), ours, theirs, exact))
    error = torch.where(same, 0.0, (ours - exact).abs()).nan_to_num(torch.inf, torch.inf)
    torchs = torch.where(finite, (theirs - exact).abs(), 0.0).nan_to_num(0.0, 0.0).amax(1, keepdim=True)
    size = torch.cat((exact, through), 1).abs().nan_to_num(0.0, 0.0).amax(1, keepdim=True)
    allowed = torch.minimum(2 * torchs + (2 * unit * size).clamp_min(tiny), 2 * torchs.max() + tiny)
    if (error > allowed).any():
        worst = (error / allowed).argmax()
        row = int(worst) // exact.shape[1]
        limit = f"error {error.flatten()[worst]:.3g}, allowed {allowed[row, 0]:.3g}, twice torch's {torchs[row, 0]:.3g}"
        raise AssertionError(_element(f"{limit} and tiny", worst, ours, theirs, exact))


def _by_row(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """As a matrix whose rows are told apart by the axes named."""
    kept = list(range(x.dim() - 1)) if rows is None else [i % x.dim() for i in rows]
    others = [i for i in range(x.dim()) if i not in kept]
    count = torch.Size([x.shape[i] for i in kept]).numel()
    return x.permute(kept + others).reshape(count, -1 if x.numel() else 0)


def _element(what: str, at: Tensor, *of: Tensor) -> str:
    place = divmod(int(at), of[0].shape[1])
    ours, theirs, exact = (float(x[place]) for x in of)
    return f"{what}: element {place[1]} of row {place[0]} is {ours:.17g}, torch's {theirs:.17g}, exact {exact:.17g}"
