"""TransformerLens models, both HookedTransformer (up to 3.9) and TransformerBridge (from 4), by what they offer.

Whatever processing a model was loaded with (folded norms, centred weights) is in its weights and in its own run.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyfastcircuits.adapters.attention import attending, eager
from pyfastcircuits.adapters.forward import Layer, ModelForward, layers_of, watch
from pyfastcircuits.adapters.lens_weights import Source, logit_scale, original, weights_of
from pyfastcircuits.adapters.products import Products, Reached
from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.adapters.tokens import Tokens, checked_positions
from pyfastcircuits.model.norms import normalized
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import MLPReads
from pyfastcircuits.run.patterns import QKPattern

__all__ = ["record", "weights_of"]


def record(model: Any, weights: CircuitWeights, given: Tokens, store: str = "patterns") -> Recording:
    """Record one forward pass of the model, with its logits at a few positions. Padding shifts positions, as always."""
    if given.chosen:
        raise ValueError(f"position_ids is given, but {type(model).__name__} takes none")
    _check_positions(model, given)
    source, seen = Source.of(model), Recording(model=model, logit_positions=checked_positions(given))
    norms = [source.head_norms(attention) for attention in source.attentions]
    options: dict[str, Any] = {} if given.mask is None else {"attention_mask": given.mask.long()}
    if hasattr(model, "original_model"):
        options["use_cache"] = False
    with torch.no_grad(), Hooks(model) as hooks, _eager(source), _few_rows(model.unembed, seen.logit_positions):
        for block, head_norms in zip(model.blocks, norms, strict=True):
            _watch_layer(hooks, seen, source, block, head_norms, store)
        _watch_end(hooks, seen, source)
        seen.logits = model(given.tokens, return_type="logits", **options)
    _check_run(seen, given)
    scale = logit_scale(source)
    seen.normed = seen.normed if scale == 1 or seen.normed is None else seen.normed * scale
    seen.names = _names(model)
    modules = [(block, block.attn, own) for block, own in zip(model.blocks, norms, strict=True)]
    scaled = source.family is not None and source.family.scales_queries
    layers = layers_of(seen, weights, modules, [{"scaling": 1.0} if scaled else {}] * len(modules))
    dtype = seen.streams[0].dtype
    adds = source.family is not None and source.family.adds_residual
    forward = TransformerLensForward(model, weights, layers, dtype, len(given.tokens), given.mask, adds_residual=adds)
    if store == "qk":
        seen.patterns = [forward.pattern(layer, seen.streams[layer]) for layer in range(len(layers))]
    seen.forward = forward
    return seen


def _watch_layer(hooks: Hooks, seen: Recording, source: Source, block: Any, head_norms: Any, store: str) -> None:
    watch(hooks, seen, block, block.attn, head_norms)
    hooks.after(block.hook_resid_pre, lambda _, out: seen.streams.append(out))
    if store == "patterns":
        hooks.after(block.attn.hook_pattern, lambda _, out: seen.patterns.append(out))
    norm, adds_residual = source.post_norm(block), source.family is not None and source.family.adds_residual
    if norm is not None:
        hooks.before(norm, lambda x, _: seen.attended.append(x))
    if source.family is None:
        hooks.after(block.hook_attn_out, lambda _, out: seen.written.append(out))
    elif norm is not None:
        hooks.after(norm, lambda _, out: seen.written.append(out))
    else:  # a bridge's own hook is scaled, and not called where nothing listens

        def keep(_: Any, out: Any) -> None:
            written = out[0] if isinstance(out, tuple) else out
            seen.written.append(written - seen.streams[-1] if adds_residual else written)

        hooks.after(block.attn, keep)


def _watch_end(hooks: Hooks, seen: Recording, source: Source) -> None:
    """Keep the last stream and what the final norm gives."""
    model, count = source.model, len(source.model.blocks)

    def keep_last(_: Any, out: Tensor) -> None:
        seen.streams[count:] = [out]  # every block's end, until the last one's

    hooks.after(model.blocks[-1].hook_resid_post, keep_last)
    if source.normed:
        hooks.after(model.ln_final, lambda _, out: setattr(seen, "normed", out))


def _eager(source: Source) -> AbstractContextManager[None]:
    """Let a bridge's Hugging Face model make masks that leave no row of padding NaN."""
    if source.family is None:
        return nullcontext()
    return attending(source.model.original_model.config, eager, "transformers", masked=True)


@contextmanager
def _few_rows(unembed: torch.nn.Module, positions: list[int]) -> Iterator[None]:
    """Let an unembedding read some positions alone."""
    uncopied = _Uncopied(unembed)

    def enter(_: torch.nn.Module, args: Any) -> Any:
        uncopied.__enter__()
        return args[0][:, positions], *args[1:]

    def leave(*_: Any) -> None:
        uncopied.__exit__(None, None, None)

    handles = (
        unembed.register_forward_pre_hook(enter),
        unembed.register_forward_hook(leave, prepend=True, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Uncopied(TorchFunctionMode):
    """Within it a HookedTransformer does not copy W_U whole, which takes longer than to apply it to a few rows."""

    def __init__(self, unembed: torch.nn.Module) -> None:
        super().__init__()
        held = getattr(unembed, "W_U", None)
        self._start = held.data_ptr() if isinstance(held, Tensor) else None

    def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch."""
        if called is Tensor.contiguous and args[0].dim() == 2 and args[0].data_ptr() == self._start:
            return args[0]
        return called(*args, **(kwargs or {}))


def _check_positions(model: Any, given: Tokens) -> None:
    """Raise ValueError where the model counts other positions than the trace: behind padding between real tokens."""
    if given.mask is None:
        return
    counted = (given.mask.cumsum(1) - 1).expand_as(given.tokens)
    if not torch.equal(counted[given.mask], given.positions.expand_as(given.tokens)[given.mask]):
        raise ValueError(
            f"mask has zeros between real tokens, which {type(model).__name__} leaves out as it counts positions: put "
            "padding in front of a sequence or behind it"
        )


def _check_run(seen: Recording, given: Tokens) -> None:
    """Raise ValueError unless the layers ran as listed, each once, and on the tokens that the trace takes as real."""
    ran, listed = [id(block) for block in seen.ran], [id(block) for block in seen.model.blocks]
    if ran != listed or len(seen.attentions) != len(listed):
        raise ValueError(
            f"model ran {len(ran)} layers and {len(seen.attentions)} attentions, but has {len(listed)} blocks, or ran "
            "them in another order: a trace needs each of model.blocks to run once"
        )
    own = seen.blocks[0].kwargs.get("attention_mask")
    if given.mask is None and own is not None and own.dim() == 2 and not own.all():
        raise ValueError(
            "mask is None or all ones, but the model's tokenizer pads on the left, and the model hides the padding "
            "that it finds in tokens: give the mask that says which tokens are real"
        )


def _names(model: Any) -> dict[str, str]:
    """The modules that make what is checked."""
    held = dict(model.named_modules())
    names = {f"heads of layer {layer}": f"blocks.{layer}" for layer in range(len(model.blocks))}
    names["embedding"] = ", ".join(n for n in ("embed", "hook_embed", "pos_embed", "hook_pos_embed") if n in held)
    return names | {"final norm": "ln_final", "logits": "unembed"}


@dataclass(frozen=True, eq=False)
class TransformerLensForward(ModelForward):
    """The Forward through TransformerLens' attention.

    Its scores and its mixtures of values are its only products of two activations, and are caught there.
    """

    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ModelForward."""
        values: list[Tensor] = []
        with Hooks(layer.attention) as hooks:
            hooks.after(_values(layer.attention), lambda _, out: values.append(out))
            q, keys = self._until(Products(1), layer, read)
        heads, kv = q.shape[1], self.weights.W_K.shape[1]
        v = values[0].view(*read.shape[:2], -1, self.weights.d_value).transpose(1, 2)
        return q, keys.mT[:, :: heads // kv], v[:, :: v.shape[1] // kv]

    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ModelForward."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        read = q.new_zeros(*v.shape[:1], v.shape[2], self.weights.d_model, dtype=self.dtype)
        pattern, _ = self._until(Products(2, q, k.mT), layer, read)
        return pattern.to(v.dtype) @ v

    @property
    def places_alike(self) -> bool:
        """See Forward: queries and keys are caught before anything is added to their products."""
        own = ("standard",) if hasattr(self.model, "original_model") else ("none", "standard")
        return self.weights.positional in own

    def mlp_reads(self, layer: int) -> MLPReads | None:
        """See Forward."""
        return None if getattr(self.model.cfg, "attn_only", False) else super().mlp_reads(layer)

    def pattern(self, layer: int, stream: Tensor) -> QKPattern:
        """A layer's patterns in the clean run, whose residual stream [B, T, d] before it is given.

        Raises:
            ValueError: patterns that a QKPattern does not express.
        """
        cfg, own = self.model.cfg, self.layers[layer].attention
        if cfg.positional_embedding_type == "alibi":
            raise ValueError("store is 'qk', but positional_embedding_type is 'alibi': its patterns must be kept")
        native = original(own)
        window = cfg.window_size if getattr(own, "attn_type", None) == "local" else None
        for holder in (getattr(native, "config", None), native):  # of all layers, or of some
            window = getattr(holder, "sliding_window", window)
        cap = getattr(native, "attn_logit_softcapping", getattr(cfg, "attn_scores_soft_cap", None))
        stream, sinks = stream.to(self.weights.compute_dtype), self.weights.sinks
        q, k, _ = self.qkv(layer, normalized(stream, self.weights)[None])
        shape = (window, cap if cap and cap > 0 else None, None if sinks is None else sinks[layer].to(q.dtype))
        return QKPattern.of(q[0], k[0], self.score_scale(layer), self.mask, *shape)

    def _until(self, products: Products, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor]:
        """Run an attention on [N * B, T, d] up to the product that `products` stops at, and give its two factors."""
        shift = layer.block_call.kwargs.get("shortformer_pos_embed")
        placed = read if shift is None else read + shift
        try:
            with _one_input(self.model.cfg), products:
                if hasattr(layer.attention, "original_component"):  # a TransformerBridge's
                    layer.attention_call(layer.attention, read)
                else:
                    given = layer.attention_call.kwargs
                    layer.attention(query_input=placed, key_input=placed, value_input=read, **given)
        except Reached as reached:
            return reached.factors[-1]
        raise RuntimeError(f"{type(layer.attention).__name__} makes no product of queries and keys")


@contextmanager
def _one_input(cfg: Any) -> Iterator[None]:
    """Let attention take one input for all its heads."""
    split = [name for name in ("use_split_qkv_input", "use_attn_in") if getattr(cfg, name, False)]
    try:
        for name in split:
            setattr(cfg, name, False)
        yield
    finally:
        for name in split:
            setattr(cfg, name, True)


def _values(attention: Any) -> Any:
    """The module whose output is the values, with or without a dimension of heads."""
    return attention.v if hasattr(attention, "original_component") else attention.hook_v
