"""One clean run with attention patterns and norm scales frozen: from there on the model is linear in its paths."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import as_integers, describe, public, refuse_sharded
from pyfastcircuits.model.norms import centered, final_norm_gain
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.modes import derived, kept_for_backward
from pyfastcircuits.ops import Backend, check_range
from pyfastcircuits.run.forward import Forward
from pyfastcircuits.run.losses import row_losses
from pyfastcircuits.run.model_guard import ModelGuard
from pyfastcircuits.run.patterns import Pattern, apply_pattern, select_sequences, stored


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model whose attention patterns and norm scales are constants: every layer is a linear map of what it reads.

    Attributes:
        guard: the weights, and whether they are still the ones of the run.
        patterns: of each layer: [B, H, T, T], rows are destinations, columns sources, causal, rows sum to 1; or, with
            `store="qk"`, the queries and keys from which they are made again.
        scales: [L + 1, B, T]: 1/std of the norm in front of each layer and of the final one; ones without a norm.
        post_scales: [L, B, T]: 1/rms of the norm after each layer's heads, where there is one.
        value_scales: [L, B, T]: 1/rms of a norm within the way to each layer's values, where there is one (DeepSeek).
        final_shift: [B, T, d], what the model's final norm gave beyond the frozen one, where no residual stream makes
            it: the mean that a layernorm of a float64 model rounds to fp32. It joins the bias of the logits.
    """

    guard: ModelGuard
    patterns: tuple[Pattern, ...]
    scales: Tensor
    post_scales: Tensor | None
    value_scales: Tensor | None
    final_shift: Tensor | None

    @property
    def weights(self) -> CircuitWeights:
        """The model's weights.

        Raises:
            RuntimeError: they have been changed in place since the run was made.
        """
        self.guard.check_unchanged()
        return self.guard.weights

    @property
    def sharded(self) -> bool:
        """Whether the weights' W_U is sharded over processes."""
        return self.guard.weights.sharded

    @public
    def pattern(self, layer: int) -> Tensor:
        """Attention patterns of a layer, [B, H, T, T].

        Raises:
            IndexError: no such layer.
        """
        self.guard.weights.check_layer(layer)
        return stored(self.patterns[layer])

    @public
    def normed(self, stream: Tensor, layer: int) -> Tensor:
        """The frozen norm in front of `layer` (L: the final one) applied to any stream [..., B, T, d]: linear.

        The gain of a layer's norm is in the weights that read it (CircuitWeights.layer); the final norm's is applied
        here.

        Raises:
            IndexError: no such layer.
        """
        weights = self.weights
        _check_boundary(layer, weights)
        self._check_stream("stream", stream, weights.d_model)
        linear = final_norm_gain(stream, weights) if layer == weights.n_layers else centered(stream, weights)
        return linear * self.scales[layer][..., None]

    @public
    def value_scale(self, layer: int) -> Tensor:
        """The factor [B, T] of all frozen norms between a stream that a layer reads and its heads' values.

        Raises:
            IndexError: no such layer.
        """
        self.guard.weights.check_layer(layer)
        return self.scales[layer] if self.value_scales is None else self.scales[layer] * self.value_scales[layer]

    @public
    def read_by_unembedding(self, stream: Tensor) -> Tensor:
        """`normed` for W_U, of whole streams [..., B, T, d] whose logits have the bias in them."""
        read = self.normed(stream, self.guard.weights.n_layers)
        return read if self.final_shift is None else read + self.final_shift

    @public
    def read_by_values(self, stream: Tensor, layer: int) -> Tensor:
        """`normed` for a layer's W_V: with the scale of a norm within the way to its values, where there is one."""
        self.guard.weights.check_layer(layer)
        read = self.normed(stream, layer)
        return read if self.value_scales is None else read * self.value_scales[layer][..., None]

    def _check_stream(self, name: str, stream: Tensor, width: int) -> None:
        shape = [*self.scales.shape[1:], width]
        if not stream.is_floating_point():
            raise TypeError(f"{name} has dtype {stream.dtype}, expected floating point")
        if list(stream.shape[-3:]) != shape:
            raise ValueError(f"{name} has shape {list(stream.shape)}, expected [..., {', '.join(map(str, shape))}]")
        if stream.device != self.scales.device:
            raise ValueError(f"{name} is on {stream.device}, but the run is on {self.scales.device}")

    @public
    def apply_post_norm(self, written: Tensor, layer: int) -> Tensor:
        """The part of `written`, by a layer's heads, that reaches the residual stream: through the norm after them."""
        self.guard.weights.check_layer(layer)
        self._check_stream("written", written, written.shape[-1] if written.dim() else 0)
        return written if self.post_scales is None else written * self.post_scales[layer][..., None]

    @public
    def attend(self, stream: Tensor, layer: int) -> Tensor:
        """The sum of the writes of all heads of a layer that read `stream` [..., B, T, d] under their frozen patterns.

        Value biases are not in it: they are among the `non_head_writes`.
        """
        self.guard.weights.check_layer(layer)
        weights, read = self.weights, self.read_by_values(stream, layer).reshape(-1, *stream.shape[-3:])
        values = torch.einsum("sbtd,hdr->sbhtr", read, weights.layer("W_V", layer))
        z = apply_pattern(self.patterns[layer], values)
        written = torch.einsum("sbhtr,hrd->sbtd", z, weights.heads("W_O", layer))
        return self.apply_post_norm(written.view(stream.shape), layer)

    @public
    def unembed(self, stream: Tensor) -> Tensor:
        """Logits [..., B, T, V'] of a stream [..., B, T, d] through the frozen final norm, W_U and b_U, uncapped."""
        weights = self.weights
        if weights.sharded:
            refuse_sharded("self", FrozenModel.unembed)
        logits = self.read_by_unembedding(stream) @ weights.W_U.to(stream.dtype)
        bias = weights.whole_unembed_bias()
        return logits if bias is None else logits + bias


@dataclass(frozen=True, eq=False, repr=False)
class FrozenTrace(FrozenModel):
    """A clean run: its frozen model, and the residual stream that went through it, in the computing dtype.

    Everything derived from a trace (paths, orders, ablations) holds the attention patterns and the 1/std of every
    norm, the final one included, at their values of this run ("Path expansion", Elhage et al. 2021). A trace is made by
    `fc.trace`; `trace[2:5]` is the trace of some of its sequences.

    Attributes:
        tokens: [B, T].
        embedded: [B, T, d], the residual stream before layer 0.
        non_head_writes: L tensors [B, T, d], or [d] if it is the same everywhere: what each layer adds that is no
            attention head, biases and MLP outputs.
        final: [B, T, d], the residual stream after the last layer, before the final norm.
        mask: [B, T], which positions are real; None if all are. Losses are of real positions that predict real ones.
        forward: the model's layers, for what is computed anew.
        sequences: which sequences these are of the trace that this one was cut from; all of them if it was not cut.
    """

    tokens: Tensor
    embedded: Tensor
    non_head_writes: tuple[Tensor, ...]
    final: Tensor
    mask: Tensor | None
    forward: Forward
    sequences: slice | Tensor = field(default_factory=lambda: slice(None))

    def __repr__(self) -> str:
        """The sizes of the run."""
        (sequences, length), weights = self.tokens.shape, self.guard.weights
        sizes = f"{weights.n_layers} layers of {weights.n_heads} heads"
        return f"FrozenTrace({sequences} sequences of {length} tokens, {sizes}, {self.embedded.dtype})"

    @property
    def learns(self) -> bool:
        """Whether results have gradients: the run was made with them, or some of the weights require them."""
        return self.final.requires_grad or self.guard.weights.learns

    @derived
    def streams(self) -> tuple[Tensor, ...]:
        """The clean residual stream before each layer and at the end, L + 1 of [B, T, d]."""
        streams = [self.embedded]
        for layer in range(len(self.patterns)):
            streams.append(streams[-1] + self.attend(streams[-1], layer) + self.non_head_writes[layer])
        return (*streams[:-1], self.final)

    @public
    def z(self, layer: int) -> Tensor:
        """The values that each head of a layer has mixed in the clean run, before its W_O: [H, B, T, r].

        Value biases are in them.

        Raises:
            IndexError: no such layer.
        """
        self.guard.weights.check_layer(layer)
        if layer not in self._z:
            with kept_for_backward():
                self._z[layer] = self._mixed(layer)
        return self._z[layer]

    def forget_z(self, layer: int) -> None:
        """Let go of what `z` keeps of a layer; it is computed again when it is asked for."""
        self._z.pop(layer, None)

    def _mixed(self, layer: int) -> Tensor:
        read = self.read_by_values(self.streams[layer], layer)
        values = torch.einsum("btd,hdr->bhtr", read, self.weights.layer("W_V", layer))
        bias = self.weights.bias("V", layer)
        values = values if bias is None else values + bias[:, None]
        return apply_pattern(self.patterns[layer], values[None])[0].transpose(0, 1)

    @derived
    def _z(self) -> dict[int, Tensor]:
        return {}

    @derived
    def prefix_z(self) -> dict[tuple[tuple[int, int], ...], Tensor]:
        """The store of paths.path_z: z along paths that many longer paths begin with."""
        return {}

    @derived
    def means(self) -> dict[Any, Tensor]:
        """The store of ablation values: means of outputs over all sequences and positions."""
        return {}

    @derived
    def non_head_reads(self) -> dict[int, Tensor]:
        """The store of paths: what the values of the last layer asked about read of everything that is no head."""
        return {}

    @derived
    def clean_qkv(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """The store of rerun.clean_qkv."""
        return {}

    @public
    def non_head_stream(self, layer: int) -> Tensor:
        """The sum of everything that is no attention head and is written before `layer` reads, [B, T, d].

        Raises:
            IndexError: no such layer; L stands for the final norm.
        """
        _check_boundary(layer, self.guard.weights)
        return sum(self.non_head_writes[:layer], self.embedded)

    @public
    def logits(self) -> Tensor:
        """The clean logits, [B, T, V']: materialised."""
        self.guard.check_values()
        cap = self.weights.logit_cap
        logits = self.unembed(self.final)
        return logits if cap is None else cap * (logits / cap).tanh()

    @property
    def token_losses(self) -> Tensor:
        """NLL of each next token in nats, [B, T-1]; NaN where `mask` leaves nothing to predict.

        Raises:
            ValueError: the model predicts other tokens than it reads.
        """
        self.guard.check_values()
        return self._token_losses

    @derived
    def _token_losses(self) -> Tensor:
        return self.stream_losses(self.final[None])[0]

    @property
    def loss(self) -> Tensor:
        """Mean of token_losses, a scalar."""
        return self.mean(self.token_losses)

    @public
    def stream_losses(self, streams: Tensor, backend: Backend = "auto") -> Tensor:
        """NLL [K, B, T-1] when each of `streams` [K, B, T, d] is the final residual stream. No [T, V] is stored.

        Raises:
            TypeError, ValueError: streams of another dtype, shape or device; as token_losses.
        """
        weights = self.weights
        weights.check_one_vocabulary("no next token is predicted, so a run has no loss; order_losses takes targets")
        self._check_stream("streams", streams, weights.d_model)
        if streams.dim() != 4:
            raise ValueError(f"streams has shape {list(streams.shape)}, expected four dimensions, [K, B, T, d]")
        rows, targets = self.read_by_unembedding(streams)[..., :-1, :], self.tokens[:, 1:]
        seen = torch.ones_like(targets, dtype=torch.bool) if self.predicting is None else self.predicting
        losses = row_losses(rows[:, seen].flatten(0, 1), targets[seen].repeat(len(streams)), weights, backend)
        out = losses.new_full((len(streams), *targets.shape), torch.nan)
        out[:, seen] = losses.view(len(streams), targets[seen].numel())
        return out

    @derived
    def predicting(self) -> Tensor | None:
        """[B, T-1]: positions that are real and whose next token is; None if all are."""
        return None if self.mask is None else self.mask[:, :-1] & self.mask[:, 1:]

    @public
    def mean(self, losses: Tensor) -> Tensor:
        """Mean over sequences and predicting positions: [..., B, T-1] -> [...]."""
        expected = [len(self.tokens), self.tokens.shape[1] - 1]
        if list(losses.shape[-2:]) != expected or not losses.is_floating_point():
            raise ValueError(f"losses is {describe(losses)}, expected floating point of [..., B, T-1] = {expected}")
        if losses.device != self.tokens.device:
            raise ValueError(f"losses is on {losses.device}, but the run is on {self.tokens.device}")
        return losses.mean((-2, -1)) if self.predicting is None else losses[..., self.predicting].mean(-1)

    @public
    def __getitem__(self, sequences: slice | Tensor) -> "FrozenTrace":
        """The trace of some of the sequences; a slice gives views, and nothing is computed.

        Raises:
            ValueError, IndexError, TypeError: a tensor that is neither a mask [B] nor a list of sequences there are.
        """
        if isinstance(sequences, Tensor):
            _check_sequences(as_integers("sequences", sequences, self.tokens.device, masks=True), len(self.tokens))
        return replace(
            self,
            patterns=tuple(select_sequences(p, sequences) for p in self.patterns),
            scales=self.scales[:, sequences],
            post_scales=None if self.post_scales is None else self.post_scales[:, sequences],
            value_scales=None if self.value_scales is None else self.value_scales[:, sequences],
            final_shift=None if self.final_shift is None else self.final_shift[sequences],
            tokens=self.tokens[sequences],
            embedded=self.embedded[sequences],
            non_head_writes=tuple(w if w.dim() == 1 else w[sequences] for w in self.non_head_writes),
            final=self.final[sequences],
            mask=None if self.mask is None else self.mask[sequences],
            forward=self.forward.select(sequences),
            sequences=sequences,
        )


def _check_boundary(layer: int, weights: CircuitWeights) -> None:
    """Raise IndexError unless it is a layer, or L: what stands behind the last one."""
    if not 0 <= layer <= weights.n_layers:
        raise IndexError(f"layer is {layer}, expected 0 to {weights.n_layers} (the final norm)")


def _check_sequences(sequences: Tensor, count: int) -> None:
    """Raise unless they are a mask of all sequences, or numbers of some; negative ones count from the end."""
    if sequences.dtype == torch.bool:
        if list(sequences.shape) != [count]:
            raise ValueError(f"sequences has shape {list(sequences.shape)}, expected [{count}]")
    elif sequences.dim() != 1:
        raise ValueError(f"sequences has shape {list(sequences.shape)}, expected [N]")
    else:
        check_range("sequences", torch.where(sequences < 0, sequences + count, sequences), count)
