"""The Forward of another library's model: its own modules, called with the arguments of the clean run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.reading import own_eps
from pyfastcircuits.adapters.recording import Call, Hooks, Recording
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run import memory
from pyfastcircuits.run.forward import MLPReads, heads_write

PROVENANCE = ("_name_or_path", "name_or_path", "model_name", "architectures", "transformers_version", "tokenizer_name")


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a model, with the arguments that its modules were called with."""

    block: nn.Module
    attention: nn.Module
    block_call: Call
    attention_call: Call
    norms: tuple[tuple[nn.Module, Tensor], ...]  # of queries and of keys, each with what it multiplied by: [B, rest]
    returned: int | None  # the length of the tuple that the attention returns; None: its write alone
    options: dict[str, Any]  # what an adapter adds

    def mapped(self, batch: int, change: Callable[[Tensor], Tensor]) -> "Layer":
        """With every tensor of the calls, which were of `batch` sequences, changed."""
        return replace(
            self,
            block_call=_mapped(self.block_call, batch, change),
            attention_call=_mapped(self.attention_call, batch, change),
            norms=tuple((norm, change(scale)) for norm, scale in self.norms),
            options=_mapped(self.options, batch, change),
        )


def _mapped(value: Any, batch: int, change: Callable[[Tensor], Tensor], name: str = "") -> Any:
    """Every tensor changed that has a dimension in front of positions; a table of positions alone stays.

    The first dimension of BLOOM's ALiBi [B * H, 1, T] holds the heads of each sequence.
    """
    if isinstance(value, Tensor):
        if name == "alibi" and value.dim() == 3:
            return change(value.unflatten(0, (batch, -1))).flatten(0, 1)
        return change(value) if value.dim() > 1 else value
    if isinstance(value, Call):
        return Call(_mapped(value.args, batch, change), _mapped(value.kwargs, batch, change))
    if isinstance(value, tuple):
        return tuple(_mapped(item, batch, change) for item in value)
    return {n: _mapped(item, batch, change, n) for n, item in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, eq=False)
class ModelForward(ABC):
    """See run.forward.Forward. The N reruns of B sequences go through the model as a batch of N * B."""

    model: Any
    weights: CircuitWeights
    layers: tuple[Layer, ...]
    dtype: torch.dtype  # of the residual stream in the model
    batch: int
    mask: Tensor | None  # [B, T]
    adds_residual: bool = field(default=False, kw_only=True)  # whether what attentions return has the stream in it
    _mlps: dict[int, MLPReads] = field(default_factory=dict, kw_only=True)  # what `mlp_reads` has found

    @abstractmethod
    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N * B, H or Hkv, T, r] of an attention that reads [N * B, T, d]."""

    @abstractmethod
    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z, the mixed values of an attention before its W_O, [N * B, H, T, r]."""

    def run(self, layer: Layer, stream: Tensor) -> Tensor:
        """The residual stream [N * B, T, d] after a layer that reads it."""
        out = layer.block_call(layer.block, stream)
        written: Tensor = out[0] if isinstance(out, tuple) else out
        return written

    @property
    def places_alike(self) -> bool:
        """See Forward."""
        return False

    def score_scale(self, layer: int) -> float:
        """See Forward; some attentions scale queries before they are multiplied."""
        own: float | None = self.layers[layer].options.get("scaling")
        return self.weights.score_scale(layer) if own is None else own

    def qkv(self, layer: int, normed: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """See Forward."""
        weights, own, read = self.weights, self._repeated(layer, len(normed)), normed
        if weights.ln_w is not None:
            read = read * weights.ln_w[layer].to(read.dtype)
        if weights.ln_b is not None:
            read = read + weights.ln_b[layer].to(read.dtype)
        with Hooks(own.attention) as hooks:
            for norm, scale in own.norms if frozen else ():
                hooks.after(norm, partial(self._as_it_was, scale, norm))
            made = self.made(own, read.flatten(0, 1).to(self.dtype))
        q, k, v = (x.to(normed.dtype).unflatten(0, normed.shape[:2]) for x in made)
        return q, k, v

    def apply(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Forward."""
        count = max(len(q), len(k), len(v))
        own = self._repeated(layer, count)
        with Hooks(own.attention):
            out = self.mixed(own, *(x.expand(count, *x.shape[1:]).flatten(0, 1) for x in (q, k, v)))
        return out.reshape(count, self.batch, *out.shape[1:])

    def block(self, layer: int, stream: Tensor, added: Tensor | None = None) -> Tensor:
        """See Forward."""
        own = self._repeated(layer, len(stream))
        with Hooks(own.block) as hooks:
            if added is not None:
                more = added.to(self.dtype).expand(stream.shape).flatten(0, 1)
                hooks.after(own.attention, lambda _, out: _with(out, more))
            out = self.run(own, stream.flatten(0, 1).to(self.dtype))
        return out.to(stream.dtype).view(stream.shape)

    def write(self, layer: int, z: Tensor, added: Tensor | None = None) -> Tensor:
        """See Forward."""
        return heads_write(self.weights, layer, z, added)

    def mlp_reads(self, layer: int) -> MLPReads | None:
        """See Forward. One NaN that heads write stays in its dimension unless an MLP, or its norm, reads it."""
        if layer not in self._mlps:
            stream = torch.zeros(self.batch, 1, self.weights.d_model, dtype=self.dtype, device=self.weights.device)
            written = stream.clone()
            written[0, 0, 0] = torch.nan
            with torch.no_grad():
                after = self._without_attention(layer, stream, written)
            spread = self.weights.ln_post_w is not None or bool(after[0, 0].isnan().all())
            self._mlps[layer] = "after heads" if spread else "before heads"
        return self._mlps[layer]

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """See Forward: what the layer adds to the stream while its heads write nothing. T may be any length."""
        read = stream.flatten(0, 1).to(self.dtype)
        added = self._without_attention(layer, read, torch.zeros_like(read)) - read
        return added.to(stream.dtype).view(stream.shape)

    def _without_attention(self, layer: int, stream: Tensor, written: Tensor) -> Tensor:
        """The stream [N * B, T, d] after a layer whose attention is not run, but gives `written`."""
        own = self._repeated(layer, len(stream) // self.batch)
        own.block_call.kwargs.pop("shortformer_pos_embed", None)  # for attention alone, and of another length
        out: Any = stream + written if self.adds_residual else written
        if own.returned is not None:
            out = (out, *[None] * (own.returned - 1))
        with Hooks(own.block), _instead(own.attention, out):
            return self.run(own, stream)

    def select(self, sequences: slice | Tensor) -> "ModelForward":
        """See Forward."""
        cut = partial(_rows, sequences, self.batch)
        layers = tuple(layer.mapped(self.batch, cut) for layer in self.layers)
        mask = None if self.mask is None else self.mask[sequences]
        return replace(self, layers=layers, batch=len(torch.arange(self.batch)[sequences]), mask=mask)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """See Forward: without the frequencies that rotary modules set anew for each sequence (longrope), because
        reruns have its angles among their arguments.
        """
        buffers = [x for x in self.model.named_buffers() if not x[0].endswith("inv_freq") or "original" in x[0]]
        return (*self.model.named_parameters(), *buffers)

    def options(self) -> Mapping[str, object]:
        """See Forward: the configuration, but for where the model comes from."""
        config = getattr(self.model, "config", None) or self.model.cfg
        options = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        return {name: value for name, value in options.items() if name not in PROVENANCE}

    def _repeated(self, layer: int, count: int) -> Layer:
        """A layer with the arguments of `count` reruns; those that are the same for all sequences stay so."""
        many = self.layers[layer].norms
        own = self.layers[layer].mapped(self.batch, lambda x: _times(x, count) if len(x) == self.batch else x)
        return replace(own, norms=tuple((norm, scale.repeat(count, 1)) for norm, scale in many))

    def _as_it_was(self, scale: Tensor, norm: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The output of a norm of queries or keys for `x`, had it kept the scale of the clean run."""
        own, bias = head_scale(norm, x, self.weights).unsqueeze(-1), getattr(norm, "bias", None)
        ratio = (scale.view(own.shape) / own).to(out.dtype)
        return out * ratio if bias is None else (out - bias) * ratio + bias


def _times(x: Tensor, count: int) -> Tensor:
    """The rows of one sequence or more, again for each of `count` reruns: of one, without a copy."""
    return x.expand(count, *x.shape[1:]) if len(x) == 1 else torch.cat([x] * count)


def _rows(sequences: slice | Tensor, batch: int, x: Tensor) -> Tensor:
    """The rows of some sequences, if each sequence has one."""
    return x[sequences] if len(x) == batch else x


def head_scale(norm: nn.Module, x: Tensor, weights: CircuitWeights) -> Tensor:
    """1/std, or 1/rms, over the last dimension, of a norm of queries or keys."""
    wide = x.to(weights.compute_dtype)
    if weights.qk_norm == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    eps = own_eps(getattr(norm, "norms", [norm])[0])
    return (wide.square().mean(-1) + (weights.qk_eps if eps is None else eps)).rsqrt()


def _with(out: Any, added: Tensor) -> Any:
    """The output of an attention, with something added to its write."""
    return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


@contextmanager
def _instead(module: nn.Module, out: Any) -> Iterator[None]:
    """Let a module give something without running."""
    own = vars(module).get("forward")
    vars(module)["forward"] = lambda *args, **kwargs: out
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def watch(hooks: Hooks, seen: Recording, block: nn.Module, attention: nn.Module, norms: Sequence[nn.Module]) -> None:
    """Record what `layers_of` needs of a layer."""

    def keep_block(stream: Tensor, call: Call) -> None:
        seen.ran.append(block)
        seen.blocks.append(call)
        memory.give_back(stream)

    hooks.before(block, keep_block)
    hooks.before(attention, lambda _, call: seen.attentions.append(call))
    hooks.after(attention, lambda _, out: seen.returned.append(len(out) if isinstance(out, tuple) else None))
    for norm in norms:
        hooks.before(norm, lambda x, _: seen.headed.append(x))


def layers_of(
    seen: Recording,
    weights: CircuitWeights,
    modules: Sequence[tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]],
    options: Sequence[dict[str, Any]],
) -> tuple[Layer, ...]:
    """From a recording and each layer's block, attention, and norms of queries and of keys."""
    batch, read = len(seen.streams[0]), iter(seen.headed)
    out = []
    for (block, attention, norms), block_call, attention_call, returned, own in zip(
        modules, seen.blocks, seen.attentions, seen.returned, options, strict=True
    ):
        scales = tuple((norm, head_scale(norm, next(read), weights).reshape(batch, -1)) for norm in norms)
        out.append(Layer(block, attention, block_call, attention_call, scales, returned, own))
    return tuple(out)
