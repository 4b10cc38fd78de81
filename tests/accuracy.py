"""How results are accepted: at most twice torch's own error at the same dtype, both against fp64."""

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor, tiny: float | None = None) -> None:
    """Non-finite values must agree with the exact ones; the others lie within 2 * max |theirs - exact| + tiny.

    `tiny` defaults to four roundings of the largest exact value in our dtype: torch may be exact by luck.
    """
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, expected {list(exact.shape)}"
    eps = torch.finfo(ours.dtype).eps
    ours, theirs, exact = (x.detach().double().cpu() for x in (ours, theirs, exact))
    finite = exact.isfinite()
    odd = ~finite
    same = (ours[odd] == exact[odd]) | (ours[odd].isnan() & exact[odd].isnan())
    assert same.all(), f"non-finite values differ: ours {ours[odd]}, exact {exact[odd]}"
    if not finite.any():
        return
    error = (ours - exact).abs()[finite]
    allowed = (theirs - exact).abs()[finite].nan_to_num(0.0).max()
    if tiny is None:
        tiny = 4 * eps * float(exact[finite].abs().max())
    worst = int(error.argmax())
    assert error[worst] <= 2 * allowed + tiny, (
        f"worst element {worst}: ours {ours[finite][worst]:.9g}, torch {theirs[finite][worst]:.9g}, "
        f"exact {exact[finite][worst]:.9g}; error {error[worst]:.3g}, allowed {2 * allowed + tiny:.3g}"
    )
