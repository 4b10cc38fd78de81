"""An adapter records one forward pass of another library's model; here the record becomes a frozen run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.agreement import Agreement
from pyfastcircuits.adapters.tokens import Tokens
from pyfastcircuits.model.norms import centered, embedded, head_norm_scale, norm_scale
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import Forward
from pyfastcircuits.run.model_guard import ModelGuard
from pyfastcircuits.run.patterns import Pattern, stored
from pyfastcircuits.run.trace import FrozenModel, FrozenTrace

SAMPLED, LARGEST = 512, 4  # tokens whose logits are compared
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
    returned: list[int | None] = field(default_factory=list)  # L: the length of the tuple that it gave; None: no tuple
    ran: list[nn.Module] = field(default_factory=list)  # L: the layers, in the order in which they ran
    headed: list[Tensor] = field(default_factory=list)  # what norms of queries and of keys read, in that order
    value_scales: list[Tensor] = field(default_factory=list)  # L, or none; see FrozenModel
    normed: Tensor | None = None  # [B, T, d], what the final norm gives
    logits: Tensor | None = None  # [B, n, V'], the model's own, at some positions
    logit_positions: list[int] = field(default_factory=list)  # n
    forward: Forward | None = None
    model: Any = None
    names: dict[str, str] = field(default_factory=dict)  # of the modules that make what is checked


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


def freeze(weights: CircuitWeights, given: Tokens, seen: Recording) -> FrozenTrace:
    """The frozen run of a recorded forward pass: a layer's non-head writes are what it adds beyond its heads.

    Libraries compute norms and softmax in fp32 whatever the model's dtype, and what such rounding makes the heads
    write is a non-head write like any other; so the sum of all paths is the model's own logits, not nearly so. Anything
    beyond rounding is an error: then the weights, read through the patterns, are not what the model computes.

    Raises:
        RuntimeError: what the embedding gives, the heads write, the final norm gives or the logits are is not the
            model's, or not finite there.
    """
    assert seen.forward is not None
    dtype, mask = weights.compute_dtype, given.mask
    streams = [stream.to(dtype) for stream in seen.streams]
    before_heads = [head_norm_scale(stream, weights) for stream in streams[:-1]]
    model = FrozenModel(
        guard=ModelGuard.of(weights, seen.forward),
        patterns=tuple(pattern.to(dtype) if isinstance(pattern, Tensor) else pattern for pattern in seen.patterns),
        scales=torch.stack([*before_heads, norm_scale(streams[-1], weights)]),
        post_scales=torch.stack([norm_scale(x.to(dtype), weights) for x in seen.attended]) if seen.attended else None,
        value_scales=torch.stack([x.to(dtype) for x in seen.value_scales]) if seen.value_scales else None,
        final_shift=None,
    )
    _check_causal(model.patterns, mask, type(seen.model).__name__)
    agree = Agreement(seen.model, mask)
    agree("embedding", "gives", embedded(given.tokens, weights, given.positions), seen.streams[0], seen.names)
    written = [model.attend(stream, layer) for layer, stream in enumerate(streams[:-1])]
    for layer, mine in enumerate(written):
        whole = mine + _written_biases(model, layer, mine)
        theirs = seen.written[layer] if weights.write_scale == 1 else seen.written[layer] * weights.write_scale
        agree(f"heads of layer {layer}", "write", whole, theirs, seen.names)
    rounding = _final_rounding(model, streams[-1], seen, agree)
    final = streams[-1] + centered(rounding, weights)
    if weights.norm == "layernorm" and dtype == torch.float64:
        gain = 1 if weights.ln_final_w is None else weights.ln_final_w.to(dtype)
        shift = (rounding - centered(rounding, weights)) * model.scales[-1][..., None] * gain
        model = replace(model, final_shift=shift)
    if seen.logits is not None:
        _check_logits(model, final, seen, Agreement(seen.model, mask))
    ends = [*streams[1:-1], final][: len(written)]
    non_heads = (after - before - mine for before, after, mine in zip(streams[:-1], ends, written, strict=True))
    return FrozenTrace(
        **vars(model),
        tokens=given.tokens,
        embedded=streams[0] if written else final,
        non_head_writes=tuple(non_heads),
        final=final,
        mask=mask,
        forward=seen.forward,
    )


def _check_causal(patterns: tuple[Pattern, ...], mask: Tensor | None, where: str) -> None:
    """Raise ValueError if the first token of a sequence attends to later ones."""
    for layer, pattern in enumerate(patterns):
        if isinstance(pattern, Tensor):
            later = pattern[:, :, 0, 1:] if mask is None else pattern[mask[:, 0], :, 0, 1:]
            if (later > 0).any():
                raise ValueError(f"{where}: attention of layer {layer} is not causal, and such is not supported")


def _written_biases(model: FrozenModel, layer: int, like: Tensor) -> Tensor:
    """What the biases of a layer's heads write, [B, T, d]."""
    weights = model.weights
    if weights.sinks is None:
        return model.apply_post_norm(weights.written_bias(layer).expand_as(like), layer)
    shares = stored(model.patterns[layer]).sum(-1)  # [B, H, T]: less than 1
    written = torch.einsum("bht,hd->btd", shares, weights.head_biases(layer))
    bias = weights.b_O
    return model.apply_post_norm(written if bias is None else written + bias[layer].to(written.dtype), layer)


def _check_logits(model: FrozenModel, final: Tensor, seen: Recording, agree: Agreement) -> None:
    """Compare the logits of a few positions: of the tokens with the largest ones, and of some of the vocabulary.

    They are so few that this costs a small part of the model's own product with W_U.
    """
    assert seen.logits is not None
    weights, where = model.weights, seen.logit_positions
    largest = seen.logits.topk(min(LARGEST, weights.d_vocab_out)).indices.flatten()
    some = torch.arange(0, weights.d_vocab_out, max(1, weights.d_vocab_out // SAMPLED), device=largest.device)
    tokens = torch.cat((some, largest)).unique()
    rows, bias, cap = model.read_by_unembedding(final)[:, where], weights.unembed_bias(tokens), weights.logit_cap
    logits = rows @ weights.W_U.mT[tokens].mT.to(rows.dtype)
    logits = logits if bias is None else logits + bias
    agree.mask = None if agree.mask is None else agree.mask[:, where]
    capped = logits if cap is None else cap * (logits / cap).tanh()
    agree("logits", "are", capped, seen.logits[..., tokens], seen.names)


def _final_rounding(model: FrozenModel, final: Tensor, seen: Recording, agree: "Agreement") -> Tensor:
    """The rounding of the final norm, as a change of its input that would make it, [B, T, d]."""
    weights, normed = model.weights, seen.streams[-1] if seen.normed is None else seen.normed
    mine = model.normed(final, weights.n_layers)
    bias = 0 if weights.ln_final_b is None else weights.ln_final_b.to(mine.dtype)
    agree("final norm", "gives", mine + bias, normed, seen.names)
    gain = torch.ones_like(mine[0, 0]) if weights.ln_final_w is None else weights.ln_final_w.to(mine.dtype)
    factor = model.scales[-1][..., None] * gain
    return torch.where(factor != 0, (normed.to(mine.dtype) - bias - mine) / factor, 0)
