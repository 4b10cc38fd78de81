"""Equivalent weights: norm parameters, means and value biases folded into other weights; logits do not change."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.model.layers import stacked
from pyfastcircuits.model.norms import centered
from pyfastcircuits.model.weights import CircuitWeights


@public
@torch.no_grad()
def fold_norm(
    weights: CircuitWeights,
    gain: Tensor,
    final_gain: Tensor,
    bias: Tensor | None = None,
    final_bias: Tensor | None = None,
) -> CircuitWeights:
    """Weights whose parameter-free norms stand for norms followed by `* gain + bias`. Logits do not change.

    CircuitWeights can hold such parameters too (`ln_w` and the like), and then nothing is copied.

    Args:
        weights: the model, whose norms have no parameters.
        gain: [L, d], of the norm in front of each layer's heads.
        final_gain: [d], of the norm in front of W_U.
        bias, final_bias: likewise, of a layernorm.

    Raises:
        ValueError: the weights have no norm, or shortformer positions (these are added after the norm, so that a gain
            would scale them too), or their norms have parameters already; a parameter has the wrong shape.
    """
    if weights.norm is None:
        raise ValueError("weights.norm is None: there is no norm whose parameters could be folded")
    if weights.positional == "shortformer":
        raise ValueError("weights.positional is 'shortformer': W_pos is added after the norm, and would be scaled too")
    held = [name for name, _ in weights.tensors() if name.startswith("ln_")]
    if held:
        raise ValueError(f"weights.{held[0]} is given: its norms have parameters already")
    layers, d = weights.n_layers, weights.d_model
    for name, tensor, shape in (
        ("gain", gain, (layers, d)),
        ("final_gain", final_gain, (d,)),
        ("bias", bias, (layers, d)),
        ("final_bias", final_bias, (d,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor is not None and tensor.device != weights.device:
            raise ValueError(f"{name} is on {tensor.device}, but the weights are on {weights.device}")
    changed: dict[str, Any] = {"W_U": weights.W_U * final_gain[:, None]}
    for name in ("Q", "K", "V"):
        weight = stacked(getattr(weights, f"W_{name}"))
        changed[f"W_{name}"] = weight * gain[:, None, :, None]
        if bias is not None:
            moved = torch.einsum("ld,lhdr->lhr", bias, weight)
            changed[f"b_{name}"] = _added(getattr(weights, f"b_{name}"), moved)
    if final_bias is not None:
        changed["b_U"] = _added(weights.b_U, final_bias @ weights.W_U)
    return replace(weights, **changed)


@public
@torch.no_grad()
def center(weights: CircuitWeights) -> CircuitWeights:
    """Weights that write nothing along the mean of the residual stream, which a layernorm subtracts anyway.

    Every layernorm is then an RMS norm, and the result says so: its circuits read the residual stream linearly, up to
    the norm's scale. Logits do not change.

    Raises:
        ValueError: norm is not "layernorm"; another norm sees the mean.
    """
    if weights.norm != "layernorm":
        raise ValueError(
            f"weights.norm is {weights.norm!r}: only a layernorm is blind to the mean, expected 'layernorm'"
        )
    names = ["W_E", "W_O", *(["b_O"] if weights.b_O is not None else [])]
    if weights.positional == "standard":
        names.append("W_pos")
    changed: dict[str, Any] = {name: centered(stacked(getattr(weights, name)), weights) for name in names}
    return replace(weights, norm="rmsnorm", **changed)


@public
@torch.no_grad()
def fold_value_biases(weights: CircuitWeights) -> CircuitWeights:
    """Weights whose b_O holds b_V too: rows of a pattern sum to 1, so b_V is written whole. Logits do not change.

    Raises:
        ValueError: the weights have sinks, so that rows of patterns do not sum to 1.
    """
    if weights.b_V is None or not weights.n_layers:  # without layers b_V is empty
        return weights
    if weights.sinks is not None:
        raise ValueError("weights.sinks is given: rows of patterns do not sum to 1, and no value bias is a constant")
    bare = replace(
        weights, ln_b=None, ln_post_w=None, write_scale=1.0
    )  # these act on the new b_O as they did on b_V and b_O
    written = torch.stack([bare.written_bias(layer) for layer in range(weights.n_layers)])
    return replace(weights, b_V=None, b_O=written.to(weights.W_O.dtype))


def _added(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more
