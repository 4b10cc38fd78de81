"""TransformerLens' default processing of weights, of any library's model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.model import folding
from pyfastcircuits.model.layers import stacked
from pyfastcircuits.model.weights import CircuitWeights


@public
@torch.no_grad()
def process_weights(
    weights: CircuitWeights,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
) -> CircuitWeights:
    """Equivalent weights as TransformerLens processes them by default; log probabilities do not change.

    Scores of composition and eigenvalues of circuits depend on such choices, so results compare with TransformerLens'
    own on weights that are processed alike. The names and defaults are those of `HookedTransformer.process_weights_`.

    Args:
        weights: the model. What is changed is copied, in the computing dtype.
        fold_ln: gains and biases of the norms before heads and before W_U are folded into W_Q, W_K, W_V, W_U and their
            biases. Behind a layernorm, which subtracts the mean, these weights are then centred over d_model too.
        center_writing_weights: W_E, W_O, b_O, and W_pos where it is added to the residual stream, write nothing along
            the mean; of models with layernorms alone.
        center_unembed: W_U and b_U have mean 0 over the vocabulary. This moves all logits of a position alike, so it is
            left out where logits are capped.
        fold_value_biases: b_V is folded into b_O.

    Raises:
        ValueError: gains to fold and shortformer positions, which are added behind the norm and would be scaled too;
            value biases to fold and sinks, with which rows of patterns do not sum to 1.
    """
    if fold_ln and weights.norm is not None:
        weights = _without_norm_parameters(weights)
    if center_writing_weights and weights.norm == "layernorm":
        weights = replace(folding.center(weights), norm="layernorm")
    if center_unembed and weights.logit_cap is None:
        changed: dict[str, Any] = {"W_U": _centered(weights.W_U.to(weights.compute_dtype), -1)}
        if weights.b_U is not None:
            changed["b_U"] = _centered(weights.b_U.to(weights.compute_dtype), -1)
        weights = replace(weights, **changed)
    return folding.fold_value_biases(weights) if fold_value_biases else weights


def _without_norm_parameters(weights: CircuitWeights) -> CircuitWeights:
    if weights.positional == "shortformer" and (weights.ln_w is not None or weights.ln_b is not None):
        raise ValueError(
            "weights.positional is 'shortformer', and its norms have parameters: W_pos is added behind the norm, and "
            "would be scaled too; expected fold_ln=False"
        )
    blind, layers = weights.norm == "layernorm", range(weights.n_layers)
    placed = "QK" if weights.positional == "shortformer" else ""  # these read W_pos too, and its mean
    changed: dict[str, Any] = {"W_U": weights.W_U.to(weights.compute_dtype), "b_U": weights.whole_unembed_bias()}
    if weights.ln_final_w is not None:
        changed["W_U"] = changed["W_U"] * weights.ln_final_w.to(weights.compute_dtype)[:, None]
    if blind:
        changed["W_U"] = _centered(changed["W_U"], 0)
    for name in ("Q", "K", "V") if weights.norm_before_heads and layers else ():
        stored = stacked(getattr(weights, f"W_{name}")).to(weights.compute_dtype)
        folded = stored if weights.ln_w is None else stored * weights.ln_w.to(stored.dtype)[:, None, :, None]
        changed[f"W_{name}"] = _centered(folded, 2) if blind and name not in placed else folded
        biases = [bias for layer in layers if (bias := weights.bias(name, layer)) is not None]
        changed[f"b_{name}"] = torch.stack(biases) if biases else None
    return replace(weights, **changed, ln_w=None, ln_b=None, ln_final_w=None, ln_final_b=None)


def _centered(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)
