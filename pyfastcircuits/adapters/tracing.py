"""`fc.trace`: one clean run of a model, its own or that of another library, frozen."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters import hugging_face, transformer_lens
from pyfastcircuits.adapters.recording import freeze
from pyfastcircuits.arguments import describe, public
from pyfastcircuits.model.norms import centered, embedded, norm_scale
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import check_range
from pyfastcircuits.run.forward import WeightsForward
from pyfastcircuits.run.model_guard import ModelGuard
from pyfastcircuits.run.patterns import Pattern, QKPattern, apply_pattern, softmax_pattern
from pyfastcircuits.run.trace import FrozenTrace


@public
def trace(
    model: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    store: Literal["patterns", "qk"] = "patterns",
    weights: CircuitWeights | None = None,
) -> FrozenTrace:
    """Run the model once and freeze it.

    A model of another library (see `pyfastcircuits.adapters`) runs its own forward pass, in evaluation mode and with
    eager attention. Its patterns and norm scales are held, and everything that is no attention head, MLP outputs above
    all, becomes a write of its own. The sum over all paths from all of these is the model's own logits. The trace keeps
    the model, and the arguments its layers were called with, for experiments that compute layers anew.

    Where the tensors of a CircuitWeights require gradients, the trace and the results of order_losses, path_logits and
    ablations under frozen attention have them: through patterns and norm scales too, unless the run is made under
    torch.no_grad(). The run of another library's model is a constant. Weights that are changed in place afterwards, by
    an optimiser step, make the trace stale: it then raises instead of mixing the two.

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
        weights: what `CircuitWeights.from_model(model)` returned before, for many runs of one model; None reads them.

    Raises:
        TypeError: a model or tokens of another type.
        ValueError: no sequence, a sequence of 0 or 1 token, one longer than the model's positions, another device;
            a mask of another shape, or one that leaves nothing to predict; a model of which a part is not supported;
            weights beside CircuitWeights; store="qk" and patterns that queries and keys alone do not make (alibi).
        IndexError: a token outside [0, V).
        RuntimeError: a model whose attention is not what its weights say: it has been changed.
    """
    if isinstance(model, CircuitWeights):
        if weights is not None and weights is not model:
            raise ValueError("weights is given, but the model is a CircuitWeights itself: give one of them")
        return _trace_weights(model, tokens, mask, store)
    library = _library(model)
    if weights is None:
        weights = library.weights_of(model)
    tokens, mask = checked_tokens(weights, tokens), checked_mask(tokens, mask)
    return freeze(weights, tokens, mask, library.record(model, weights, tokens, mask, store))


def weights_of(model: Any) -> CircuitWeights:
    """See CircuitWeights.from_model."""
    if isinstance(model, CircuitWeights):
        raise TypeError("model is a CircuitWeights already, expected a model of another library: use it as it is")
    weights: CircuitWeights = _library(model).weights_of(model)
    return weights


def _library(model: Any) -> Any:
    """The adapter of the library that the model is of; it is known by what it offers, and nothing is imported."""
    if hasattr(model, "run_with_hooks") and hasattr(model, "cfg"):
        return transformer_lens
    if hasattr(getattr(model, "config", None), "model_type"):
        return hugging_face
    raise TypeError(
        f"model is {describe(model)}, expected CircuitWeights, a TransformerLens model or a Hugging Face one"
    )


def _trace_weights(weights: CircuitWeights, tokens: Tensor, mask: Tensor | None, store: str) -> FrozenTrace:
    """The run of a model that is nothing but its CircuitWeights."""
    if not weights.attention_only:
        raise ValueError(
            "weights are not a whole model (attention_only is False): its MLP outputs and patterns come from a run of "
            "the model itself, trace(model, tokens)"
        )
    if store == "qk" and torch.is_grad_enabled() and weights.learns:
        raise ValueError(
            "store is 'qk', which keeps patterns as constants, but the weights require gradients: trace under "
            "torch.no_grad(), or with store='patterns'"
        )
    tokens, mask = checked_tokens(weights, tokens), checked_mask(tokens, mask)
    start, forward = embedded(tokens, weights), WeightsForward(weights, mask)
    residual = start
    scales, biases = [norm_scale(residual, weights)], []
    patterns: list[Pattern] = []
    for layer in range(weights.n_layers):
        normed = centered(residual, weights) * scales[-1][..., None]
        q, k = forward.queries_and_keys(layer, normed)
        made = QKPattern.of if store == "qk" else softmax_pattern
        patterns.append(made(q, k, forward.score_scale(layer), mask))
        values = normed[:, None] @ weights.layer("W_V", layer)
        z = apply_pattern(patterns[-1], values[None])[0]
        written = z.transpose(1, 2).flatten(2) @ weights.heads("W_O", layer).flatten(0, 1)
        biases.append(weights.written_bias(layer))
        residual = residual + written + biases[-1]
        scales.append(norm_scale(residual, weights))
    return FrozenTrace(
        guard=ModelGuard.of(weights, forward),
        patterns=tuple(patterns),
        scales=torch.stack(scales),
        post_scales=None,
        tokens=tokens,
        embedded=start,
        non_head_writes=tuple(biases),
        final=residual,
        mask=mask,
        forward=forward,
    )


def checked_tokens(weights: CircuitWeights, tokens: Tensor) -> Tensor:
    """Tokens as [B, T] of int64; errors as `trace`."""
    if not isinstance(tokens, Tensor) or not _whole(tokens) or tokens.dtype == torch.bool:
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
    if not isinstance(mask, Tensor) or not _whole(mask):
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


def _whole(tensor: Tensor) -> bool:
    """Whether it holds integers or bools."""
    return not tensor.is_floating_point() and not tensor.is_complex()
