"""What must hold of the options, shapes and values of a CircuitWeights; each error names the field."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyfastcircuits.arguments import describe
from pyfastcircuits.model.layers import LayerStack
from pyfastcircuits.shapes import DTYPES, check_positive

if TYPE_CHECKING:
    from pyfastcircuits.model.weights import CircuitWeights


def check_weights(weights: "CircuitWeights") -> None:
    """Raise ValueError or TypeError as CircuitWeights does."""
    _check_options(weights)
    _check_norms(weights)
    _check_shapes(weights)
    _check_rotation(weights)
    if weights.sharded:
        _check_columns(weights)
    for name, weight in weights.tensors():
        if name == "rotary_frequencies":
            continue
        if isinstance(weight, LayerStack):
            for layer, tensor in weight.held_by_layer():
                _check_values(f"{name}[{layer}]", tensor, weights.W_E)
        elif name != "W_U" or not weights.sharded:
            _check_values(name, weight, weights.W_E)


def _check_columns(weights: "CircuitWeights") -> None:
    """_check_values of the columns of W_U that each process holds: all raise the error of the first that has one."""
    mesh, (placement, *_) = weights.W_U.device_mesh, weights.W_U.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placement.is_shard(1):
        raise ValueError(
            f"W_U is {describe(weights.W_U)}, placed {placement} on a DeviceMesh of {mesh.ndim} dimensions, expected "
            "Shard(1) on one of 1"
        )
    own = weights.holders.columns(weights.d_vocab_out)
    error: Exception | None = None
    try:
        held = weights.own_W_U.shape[1]
        if held != own.stop - own.start:
            raise ValueError(
                f"W_U is {describe(weights.W_U)}, of which a process holds {held} columns, expected "
                f"{own.stop - own.start}, as distribute_tensor gives it"
            )
        _check_values("W_U", weights.own_W_U, weights.W_E, own.start)
    except (TypeError, ValueError) as found:
        error = found
    for first in filter(None, weights.holders.told(error)):
        raise first


def _check_options(weights: "CircuitWeights") -> None:
    if (weights.W_pos is not None) != (weights.positional in ("standard", "shortformer")):
        state = "missing" if weights.W_pos is None else "given"
        raise ValueError(f"W_pos is {state}, but positional is {weights.positional!r}")
    scales = weights.attention_scale
    if isinstance(scales, (float, type(None))):
        check_positive("attention_scale", scales)
    else:
        for layer, scale in enumerate(scales):
            if not isinstance(scale, (int, float)):
                raise TypeError(f"attention_scale[{layer}] is {scale!r}, expected a number")
            check_positive(f"attention_scale[{layer}]", scale)
        if len(scales) != weights.W_Q.shape[0]:
            layers = weights.W_Q.shape[0]
            raise ValueError(f"attention_scale is {list(scales)}, expected a number or one for each of {layers} layers")
    for name in ("eps", "qk_eps"):
        if not getattr(weights, name) >= 0:
            raise ValueError(f"{name} is {getattr(weights, name)}, expected a number of at least 0")
    check_positive("logit_cap", weights.logit_cap)
    check_positive("rotary_base", weights.rotary_base)
    check_positive("rotary_scale", weights.rotary_scale)


def _check_norms(weights: "CircuitWeights") -> None:
    given = [name for name in ("ln_w", "ln_b", "ln_final_w", "ln_final_b", "ln_post_w") if _has(weights, name)]
    if given and weights.norm is None:
        raise ValueError(f"{given[0]} is given, but norm is None")
    first = next((name for name in given if name in ("ln_w", "ln_b")), None)
    if first and weights.positional == "shortformer" and weights.attention_only:
        raise ValueError(f"{first} is given, but positional is 'shortformer': W_pos, added after the norm, has none")
    if not weights.norm_before_heads and (first or weights.norm != "rmsnorm"):
        wrong = f"{first} is given" if first else f"norm is {weights.norm!r}"
        raise ValueError(f"{wrong}, but norm_before_heads is False: the norm is an RMS norm before W_U alone")
    if weights.ln_post_w is not None and (weights.norm != "rmsnorm" or weights.attention_only):
        raise ValueError(
            f"ln_post_w is given, but norm is {weights.norm!r} and attention_only {weights.attention_only}: "
            "a norm after the heads is an RMS norm, and its scale comes from a run of the model"
        )
    if weights.sinks is not None and weights.attention_only:
        raise ValueError("sinks is given, but attention_only is True: patterns with sinks come from a run of the model")
    own = next((name for name in ("ln_q_w", "ln_q_b", "ln_k_w", "ln_k_b") if _has(weights, name)), None)
    if own and weights.qk_norm is None:
        raise ValueError(f"{own} is given, but qk_norm is None")


def _has(weights: "CircuitWeights", name: str) -> bool:
    return getattr(weights, name) is not None


def _check_shapes(weights: "CircuitWeights") -> None:
    for name, rank in (("W_E", 2), ("W_Q", 4), ("W_K", 4), ("W_V", 4), ("W_U", 2)):
        tensor = getattr(weights, name)
        if tensor.dim() != rank:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {rank} dimensions")
    vocabulary, d = weights.W_E.shape
    layers, heads, _, r = weights.W_Q.shape
    kv, s, out = weights.W_K.shape[1], weights.W_V.shape[3], weights.W_U.shape[1]
    if 0 in (vocabulary, d, heads, r, kv, s, out) or heads % kv:
        raise ValueError(
            f"W_E is {list(weights.W_E.shape)}, W_Q {list(weights.W_Q.shape)}, W_K {list(weights.W_K.shape)}, W_V "
            f"{list(weights.W_V.shape)} and W_U {list(weights.W_U.shape)}: sizes must not be zero, and W_Q's heads a "
            "multiple of W_K's"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "W_Q": (layers, heads, d, r), "W_K": (layers, kv, d, r), "W_V": (layers, kv, d, s),
        "W_O": (layers, heads, s, d), "W_U": (d, out),
        "b_Q": (layers, heads, r), "b_K": (layers, kv, r), "b_V": (layers, kv, s),
        "b_O": (layers, d), "b_U": (out,),
        "ln_w": (layers, d), "ln_b": (layers, d), "ln_final_w": (d,), "ln_final_b": (d,), "ln_post_w": (layers, d),
        "sinks": (layers, heads),
    }  # fmt: skip
    for name, count in (("q", heads), ("k", kv)):
        for part in "wb":
            gain = getattr(weights, f"ln_{name}_{part}")
            alike = gain is not None and gain.dim() == 3 and gain.shape[1] == 1
            shapes[f"ln_{name}_{part}"] = (layers, 1 if alike else count, r)
    if weights.W_pos is not None:
        shapes["W_pos"] = (len(weights.W_pos), d)
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} "
                f"(W_E is {list(weights.W_E.shape)}, W_Q {list(weights.W_Q.shape)}, W_K {list(weights.W_K.shape)})"
            )


def _check_rotation(weights: "CircuitWeights") -> None:
    r, layers, frequencies = weights.d_head, weights.n_layers, weights.rotary_frequencies
    if weights.rotary_dim is not None and not (0 < weights.rotary_dim <= r and weights.rotary_dim % 2 == 0):
        raise ValueError(f"rotary_dim is {weights.rotary_dim}, expected an even number of at most d_head = {r}")
    if frequencies is None:
        if weights.positional == "rotary" and weights.rotary_dim is None and r % 2:
            raise ValueError(f"W_Q has d_head {r}; rotary positions need an even one, or rotary_dim")
        return
    width = 2 * frequencies.shape[-1] if frequencies.dim() else 0
    if frequencies.shape[:-1] not in ((), (layers,)) or not 0 < width <= r or weights.rotary_dim not in (None, width):
        raise ValueError(
            f"rotary_frequencies has shape {list(frequencies.shape)}, expected [n] or [{layers}, n] with 2 n at most "
            f"d_head = {r}, and equal to rotary_dim if that is given (it is {weights.rotary_dim})"
        )
    if frequencies.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotary_frequencies has dtype {frequencies.dtype}, expected torch.float32 or torch.float64")
    if frequencies.device != weights.device:
        raise ValueError(f"rotary_frequencies is on {frequencies.device}, but W_E is on {weights.device}")
    if weights.positional != "rotary":
        raise ValueError(f"rotary_frequencies is given, but positional is {weights.positional!r}")
    if not frequencies.isfinite().all():
        raise ValueError("rotary_frequencies holds a number that is not finite")


def _check_values(name: str, tensor: Tensor, like: Tensor, first: int = 0) -> None:
    """`first`: the number of the first column, of a part of a tensor."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if (tensor.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(f"{name} has dtype {tensor.dtype}, but W_E has {like.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but W_E is on {like.device}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, expected a device that holds values")
    in_memory = tensor.detach().permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # 15 times faster
    if tensor.numel() and not all(bound.isfinite() for bound in in_memory.aminmax()):
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        value = tensor[tuple(place)].item()
        place[-1] += first
        raise ValueError(f"{name}{place} is {value}: weights must be finite")
