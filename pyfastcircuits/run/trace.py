"""One clean run with attention patterns and norm scales frozen: from there on the model is linear in its paths."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import check_range
from pyfastcircuits.run.forward import Rerun, WeightsRerun, centered, norm_scale, toward_logits
from pyfastcircuits.run.patterns import Pattern, QKPattern, mixed, of_sequences, softmax_pattern, whole

__all__ = ["FrozenTrace", "trace"]


@dataclass(frozen=True, eq=False)
class FrozenTrace:
    """What a clean run leaves: patterns, norm scales, and the residual stream, in the computing dtype.

    Everything derived from a trace (paths, orders, ablations) holds the attention patterns and the 1/std of every
    norm, the final one included, at their values of this run ("Path expansion", Elhage et al. 2021).

    Attributes:
        weights: the model's.
        tokens: [B, T].
        patterns: of each layer: [B, H, T, T], rows are destinations, columns sources, causal, rows sum to 1; or, with
            `store="qk"`, the queries and keys they are made again from.
        scales: [L + 1, B, T]: what each layer's norm, and the final one, multiplies by; ones without a norm.
        embedded: [B, T, d], the residual stream before layer 0.
        sources: L tensors [B, T, d], or [d] if it is the same everywhere: what each layer adds that is no attention
            head, biases and MLP outputs.
        final: [B, T, d], the residual stream after the last layer, before the final norm.
        post_scales: [L, B, T]: of the norm after each layer's heads, where there is one.
        mask: [B, T], which positions are real; None if all are. Losses are of real positions that predict real ones.
        rerun: the model's layers, for what is computed anew.
    """

    weights: CircuitWeights
    tokens: Tensor
    patterns: tuple[Pattern, ...]
    scales: Tensor
    embedded: Tensor
    sources: tuple[Tensor, ...]
    final: Tensor
    post_scales: Tensor | None = None
    mask: Tensor | None = None
    rerun: Rerun | None = None

    def pattern(self, layer: int) -> Tensor:
        """Attention patterns of a layer, [B, H, T, T].

        Raises:
            IndexError: no such layer.
        """
        if not 0 <= layer < len(self.patterns):
            raise IndexError(f"layer is {layer}, expected 0 to {len(self.patterns) - 1}")
        return whole(self.patterns[layer])

    def normed(self, stream: Tensor, layer: int) -> Tensor:
        """The frozen norm in front of `layer` (L: the final one) applied to any stream [..., B, T, d]: linear.

        What a layer's norm multiplies by is in the weights that read it; the final norm's is applied here.
        """
        last = layer == self.weights.n_layers
        linear = toward_logits(stream, self.weights) if last else centered(stream, self.weights)
        return linear * self.scales[layer][..., None]

    def post(self, written: Tensor, layer: int) -> Tensor:
        """What reaches the residual stream [..., B, T, d] of what a layer's heads write."""
        return written if self.post_scales is None else written * self.post_scales[layer][..., None]

    def attend(self, stream: Tensor, layer: int) -> Tensor:
        """What all heads of a layer write, under the frozen pattern, when they read `stream` [..., B, T, d].

        Value biases are not in it: they are among the `sources`.
        """
        read = self.normed(stream, layer).reshape(-1, *stream.shape[-3:])
        values = torch.einsum("sbtd,hdr->sbhtr", read, self.weights.layer("W_V", layer))
        heads = mixed(self.patterns[layer], values)
        written = torch.einsum("sbhtr,hrd->sbtd", heads, self.weights.heads("W_O", layer))
        return self.post(written.view(stream.shape), layer)

    @cached_property
    def streams(self) -> tuple[Tensor, ...]:
        """The clean residual stream before each layer and at the end, L + 1 of [B, T, d]."""
        streams = [self.embedded]
        for layer in range(len(self.patterns)):
            streams.append(streams[-1] + self.attend(streams[-1], layer) + self.sources[layer])
        return (*streams[:-1], self.final)

    def z(self, layer: int) -> Tensor:
        """What each head of a layer has mixed in the clean run, value biases included, before its W_O: [H, B, T, r]."""
        found = self._z.get(layer)
        if found is None:
            read = self.normed(self.streams[layer], layer)
            values = torch.einsum("btd,hdr->bhtr", read, self.weights.layer("W_V", layer))
            bias = self.weights.bias("V", layer)
            values = values if bias is None else values + bias[:, None]
            found = self._z[layer] = mixed(self.patterns[layer], values[None])[0].transpose(0, 1)
        return found

    @cached_property
    def _z(self) -> dict[int, Tensor]:
        return {}

    def sources_before(self, layer: int) -> Tensor:
        """Everything that is no attention head and is written before `layer` reads, [B, T, d]."""
        return sum(self.sources[:layer], self.embedded)

    def logits(self) -> Tensor:
        """The clean logits, [B, T, V]: materialised."""
        cap = self.weights.logit_cap
        logits = self.unembed(self.final)
        return logits if cap is None else cap * (logits / cap).tanh()

    def unembed(self, stream: Tensor) -> Tensor:
        """Logits [..., B, T, V] of a stream [..., B, T, d] through the frozen final norm, W_U and b_U, uncapped."""
        logits = self.normed(stream, self.weights.n_layers) @ self.weights.W_U.to(stream.dtype)
        bias = self.weights.unembed_bias
        return logits if bias is None else logits + bias

    @cached_property
    def token_losses(self) -> Tensor:
        """NLL of each next token in nats, [B, T-1]; NaN where `mask` leaves nothing to predict."""
        from pyfastcircuits.experiments.measure import stream_losses

        return stream_losses(self, self.final[None])[0]

    @cached_property
    def prefix_values(self) -> dict[tuple[tuple[int, int], ...], Tensor]:
        """Where paths.path_values keeps what many paths share."""
        return {}

    @property
    def loss(self) -> Tensor:
        """Mean of token_losses, a scalar."""
        return self.mean(self.token_losses)

    @cached_property
    def predicting(self) -> Tensor | None:
        """[B, T-1]: positions that are real and whose next token is; None if all are."""
        return None if self.mask is None else self.mask[:, :-1] & self.mask[:, 1:]

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over sequences and predicting positions: [..., B, T-1] -> [...]."""
        return losses.mean((-2, -1)) if self.predicting is None else losses[..., self.predicting].mean(-1)

    def __getitem__(self, sequences: slice | Tensor) -> "FrozenTrace":
        """The trace of some of the sequences, of a slice by views: nothing is computed."""
        return replace(
            self,
            tokens=self.tokens[sequences],
            patterns=tuple(of_sequences(p, sequences) for p in self.patterns),
            scales=self.scales[:, sequences],
            embedded=self.embedded[sequences],
            sources=tuple(s if s.dim() == 1 else s[sequences] for s in self.sources),
            final=self.final[sequences],
            post_scales=None if self.post_scales is None else self.post_scales[:, sequences],
            mask=None if self.mask is None else self.mask[sequences],
            rerun=None if self.rerun is None else self.rerun.part(sequences),
        )


def trace(
    model: Any, tokens: Tensor, mask: Tensor | None = None, *, store: Literal["patterns", "qk"] = "patterns"
) -> FrozenTrace:
    """Run the model once and freeze it.

    A model of another library (see `pyfastcircuits.adapters`) runs its own forward pass, in evaluation mode and with
    eager attention. Its patterns and norm scales are held, and what is no attention head, MLP outputs above all,
    becomes `sources`. The sum over all paths from all sources is the model's own logits. The trace keeps the model, and
    what its layers were called with, for what is computed anew (`FrozenTrace.rerun`).

    Where the tensors of a CircuitWeights require gradients, the trace and what is computed from it by order_losses and
    path_logits have them: through patterns and norm scales too, unless the run is made under torch.no_grad(). The run
    of another library's model is a constant.

    Args:
        model: CircuitWeights, or a model of another library.
        tokens: [B, T] or [T] integers, T at least 2, on the weights' device.
        mask: like tokens, nonzero where a token is real and zero where it is padding, left or right. Nothing attends
            to padding and no loss is averaged over it. Positions are those that the model itself gives when it is
            called with this mask; CircuitWeights count them from the start of the row.
        store: "patterns" keeps every [T, T]; "qk" keeps queries, keys and logsumexps, and makes patterns again tile by
            tile where they are applied (`ops.frozen_attention`): for long contexts; constants. A Hugging Face model
            then runs on tiles too, and no [T, T] is ever made; TransformerLens makes a layer's at a time (and of a
            TransformerBridge its mask is kept).

    Raises:
        TypeError: a model or tokens of another type.
        ValueError: no sequence, a sequence of 0 or 1 token, one longer than the model's positions, another device;
            a mask of another shape, or one that leaves nothing to predict; a model of which a part is not supported;
            store="qk" and patterns that queries and keys alone do not make (alibi).
        IndexError: a token outside [0, V).
        RuntimeError: a model whose attention is not what its weights say: it has been changed.
    """
    if store not in ("patterns", "qk"):
        raise ValueError(f"store is {store!r}, expected 'patterns' or 'qk'")
    if not isinstance(model, CircuitWeights):
        from pyfastcircuits.adapters import trace_of

        return trace_of(model, tokens, mask, store)
    weights = model
    if not weights.attention_only:
        raise ValueError(
            "weights are not a whole model (attention_only is False): its MLP outputs and patterns come from a run of "
            "the model itself, trace(model, tokens)"
        )
    tokens, mask = checked_tokens(weights, tokens), checked_mask(tokens, mask)
    length = tokens.shape[1]
    residual = weights.W_E[tokens].to(weights.compute_dtype) * weights.embed_scale
    if weights.positional == "standard" and weights.W_pos is not None:
        residual = residual + weights.W_pos[:length].to(weights.compute_dtype)
    embedded, scales, sources = residual, [], []
    patterns: list[Pattern] = []
    rerun = WeightsRerun(weights, mask)
    for layer in range(weights.n_layers):
        scales.append(norm_scale(residual, weights))
        normed = centered(residual, weights) * scales[-1][..., None]
        q, k = rerun.queries_and_keys(layer, normed)
        made = QKPattern.of if store == "qk" else softmax_pattern
        patterns.append(made(q, k, rerun.scale(layer), mask))
        values = normed[:, None] @ weights.layer("W_V", layer)
        heads = mixed(patterns[-1], values[None])[0]
        written = heads.transpose(1, 2).flatten(2) @ weights.heads("W_O", layer).flatten(0, 1)
        sources.append(weights.written_bias(layer))
        residual = residual + written + sources[-1]
    scales.append(norm_scale(residual, weights))
    return FrozenTrace(
        weights, tokens, tuple(patterns), torch.stack(scales), embedded, tuple(sources), residual, None, mask, rerun
    )


def checked_tokens(weights: CircuitWeights, tokens: Tensor) -> Tensor:
    """Tokens as [B, T] of long; errors as `trace`."""
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


def checked_mask(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as [B, T] of bool, None if every token is real; errors as `trace`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}, expected a tensor of bools or integers")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, but tokens has {list(tokens.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"mask is on {mask.device}, but tokens is on {tokens.device}")
    real = mask.bool() if mask.dim() == 2 else mask.bool()[None]
    if not (real[:, :-1] & real[:, 1:]).any():
        raise ValueError("mask leaves nothing to predict: no real token follows a real one")
    return None if real.all() else real
