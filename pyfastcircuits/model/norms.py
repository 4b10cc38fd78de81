"""Embeddings and norms, as the weights say."""

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights


def embedded(tokens: Tensor, weights: CircuitWeights, positions: Tensor) -> Tensor:
    """The residual stream [B, T, d] before layer 0: embeddings, and W_pos at `positions`, [T] or [B, T], if added."""
    stream = weights.W_E[tokens].to(weights.compute_dtype) * weights.embed_scale
    if weights.positional == "standard" and weights.W_pos is not None:
        stream = stream + weights.W_pos[positions].to(stream.dtype)
    return stream


def centered(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of a layernorm over the last dimension; other norms leave the stream as it is."""
    return stream - stream.mean(-1, keepdim=True) if weights.norm == "layernorm" else stream


def norm_scale(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """1/std (or 1/rms) of each position: [..., d] -> [...]; ones for a model without norms."""
    if weights.norm is None:
        return torch.ones_like(stream[..., 0])
    return (centered(stream, weights).square().mean(-1) + weights.eps).rsqrt()


def norm_stretch(stream: Tensor, gone: Tensor, weights: CircuitWeights) -> Tensor:
    """norm_scale(stream - gone) / norm_scale(stream), fp64 [...], whose difference from 1 has fp32 digits too.

    The mean square falls by mean(gone * (2 * stream - gone)), which is no difference of large numbers.
    """
    if weights.norm is None:
        return torch.ones_like((stream - gone)[..., 0], dtype=torch.float64)
    centre, less = centered(stream, weights), centered(gone, weights)
    power = centre.square().mean(-1).double() + weights.eps
    share = (less * (less - 2 * centre)).mean(-1).double() / power
    near = (-0.5 * share.clamp_min(-0.5).log1p()).exp()
    far = norm_scale(stream - gone, weights).double() * power.sqrt()
    return torch.where(share > -0.5, near, far)


def head_norm_scale(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """norm_scale of the norm before heads: ones where heads read the stream as it is."""
    return norm_scale(stream, weights) if weights.norm_before_heads else torch.ones_like(stream[..., 0])


def normalized(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """A residual stream [..., d] as heads read it: through their norm, before its gain and bias."""
    return centered(stream, weights) * head_norm_scale(stream, weights)[..., None]


def final_norm_gain(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of the final norm [..., d]: the stream is centred and multiplied by the gain, not by 1/std."""
    linear = centered(stream, weights)
    return linear if weights.ln_final_w is None else linear * weights.ln_final_w.to(linear.dtype)
