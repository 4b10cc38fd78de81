"""An adapter records one forward pass of another library's model; here the record becomes a frozen run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyfastcircuits.model.norms import embedded, norm_scale
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import Forward
from pyfastcircuits.run.model_guard import ModelGuard
from pyfastcircuits.run.patterns import Pattern
from pyfastcircuits.run.trace import FrozenModel, FrozenTrace

STREAMS = ("hidden_states", "query_input", "key_input", "value_input")  # names that modules read the stream by


@dataclass(frozen=True)
class Call:
    """The arguments of a module's call beside the stream that it reads: masks, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, stream: Tensor) -> Any:
        """The module on another stream."""
        return module(stream, *self.args, **self.kwargs)


@dataclass
class Recording:
    """The record of one forward pass, by reference, in the model's dtype."""

    streams: list[Tensor] = field(default_factory=list)  # L + 1, [B, T, d]: before each layer and the final norm
    patterns: list[Pattern] = field(default_factory=list)  # L
    written: list[Tensor] = field(default_factory=list)  # L, [B, T, d]: what attention adds to the stream, with biases
    attended: list[Tensor] = field(default_factory=list)  # L, or none without a norm after the heads: what that reads
    blocks: list[Call] = field(default_factory=list)  # L: what each layer was called with
    attentions: list[Call] = field(default_factory=list)  # L: and its attention
    headed: dict[nn.Module, Tensor] = field(default_factory=dict)  # what norms of queries and of keys read
    normed: Tensor | None = None  # [B, T, d], what the final norm gives
    forward: Forward | None = None


class Hooks:
    """Hooks on a model's modules, which run without dropout and as constants; at the end all is as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._learning = [tensor for tensor in model.parameters() if tensor.requires_grad and tensor.is_leaf]
        self._handles: list[Any] = []

    def before(self, module: nn.Module, keep: Callable[[Tensor, Call], object]) -> None:
        """Keep the stream that the module reads, and what else it is called with."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {name: kwargs[name] for name in STREAMS if name in kwargs}
            rest = {name: value for name, value in kwargs.items() if name not in named}
            keep(*((args[0], Call(args[1:], rest)) if args else (next(iter(named.values())), Call((), rest))))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, keep: Callable[[Any, Any], Any]) -> None:
        """Keep the module's first argument (None if it has none without a name) and what it gives.

        What `keep` returns, unless None, is given in its place.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return keep(args[0] if args else None, out)

        self._handles.append(module.register_forward_hook(hook))

    def __enter__(self) -> "Hooks":
        """Itself, in evaluation mode from here on."""
        for module in self._training:
            module.training = False
        for tensor in self._learning:
            tensor.requires_grad_(False)
        return self

    def __exit__(self, *error: object) -> None:
        """Undo."""
        for handle in self._handles:
            handle.remove()
        for module in self._training:
            module.training = True
        for tensor in self._learning:
            tensor.requires_grad_(True)


def freeze(weights: CircuitWeights, tokens: Tensor, mask: Tensor | None, seen: Recording) -> FrozenTrace:
    """The frozen run of a recorded forward pass: a layer's non-head writes are what it adds beyond its heads.

    Libraries compute norms and softmax in fp32 whatever the model's dtype, and what such rounding makes the heads
    write is a non-head write like any other; so the sum of all paths is the model's own logits, not nearly so. Anything
    beyond rounding is an error: then the weights, read through the patterns, are not what the model computes.

    Raises:
        RuntimeError: what the heads write, or what the final norm gives, is not the model's, or not finite there.
    """
    assert seen.forward is not None
    dtype = weights.compute_dtype
    streams = [stream.to(dtype) for stream in seen.streams]
    model = FrozenModel(
        guard=ModelGuard.of(weights, seen.forward),
        patterns=tuple(pattern.to(dtype) if isinstance(pattern, Tensor) else pattern for pattern in seen.patterns),
        scales=torch.stack([norm_scale(stream, weights) for stream in streams]),
        post_scales=torch.stack([norm_scale(x.to(dtype), weights) for x in seen.attended]) if seen.attended else None,
    )
    if mask is None or weights.positional != "standard":  # some models shift added positions by the padding
        _check("the embedding gives", embedded(tokens, weights), seen.streams[0], mask)
    written = [model.attend(stream, layer) for layer, stream in enumerate(streams[:-1])]
    for layer, mine in enumerate(written):
        bias = model.apply_post_norm(weights.written_bias(layer).expand_as(mine), layer)
        _check(f"the heads of layer {layer} write", mine + bias, seen.written[layer], mask)
    final = streams[-1] + _final_rounding(model, streams[-1], seen, mask)
    ends = [*streams[1:-1], final][: len(written)]
    non_heads = (after - before - mine for before, after, mine in zip(streams[:-1], ends, written, strict=True))
    return FrozenTrace(
        **vars(model),
        tokens=tokens,
        embedded=streams[0] if written else final,
        non_head_writes=tuple(non_heads),
        final=final,
        mask=mask,
        forward=seen.forward,
    )


def _final_rounding(model: FrozenModel, final: Tensor, seen: Recording, mask: Tensor | None) -> Tensor:
    """The rounding of the final norm, as a change of its input that would make it, [B, T, d]."""
    weights, normed = model.weights, seen.streams[-1] if seen.normed is None else seen.normed
    mine = model.normed(final, weights.n_layers)
    bias = 0 if weights.ln_final_b is None else weights.ln_final_b.to(mine.dtype)
    _check("the final norm gives", mine + bias, normed, mask)
    if weights.norm != "rmsnorm":  # torch's layernorm rounds as ours does
        return torch.zeros_like(mine)
    gain = torch.ones_like(mine[0, 0]) if weights.ln_final_w is None else weights.ln_final_w.to(mine.dtype)
    factor = model.scales[-1][..., None] * gain
    return torch.where(factor != 0, (normed.to(mine.dtype) - mine) / factor, 0)


def _check(what: str, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> None:
    """Half of the digits of the coarser of the model's dtype and fp32 must agree where tokens are real."""
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    digits = max(torch.finfo(theirs.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    error, size = (ours - theirs.to(ours.dtype)).abs().max(), theirs.abs().max().to(ours.dtype)
    if not size.isfinite():
        raise RuntimeError(f"what {what} is not finite in the model's own run")
    if not error <= digits * size:
        raise RuntimeError(
            f"what {what} by the weights differs from the model's by {float(error):.3g}, where the largest is "
            f"{float(size):.3g}: something in this model is not what its configuration says"
        )
