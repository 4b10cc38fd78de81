"""`fc.trace`: one clean run of a model, its own or that of another library, frozen."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters import hugging_face, transformer_lens
from pyfastcircuits.adapters.recording import freeze
from pyfastcircuits.adapters.tokens import Tokens
from pyfastcircuits.adapters.unwrap import unwrapped
from pyfastcircuits.arguments import describe, public, refuse_sharded, takes_sharded
from pyfastcircuits.model.norms import centered, embedded, head_norm_scale, norm_scale
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import WeightsForward
from pyfastcircuits.run.model_guard import ModelGuard
from pyfastcircuits.run.patterns import Pattern, QKPattern, apply_pattern, softmax_pattern
from pyfastcircuits.run.trace import FrozenTrace


@public
@takes_sharded
def trace(
    model: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
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
            to padding and no loss is averaged over it.
        position_ids: [T] or [B, T] integers, the position of each token; None counts from 0 at the first real token of
            each row, so that padding on the left changes nothing.
        store: "patterns" keeps every [T, T]; "qk" keeps queries, keys and logsumexps, and makes patterns again tile by
            tile where they are applied (`ops.frozen_attention`): for long contexts; constants. A Hugging Face model
            then runs on tiles too, and no [T, T] is ever made; TransformerLens makes a layer's at a time (and of a
            TransformerBridge its mask is kept).
        weights: what `CircuitWeights.from_model(model)` returned before, for many runs of one model; None reads them.

    Raises:
        TypeError: a model or tokens of another type.
        ValueError: no sequence, a sequence of 0 or 1 token, one longer than the model's positions, another device;
            a mask of another shape, or one that leaves nothing to predict; a model of which a part is not supported;
            weights beside CircuitWeights; store="qk" and patterns that queries and keys alone do not make (alibi);
            position_ids of another shape or device, or for a model that takes none.
        IndexError: a token outside [0, V), or a position outside [0, n_ctx).
        RuntimeError: a model whose attention is not what its weights say: it has been changed.
    """
    if isinstance(model, CircuitWeights):
        if weights is not None and weights is not model:
            raise ValueError("weights is given, but the model is a CircuitWeights itself: give one of them")
        return _trace_weights(model, Tokens.of(model, tokens, mask, position_ids), store)
    if weights is not None and weights.sharded:
        refuse_sharded("weights", trace)
    model, library = _library(model)
    if weights is None:
        weights = library.weights_of(model)
    given = Tokens.of(weights, tokens, mask, position_ids)
    return freeze(weights, given, library.record(model, weights, given, store))


def weights_of(model: Any) -> CircuitWeights:
    """See CircuitWeights.from_model."""
    if isinstance(model, CircuitWeights):
        raise TypeError("model is a CircuitWeights already, expected a model of another library: use it as it is")
    inner, library = _library(model)
    weights: CircuitWeights = library.weights_of(inner)
    return weights


def _library(model: Any) -> tuple[Any, Any]:
    """The model inside of what wraps it, and the adapter of its library, known by what the model offers alone."""
    inner = unwrapped(model)
    if hasattr(inner, "run_with_hooks") and hasattr(inner, "cfg"):
        return inner, transformer_lens
    if hasattr(getattr(inner, "config", None), "model_type"):
        return inner, hugging_face
    raise TypeError(
        f"model is {describe(model)}, expected CircuitWeights, a TransformerLens model or a Hugging Face one"
    )


def _trace_weights(weights: CircuitWeights, given: Tokens, store: str) -> FrozenTrace:
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
    start = embedded(given.tokens, weights, given.positions)
    forward, residual = WeightsForward(weights, given.mask, given.positions), start
    scales, biases = [], []
    patterns: list[Pattern] = []
    for layer in range(weights.n_layers):
        scales.append(head_norm_scale(residual, weights))
        normed = centered(residual, weights) * scales[-1][..., None]
        q, k = forward.queries_and_keys(layer, normed)
        made = QKPattern.of if store == "qk" else softmax_pattern
        patterns.append(made(q, k, forward.score_scale(layer), given.mask))
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
        value_scales=None,
        final_shift=None,
        tokens=given.tokens,
        embedded=start,
        non_head_writes=tuple(biases),
        final=residual,
        mask=given.mask,
        forward=forward,
    )
