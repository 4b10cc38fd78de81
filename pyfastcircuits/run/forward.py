"""A model's layers, to be run again from any of them with something changed.

A plain rerun with hooks runs the whole model for each experiment. The layers in front of the change do the same work
again and again, so here N experiments start together from the clean run's residual stream at the layer they change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from pyfastcircuits.model.norms import normalized
from pyfastcircuits.model.queries import queries_or_keys
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.patterns import softmax_pattern


class Forward(Protocol):
    """The parts of a forward pass that experiments run again, in the weights' computing dtype, all differentiable.

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

    def score_scale(self, layer: int) -> float:
        """The factor of the attention scores: score_scale * queries @ keys.T, before any cap and mask."""
        ...

    def apply(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z [N, B, H, T, r]: values under the patterns that queries and keys make, capped and masked as the model does.

        The first dimension of q, k and v is N or 1.
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
        written = z.transpose(-3, -2).flatten(-2) @ self.weights.heads("W_O", layer).flatten(0, 1)
        if self.weights.b_O is not None:
            written = written + self.weights.b_O[layer].to(written.dtype) * self.weights.write_scale
        return stream + (written if added is None else written + added * self.weights.write_scale)

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
