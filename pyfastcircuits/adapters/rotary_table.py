"""The rotation that tables of cosines and sines hold, as a rate for each pair of dimensions."""

import torch
from torch import Tensor


def rates_of(cos: Tensor, sin: Tensor, pairs: str, where: str) -> tuple[Tensor, float]:
    """The radians a position that each pair turns, fp64 [n], and the factor of all entries.

    The angle at position 1 is the rate. Those at positions 2, 4, 8, ... are known up to whole turns, which the rate so
    far tells, and each of them halves the error that rounding has left.

    Args:
        cos, sin: [positions, 2 n].
        pairs: see CircuitWeights.rotary_pairs.
        where: the tables' name in messages.

    Raises:
        ValueError: no constant rates make these tables.
    """
    dtype, count = cos.dtype, cos.shape[1] // 2
    chosen = slice(None, None, 2) if pairs == "adjacent" else slice(0, count)
    cos, sin = cos[:, chosen].double(), sin[:, chosen].double()
    angles = torch.atan2(sin, cos)
    rates = angles[1] if len(angles) > 1 else torch.zeros_like(angles[0])
    place = 2
    while place < len(angles):
        turns = ((rates * place - angles[place]) / (2 * torch.pi)).round()
        rates = (angles[place] + turns * 2 * torch.pi) / place
        place *= 2
    scale = float(torch.hypot(cos[0], sin[0]).mean())
    whole = torch.arange(len(cos), dtype=torch.float64, device=cos.device)[:, None] * rates
    error = max(float((scale * whole.cos() - cos).abs().max()), float((scale * whole.sin() - sin).abs().max()))
    single = torch.finfo(torch.float32).eps  # angles are made in fp32, and TransformerLens' processing rounds to it
    if error > 4 * scale * (max(torch.finfo(dtype).eps, single) + len(cos) * single):
        raise ValueError(f"{where}: its table of rotary positions turns at no constant rates, which is not supported")
    return rates, scale
