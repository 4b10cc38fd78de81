"""A model's layers, to be run again from any of them with something changed.

A plain rerun with hooks runs the whole model for each experiment. The layers in front of the change do the same work
again and again, so here N experiments start together from the clean run's residual stream at the layer they change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from pyfastcircuits.model.norms import norm_scale, normalized
from pyfastcircuits.model.queries import queries_or_keys
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.patterns import softmax_pattern

MLPReads = Literal["before heads", "after heads"]


class Forward(Protocol):
    """The parts of a forward pass that experiments run again, in the weights' computing dtype, all differentiable.

    A layer that reads `stream` gives `layer_after`: what its heads write, and then its MLP, composed.

    Adapters implement it by the model's own modules, so that a family's peculiarities stay the family's own. A `normed`
    stream is the one that FrozenTrace.normed returns: centred and divided by the norm's std; the norm's gain and bias
    are for `qkv` to apply.
    """

    def qkv(self, layer: int, normed: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, B, H, T, r], keys and values [N, B, Hkv, T, r] of a layer that reads `normed` [N, B, T, d].

        They have biases, positions and norms of queries and keys in them, as the layer's scores do. With `frozen`,
        norms of queries and keys keep the scales of the clean run, and all three are affine in `normed`.
        """
        ...

    @property
    def places_alike(self) -> bool:
        """Whether `qkv` takes a stream of fewer positions, because it makes the same of a row at any position."""
        ...

    def score_scale(self, layer: int) -> float:
        """The factor of the attention scores: score_scale * queries @ keys.T, before any cap and mask."""
        ...

    def apply(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z [N, B, H, T, r]: values under the patterns that queries and keys make, capped and masked as the model does.

        The first dimension of q, k and v is N or 1.
        """
        ...

    def write(self, layer: int, z: Tensor, added: Tensor | None = None) -> Tensor:
        """What a layer's heads add to the residual stream [N, B, T, d] where they have mixed z [N or 1, B, H, T, r].

        The bias after W_O is in it, and `added` as in `block`; a norm after the heads has the scale of what it reads.
        """
        ...

    def mlp_reads(self, layer: int) -> MLPReads | None:
        """The stream that a layer's MLP reads: the one that heads read (parallel blocks), or the one with their write.

        None: the layer has no MLP.
        """
        ...

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What a layer's MLP adds to the residual stream [N, B, T, d], norms around it included, if it reads `stream`.

        Zeros where there is none.
        """
        ...

    def block(self, layer: int, stream: Tensor, added: Tensor | None = None) -> Tensor:
        """The residual stream [N, B, T, d] after a layer that reads `stream`: heads, MLP and norms computed anew.

        `added` [N, B, T, d] joins what the layer's heads write, before a norm after them, as if a hook added it.
        """
        ...

    def select(self, sequences: slice | Tensor) -> "Forward":
        """The same layers for some of the sequences."""
        ...

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Name and tensor of every parameter and buffer that the layers have besides the CircuitWeights."""
        ...

    def options(self) -> Mapping[str, object]:
        """The configuration of the layers: two models with equal tensors and options compute the same."""
        ...


@dataclass(frozen=True, eq=False)
class WeightsForward:
    """The Forward of a model that is nothing but its CircuitWeights (`attention_only`)."""

    weights: CircuitWeights
    mask: Tensor | None  # [B, T]
    positions: Tensor  # [T] or [B, T]

    def qkv(self, layer: int, normed: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See Forward."""
        v, bias = normed.unsqueeze(-3) @ self.weights.layer("W_V", layer), self.weights.bias("V", layer)
        return *self.queries_and_keys(layer, normed), v if bias is None else v + bias[:, None]

    @property
    def places_alike(self) -> bool:
        """See Forward."""
        return self.weights.positional in ("none", "standard")

    def queries_and_keys(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The first two of `qkv`."""
        weights, read = self.weights, normed
        if weights.positional == "shortformer" and weights.W_pos is not None:
            read = read + weights.W_pos[self.positions].to(read.dtype)
        q = queries_or_keys(weights, "Q", layer, read, self.positions)
        return q, queries_or_keys(weights, "K", layer, read, self.positions)

    def score_scale(self, layer: int) -> float:
        """See Forward."""
        return self.weights.score_scale(layer)

    def apply(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Forward."""
        pattern = softmax_pattern(q, k, self.score_scale(layer), self.mask)
        return pattern @ v.repeat_interleave(self.weights.n_heads // v.shape[-3], -3)

    def block(self, layer: int, stream: Tensor, added: Tensor | None = None) -> Tensor:
        """See Forward."""
        z = self.apply(layer, *self.qkv(layer, normalized(stream, self.weights)))
        return stream + self.write(layer, z, added)

    def write(self, layer: int, z: Tensor, added: Tensor | None = None) -> Tensor:
        """See Forward."""
        return heads_write(self.weights, layer, z, added)

    def mlp_reads(self, layer: int) -> MLPReads | None:
        """See Forward: these models have none."""
        return None

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """See Forward."""
        return torch.zeros_like(stream)

    def select(self, sequences: slice | Tensor) -> "WeightsForward":
        """See Forward."""
        positions = self.positions if self.positions.dim() == 1 else self.positions[sequences]
        return replace(self, mask=None if self.mask is None else self.mask[sequences], positions=positions)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """See Forward: there are none."""
        return ()

    def options(self) -> Mapping[str, object]:
        """See Forward: the CircuitWeights hold them all."""
        return {}


def heads_write(weights: CircuitWeights, layer: int, z: Tensor, added: Tensor | None) -> Tensor:
    """See Forward.write."""
    read = z.transpose(-3, -2).flatten(-2) @ weights.W_O[layer].to(z.dtype).flatten(0, 1)
    read = read if weights.b_O is None else read + weights.b_O[layer].to(z.dtype)
    read = read if added is None else read + added
    if weights.ln_post_w is not None:
        read = read * norm_scale(read, weights)[..., None]
    gain = weights.gain("W_O", layer)
    return read if gain is None else read * gain


def layer_after(forward: Forward, layer: int, stream: Tensor, written: Tensor, mlp: Tensor | None = None) -> Tensor:
    """The residual stream [N, B, T, d] after a layer that reads `stream`, whose heads write `written` (Forward.write).

    `mlp`: what its MLP writes; None: what it does when it reads what it finds.
    """
    middle = stream + written
    if mlp is None:
        reads = forward.mlp_reads(layer)
        if reads is None:
            return middle
        mlp = forward.mlp(layer, stream if reads == "before heads" else middle)
    return middle + mlp
