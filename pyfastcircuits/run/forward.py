"""A model's layers after its clean run, to be run again from any of them with something changed.

A plain rerun with hooks runs the whole model for each experiment. Layers in front of the change do the same again, so
experiments start from the clean run's residual stream there, many at a time: the N below.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.patterns import softmax_pattern

__all__ = ["Rerun", "WeightsRerun", "centered", "norm_scale", "rotate", "toward_logits"]


class Rerun(Protocol):
    """What it takes to run parts of a model again. Tensors are in the weights' computing dtype; all is differentiable.

    Adapters implement it by the model's own modules, so that what a family does in a way of its own stays its own.
    `normed` is what FrozenTrace.normed gives: centred and divided by the norm's std, before the norm's gain and bias,
    which are for `project` to apply.
    """

    def project(self, layer: int, normed: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, B, H, T, r], keys and values [N, B, Hkv, T, r] of a layer that reads `normed` [N, B, T, d].

        As the layer's scores and mixtures are made of them: with biases, after positions, after norms of queries and
        keys. With `frozen`, such norms multiply by what they multiplied by in the clean run: then all three are affine
        in `normed`.
        """
        ...

    def scale(self, layer: int) -> float:
        """Attention scores, before any cap and mask, are scale * queries @ keys.T."""
        ...

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values under the patterns that queries and keys make, capped and masked as the model does: [N, B, H, T, r].

        The first dimensions of q, k and v are N or 1.
        """
        ...

    def after(self, layer: int, stream: Tensor, change: Tensor | None = None) -> Tensor:
        """The residual stream after a layer that reads `stream` [N, B, T, d]: heads, MLP and norms computed anew.

        `change` [N, B, T, d] is added to what the layer's heads write (before a norm after them), as if a hook did.
        """
        ...

    def part(self, sequences: slice | Tensor) -> "Rerun":
        """Of some of the sequences."""
        ...


@dataclass(frozen=True, eq=False)
class WeightsRerun:
    """Rerun of a model that is its CircuitWeights (`attention_only`)."""

    weights: CircuitWeights
    mask: Tensor | None  # [B, T]

    def project(self, layer: int, normed: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See Rerun."""
        v = normed.unsqueeze(-3) @ self.weights.layer("W_V", layer)
        return *self.queries_and_keys(layer, normed), _biased(v, self.weights.bias("V", layer))

    def queries_and_keys(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The first two of `project`."""
        weights, length = self.weights, normed.shape[-2]
        if weights.positional == "shortformer" and weights.W_pos is not None:
            normed = normed + weights.W_pos[:length].to(normed.dtype)
        q = _biased(normed.unsqueeze(-3) @ weights.layer("W_Q", layer), weights.bias("Q", layer))
        k = _biased(normed.unsqueeze(-3) @ weights.layer("W_K", layer), weights.bias("K", layer))
        if weights.positional == "rotary":
            places = torch.arange(length, device=normed.device)
            q, k = rotate(q, weights, places), rotate(k, weights, places)
        return q, k

    def scale(self, layer: int) -> float:
        """See Rerun."""
        return 1 / (self.weights.attention_scale or self.weights.d_head**0.5)

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Rerun."""
        pattern = softmax_pattern(q, k, self.scale(layer), self.mask)
        return pattern @ v.repeat_interleave(self.weights.n_heads // v.shape[-3], -3)

    def after(self, layer: int, stream: Tensor, change: Tensor | None = None) -> Tensor:
        """See Rerun."""
        normed = centered(stream, self.weights) * norm_scale(stream, self.weights)[..., None]
        z = self.mix(layer, *self.project(layer, normed))
        written = z.transpose(-3, -2).flatten(-2) @ self.weights.heads("W_O", layer).flatten(0, 1)
        if self.weights.b_O is not None:
            written = written + self.weights.b_O[layer].to(written.dtype)
        return stream + (written if change is None else written + change)

    def part(self, sequences: slice | Tensor) -> "WeightsRerun":
        """See Rerun."""
        return replace(self, mask=None if self.mask is None else self.mask[sequences])


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias[:, None]


def centered(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of a layernorm over the last dimension; the stream itself for other norms."""
    return stream - stream.mean(-1, keepdim=True) if weights.norm == "layernorm" else stream


def norm_scale(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """1/std (or 1/rms) of each position: [..., d] -> [...]."""
    if weights.norm is None:
        return torch.ones_like(stream[..., 0])
    return (centered(stream, weights).square().mean(-1) + weights.eps).rsqrt()


def toward_logits(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of the final norm, without its scale: centred, times what the norm multiplies by."""
    linear = centered(stream, weights)
    return linear if weights.ln_final_w is None else linear * weights.ln_final_w.to(linear.dtype)


def rotate(x: Tensor, weights: CircuitWeights, positions: Tensor) -> Tensor:
    """Rotary positions ([T], or [1] for all alike) of x [..., T, r]: dimension i of the first half turns with dimension
    i of the second.
    """
    width = weights.rotary_dim or weights.d_head
    rates = weights.rotary_base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)
    angles = torch.outer(positions.to(torch.float64), rates)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
