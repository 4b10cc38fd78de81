"""One clean run with attention patterns and norm scales frozen: from there on the model is linear in its paths."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyfastcircuits.ops import check_range
from pyfastcircuits.weights import CircuitWeights

__all__ = ["FrozenTrace", "trace"]


@dataclass(frozen=True, eq=False)
class FrozenTrace:
    """What a clean run leaves: patterns, norm scales, and the residual stream, in the computing dtype.

    Everything derived from a trace (paths, orders, ablations) holds the attention patterns and the 1/std of every
    norm, the final one included, at their values of this run ("Path expansion", Elhage et al. 2021).

    Attributes:
        weights: the model's.
        tokens: [B, T].
        patterns: L tensors [B, H, T, T]; rows are destinations, columns sources, causal, rows sum to 1.
        scales: [L + 1, B, T]: what each layer's norm, and the final one, multiplies by; ones without a norm.
        embedded: [B, T, d], the residual stream before layer 0.
        final: [B, T, d], the residual stream after the last layer, before the final norm.
    """

    weights: CircuitWeights
    tokens: Tensor
    patterns: tuple[Tensor, ...]
    scales: Tensor
    embedded: Tensor
    final: Tensor

    def pattern(self, layer: int) -> Tensor:
        """Attention patterns of a layer, [B, H, T, T].

        Raises:
            IndexError: no such layer.
        """
        if not 0 <= layer < len(self.patterns):
            raise IndexError(f"layer is {layer}, expected 0 to {len(self.patterns) - 1}")
        return self.patterns[layer]

    def normed(self, stream: Tensor, layer: int) -> Tensor:
        """The frozen norm in front of `layer` (L: the final one) applied to any stream [..., B, T, d]: linear."""
        return centered(stream, self.weights) * self.scales[layer][..., None]

    def attend(self, stream: Tensor, layer: int) -> Tensor:
        """What all heads of a layer write, under the frozen pattern, when they read `stream` [..., B, T, d].

        Value biases are not in it: they are sources of their own (`CircuitWeights.written_bias`).
        """
        values = torch.einsum("...btd,hdr->...bhtr", self.normed(stream, layer), self.weights.heads("W_V", layer))
        return torch.einsum("...bhtr,hrd->...btd", self.patterns[layer] @ values, self.weights.heads("W_O", layer))

    def sources_before(self, layer: int) -> Tensor:
        """Everything that is no attention head and is written before `layer` reads, [B, T, d]."""
        biases = [self.weights.written_bias(earlier) for earlier in range(layer)]
        return self.embedded + sum(biases, torch.zeros_like(self.embedded[0, 0]))

    def logits(self) -> Tensor:
        """The clean logits, [B, T, V]: materialised."""
        return self.unembed(self.final)

    def unembed(self, stream: Tensor) -> Tensor:
        """Logits [..., B, T, V] of a stream [..., B, T, d] through the frozen final norm, W_U and b_U."""
        logits = self.normed(stream, self.weights.n_layers) @ self.weights.W_U.to(stream.dtype)
        return logits if self.weights.b_U is None else logits + self.weights.b_U

    @cached_property
    def token_losses(self) -> Tensor:
        """NLL of each next token in nats, [B, T-1]."""
        from pyfastcircuits.effects import stream_losses

        return stream_losses(self, self.final[None])[0]

    @cached_property
    def prefix_values(self) -> dict[tuple[tuple[int, int], ...], Tensor]:
        """Where paths.path_values keeps what many paths share."""
        return {}

    @property
    def loss(self) -> Tensor:
        """Mean of token_losses, a scalar."""
        return self.token_losses.mean()

    def __getitem__(self, sequences: slice) -> "FrozenTrace":
        """The trace of some of the sequences: views, nothing is computed."""
        return replace(
            self,
            tokens=self.tokens[sequences],
            patterns=tuple(p[sequences] for p in self.patterns),
            scales=self.scales[:, sequences],
            embedded=self.embedded[sequences],
            final=self.final[sequences],
        )


def centered(stream: Tensor, weights: CircuitWeights) -> Tensor:
    """The linear part of a layernorm over the last dimension; the stream itself for other norms."""
    return stream - stream.mean(-1, keepdim=True) if weights.norm == "layernorm" else stream


@torch.no_grad()
def trace(weights: CircuitWeights, tokens: Tensor) -> FrozenTrace:
    """Run the model once and freeze it.

    Args:
        weights: the model.
        tokens: [B, T] or [T] integers, T at least 2, on the weights' device.

    Raises:
        TypeError: weights or tokens of another type.
        ValueError: no sequence, a sequence of 0 or 1 token, one longer than the model's positions, another device.
        IndexError: a token outside [0, V).
    """
    tokens = _checked_tokens(weights, tokens)
    length = tokens.shape[1]
    residual = weights.W_E[tokens].to(weights.compute_dtype)
    positions = None if weights.W_pos is None else weights.W_pos[:length].to(weights.compute_dtype)
    if weights.positional == "standard" and positions is not None:
        residual = residual + positions
    embedded, patterns, scales = residual, [], []
    for layer in range(weights.n_layers):
        scales.append(norm_scale(residual, weights))
        normed = centered(residual, weights) * scales[-1][..., None]
        addressed = normed
        if weights.positional == "shortformer" and positions is not None:
            addressed = normed + positions
        patterns.append(_pattern(addressed, layer, weights))
        values = normed[:, None] @ weights.heads("W_V", layer)
        written = (patterns[-1] @ values).transpose(1, 2).flatten(2) @ weights.heads("W_O", layer).flatten(0, 1)
        residual = residual + written + weights.written_bias(layer)
    scales.append(norm_scale(residual, weights))
    return FrozenTrace(weights, tokens, tuple(patterns), torch.stack(scales), embedded, residual)


def _checked_tokens(weights: CircuitWeights, tokens: Tensor) -> Tensor:
    if not isinstance(weights, CircuitWeights):
        raise TypeError(f"weights is a {type(weights).__name__}, expected CircuitWeights")
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens is {kind}, expected a tensor of integers")
    if tokens.dim() not in (1, 2):
        raise ValueError(f"tokens has shape {list(tokens.shape)}, expected [T] or [B, T]")
    if tokens.device != weights.device:
        raise ValueError(f"tokens is on {tokens.device}, but the weights are on {weights.device}")
    if tokens.shape[-1] < 2 or tokens.shape[0] == 0:
        raise ValueError(f"tokens has shape {list(tokens.shape)}: a loss needs sequences of at least 2 tokens")
    if weights.n_ctx is not None and tokens.shape[-1] > weights.n_ctx:
        raise ValueError(f"tokens has {tokens.shape[-1]} positions, but W_pos has only {weights.n_ctx}")
    check_range("tokens", tokens, weights.d_vocab)
    return tokens.long() if tokens.dim() == 2 else tokens.long()[None]


def norm_scale(residual: Tensor, weights: CircuitWeights) -> Tensor:
    """1/std (or 1/rms) of each position, [B, T]."""
    if weights.norm is None:
        return torch.ones_like(residual[..., 0])
    return (centered(residual, weights).square().mean(-1) + weights.eps).rsqrt()


def _pattern(stream: Tensor, layer: int, weights: CircuitWeights) -> Tensor:
    """Causal softmax of the attention scores, [B, H, T, T]."""
    q, k = (stream[:, None] @ weights.heads(name, layer) for name in ("W_Q", "W_K"))
    if weights.b_Q is not None:
        q = q + weights.b_Q[layer][:, None]
    if weights.b_K is not None:
        k = k + weights.b_K[layer].repeat_interleave(weights.n_heads // weights.b_K.shape[1], 0)[:, None]
    if weights.positional == "rotary":
        places = torch.arange(stream.shape[-2], device=stream.device)
        q, k = rotate(q, weights, places), rotate(k, weights, places)
    scale = weights.attention_scale or weights.d_head**0.5
    scores = q @ k.transpose(-1, -2) / scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)


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
