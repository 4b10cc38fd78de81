"""Queries and keys as the weights make them: projections with biases, norms of queries and keys, rotary positions."""

from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights


def queries_or_keys(
    weights: CircuitWeights,
    name: Literal["Q", "K"],
    layer: int,
    read: Tensor,
    positions: Tensor | None,
    *,
    head: int | None = None,
    biased: bool = True,
) -> Tensor:
    """The queries of a layer's heads, or the keys of its key/value heads, that read the normed stream [..., T, d].

    Args:
        weights: the model.
        name: "Q" for queries, "K" for keys.
        layer: which layer's.
        read: [..., T, d], as the layer's norm gives it, before the gain and bias of that norm.
        positions: [T], [1] for all alike, or [B, T]; None: nothing rotates.
        head: of this query head alone.
        biased: whether biases are added.

    Returns:
        [..., H or Hkv, T, r]; of one head [..., T, r].
    """
    if weights.qk_norm == "of a run":
        raise ValueError(
            "weights.qk_norm is 'of a run': queries and keys come through norms that the weights do not hold; qk_terms "
            "has the scores of a run"
        )
    count = (weights.W_Q if name == "Q" else weights.W_K).shape[1]
    own = None if head is None else head // (weights.n_heads // count)
    together = weights.qk_norm == "rmsnorm of all heads"
    if own is None or together:
        weight = weights.layer("W_Q" if name == "Q" else "W_K", layer)
    else:
        weight = weights.head("W_Q" if name == "Q" else "W_K", layer, head or 0)[None]
    made = finished(
        read.unsqueeze(-3) @ weight, weights, name, layer, positions,
        head=None if len(weight) == count else own, biased=biased,
    )  # fmt: skip
    if own is not None and together:
        made = made[..., own : own + 1, :, :]
    return made if own is None else made[..., 0, :, :]


def finished(
    made: Tensor,
    weights: CircuitWeights,
    name: Literal["Q", "K"],
    layer: int,
    positions: Tensor | None,
    *,
    head: int | None = None,
    biased: bool = True,
) -> Tensor:
    """Queries or keys [..., n, T, r] of all heads, or of one in its layer, from what W_Q or W_K alone makes.

    Their biases, norms and rotary positions follow; see queries_or_keys.
    """
    bias = weights.bias(name, layer) if biased else None
    if bias is not None:
        made = made + (bias if head is None else bias[head : head + 1])[:, None]
    if weights.qk_norm is not None:
        made = _normed(made, weights, name, layer, head)
    return rotate(made, weights, positions, layer) if positions is not None and weights.positional == "rotary" else made


def _normed(made: Tensor, weights: CircuitWeights, name: Literal["Q", "K"], layer: int, own: int | None) -> Tensor:
    """Queries or keys [..., n, T, r] of all heads, or of head `own`, through their norm."""
    if weights.qk_norm == "layernorm":
        made = made - made.mean(-1, keepdim=True)
    over = (-3, -1) if weights.qk_norm == "rmsnorm of all heads" else -1
    made = made * (made.square().mean(over, keepdim=True) + weights.qk_eps).rsqrt()
    gain, bias = (weights.ln_q_w, weights.ln_q_b) if name == "Q" else (weights.ln_k_w, weights.ln_k_b)
    for parameter, join in ((gain, torch.mul), (bias, torch.add)):
        if parameter is not None:
            of_heads = parameter[layer].to(made.dtype)
            if own is not None and len(of_heads) > 1:
                of_heads = of_heads[own : own + 1]
            made = join(made, of_heads[:, None])
    return made


def frequencies(weights: CircuitWeights, layer: int) -> Tensor:
    """The radians a position that each pair of rotary dimensions turns in a layer, fp64 [n]."""
    own = weights.rotary_frequencies
    if own is not None:
        return (own if own.dim() == 1 else own[layer]).double()
    width = weights.rotary_dim or weights.d_head
    steps = torch.arange(0, width, 2, device=weights.device, dtype=torch.float64)
    rates: Tensor = weights.rotary_base ** (-steps / width)
    return rates


def rotate(x: Tensor, weights: CircuitWeights, positions: Tensor, layer: int) -> Tensor:
    """Rotary positions ([T], [1] for all alike, or [B, T]) applied to queries or keys x [..., B, H, T, r]."""
    rates = frequencies(weights, layer)
    angles = positions.to(torch.float64)[..., None] * rates
    if positions.dim() > 1:
        angles = angles.unsqueeze(-3)  # for all heads
    cos, sin = ((weights.rotary_scale * f).to(x.dtype) for f in (angles.cos(), angles.sin()))
    turned, rest = x.split([2 * len(rates), x.shape[-1] - 2 * len(rates)], -1)
    if weights.rotary_pairs == "halves":
        first, second = turned.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pairs.flatten(-2), rest), -1)
