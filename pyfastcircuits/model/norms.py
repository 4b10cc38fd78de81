"""Embeddings, norms and rotary positions, as the weights say: the parts of a model that are no matrix product."""

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights


def embedded(tokens: Tensor, weights: CircuitWeights) -> Tensor:
    """The residual stream [B, T, d] before layer 0: embeddings, and positions where those are added to it."""
    stream = weights.W_E[tokens].to(weights.compute_dtype) * weights.embed_scale
    if weights.positional == "standard" and weights.W_pos is not None:
        stream = stream + weights.W_pos[: tokens.shape[1]].to(stream.dtype)
    return stream


def centered(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of a layernorm over the last dimension; other norms leave the stream as it is."""
    return stream - stream.mean(-1, keepdim=True) if weights.norm == "layernorm" else stream


def norm_scale(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """1/std (or 1/rms) of each position: [..., d] -> [...]; ones for a model without norms."""
    if weights.norm is None:
        return torch.ones_like(stream[..., 0])
    return (centered(stream, weights).square().mean(-1) + weights.eps).rsqrt()


def normalized(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """A residual stream [..., d] through a norm, before the gain and the bias of the norm."""
    return centered(stream, weights) * norm_scale(stream, weights)[..., None]


def final_norm_gain(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of the final norm [..., d]: the stream is centred and multiplied by the gain, not by 1/std."""
    linear = centered(stream, weights)
    return linear if weights.ln_final_w is None else linear * weights.ln_final_w.to(linear.dtype)


def rotate(x: Tensor, weights: CircuitWeights, positions: Tensor) -> Tensor:
    """Rotary positions ([T], or [1] for all alike) applied to queries or keys x [..., T, r].

    Dimension i of the first half of the rotary dimensions turns with dimension i of the second half.
    """
    width = weights.rotary_dim or weights.d_head
    rates = weights.rotary_base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)
    angles = torch.outer(positions.to(torch.float64), rates)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
