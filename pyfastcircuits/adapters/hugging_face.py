"""Hugging Face causal language models in memory: their weights as views, and one forward pass recorded by hooks."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.attention import Made, attending, eager, plain, stop, tiled
from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.families import FAMILIES
from pyfastcircuits.adapters.family import Family, Interface
from pyfastcircuits.adapters.forward import Layer, ModelForward, layers_of, watch
from pyfastcircuits.adapters.module_tensors import ModuleTensors
from pyfastcircuits.adapters.observed import observed, text_config
from pyfastcircuits.adapters.products import Products, Reached
from pyfastcircuits.adapters.reading import read_checkpoint
from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.adapters.tokens import Tokens, checked_positions
from pyfastcircuits.model.weights import CircuitWeights


def weights_of(model: Any) -> CircuitWeights:
    """The weights of a model in memory, as views where its modules apply what they hold; errors as from_model."""
    family, checkpoint = family_and_checkpoint(model)
    return read_checkpoint(family, checkpoint)


def family_and_checkpoint(model: Any) -> tuple[Family, Checkpoint]:
    """The description of a model's family, and the model as a checkpoint.

    Raises:
        ValueError: a model that gives no next-token logits, or of a family that is not supported.
    """
    refuse_encoder(model)
    where, config = type(model).__name__, text_config(model).to_dict()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    known = FAMILIES.get(config.get("model_type"))
    if known is not None and _submodule(model, f"{known.body}.{known.layers}") is None:
        known = None  # the text model of one that sees images too
    if head is None:
        raise ValueError(
            f"{where} gives no next-token logits: expected the family's causal language model, with an output embedding"
        )
    family, sizes = (known, {}) if known is not None else observed(model)
    config |= sizes
    layers = _submodule(model, f"{family.body}.{family.layers}")
    count = len(layers) if layers is not None else 0
    configured = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), None)
    if configured is not None:  # a model runs as many of its layers as are configured
        config[configured] = min(int(config[configured]), count)
    return family, Checkpoint(where, config, ModuleTensors(model), family.body, model)


def refuse_encoder(model: Any) -> None:
    """Raise ValueError for a model whose attention is not causal."""
    config = model.config.to_dict()
    if config.get("is_encoder_decoder") or "MaskedLM" in type(model).__name__:
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits: it is an encoder, and its attention is not causal"
        )


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def record(model: Any, weights: CircuitWeights, given: Tokens, store: str = "patterns") -> Recording:
    """Record one forward pass of the model, with its logits at a few positions."""
    family, checkpoint = family_and_checkpoint(model)
    if store == "qk" and family.interface != "transformers":
        raise ValueError(
            f"store is 'qk', but {type(model).__name__} makes its patterns itself, and not through transformers' "
            "attention interface: they must be kept"
        )
    body = model.get_submodule(family.body)
    layers = list(body.get_submodule(family.layers))[: checkpoint.n_layers]
    parts = [LayerParts.of(family, layer) for layer in layers]
    seen, options = Recording(model=model), []
    kept = tiled(given.mask) if store == "qk" else plain if family.interface == "sdpa" else eager

    def attend_and_keep(module: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, **more: Any) -> Any:
        options.append({"attention_mask": hidden, **more})
        out = kept(module, q, k, v, attention_mask=hidden, **more)
        seen.patterns.append(out[1])
        return out

    how = _arguments(model, given)
    through = attending(body.config, attend_and_keep, family.interface, masked=store != "qk")
    with torch.no_grad(), through, Hooks(model) as hooks:
        for part in {part.block: part for part in parts}.values():  # a layer that is used twice is watched once
            _watch_layer(hooks, seen, family, part)
        norm = body.get_submodule(family.final_norm)
        hooks.before(norm, lambda x, _: seen.streams.append(x))
        hooks.after(norm, lambda _, out: setattr(seen, "normed", out))
        logits = model(input_ids=given.tokens, use_cache=False, return_dict=True, **how).logits
    _check_order(seen, parts)
    scale = family.logit_scale(checkpoint)
    seen.normed = seen.normed if scale == 1 or seen.normed is None else seen.normed * scale
    seen.logit_positions = checked_positions(given)
    seen.logits = logits if "logits_to_keep" in how else logits[:, seen.logit_positions]
    seen.names = {
        "embedding": f"{family.body}.{family.embedding}",
        "final norm": f"{family.body}.{family.final_norm}",
        "logits": family.head,
        **{f"heads of layer {i}": family.layer(family.attention).format(i) for i in range(len(layers))},
    }
    options = options or [{}] * len(parts)
    own = layers_of(seen, weights, [(part.block, part.attention, part.head_norms) for part in parts], options)
    if family.latent_norms:
        seen.value_scales = [layer.norms[-1][1].view(given.tokens.shape) for layer in own]
    parts_of_it = (model, weights, own, seen.streams[0].dtype, len(given.tokens), given.mask)
    adds = family.adds_residual
    if family.interface == "products":
        seen.forward = ProductsForward(*parts_of_it, adds_residual=adds)
    else:
        way = (body.config, family.interface, store == "qk")
        seen.forward = HuggingFaceForward(*parts_of_it, *way, adds_residual=adds)
    return seen


@dataclass(frozen=True, eq=False)
class LayerParts:
    """The modules of a layer that a run is recorded from."""

    block: nn.Module
    attention: nn.Module
    head_norms: tuple[nn.Module, ...]
    post_norm: nn.Module | None

    @staticmethod
    def of(family: Family, block: nn.Module) -> "LayerParts":
        """The parts of a layer of a family."""
        attention = block.get_submodule(family.attention)
        names = family.latent_norms or (family.query_norm, family.key_norm)
        norms = [getattr(attention, name, None) for name in names]
        post = None if family.post_norm is None else block.get_submodule(family.post_norm)
        return LayerParts(block, attention, tuple(norm for norm in norms if norm is not None), post)


def _watch_layer(hooks: Hooks, seen: Recording, family: Family, part: LayerParts) -> None:
    watch(hooks, seen, part.block, part.attention, part.head_norms)
    hooks.before(part.block, lambda x, _: seen.streams.append(x))

    def keep_attention(_: Any, out: tuple[Tensor, Any]) -> None:
        written, pattern = out[:2]
        seen.written.append(written - seen.streams[-1] if family.adds_residual else written)
        if family.interface == "products":
            seen.patterns.append(pattern)

    hooks.after(part.attention, keep_attention)
    if part.post_norm is not None:

        def keep_post_norm(attended: Tensor, written: Tensor) -> None:
            seen.attended.append(attended)
            seen.written[-1] = written

        hooks.after(part.post_norm, keep_post_norm)


def _check_order(seen: Recording, parts: list[LayerParts]) -> None:
    """Raise unless the layers ran as they are listed, and each attended once."""
    ran = [id(block) for block in seen.ran]
    if ran != [id(part.block) for part in parts]:
        raise ValueError(
            f"model ran {len(ran)} layers, but has {len(parts)} in its list, or ran them in another order: a trace "
            "needs each layer of the list to run once"
        )
    attended = max(len(seen.attentions), len(seen.patterns))
    if attended != len(parts):
        raise ValueError(
            f"model attended {attended} times in {len(parts)} layers: a forward method has been replaced by one that "
            "runs an attention again or not at all, which a trace does not represent"
        )


def _arguments(model: Any, given: Tokens) -> dict[str, Any]:
    """The arguments of the model's call beside the tokens."""
    known = inspect.signature(model.forward).parameters
    out: dict[str, Any] = {"attention_mask": None if given.mask is None else given.mask.long()}
    if given.placed and "position_ids" in known:
        out["position_ids"] = given.positions.expand_as(given.tokens)
    elif given.chosen:
        raise ValueError(f"position_ids is given, but {type(model).__name__} takes none")
    if "logits_to_keep" in known:
        out["logits_to_keep"] = torch.tensor(checked_positions(given), device=given.tokens.device)
    return out


@dataclass(frozen=True, eq=False)
class HuggingFaceForward(ModelForward):
    """The Forward through transformers' attention interface: a function of ours stands where values are mixed."""

    config: Any  # that the attentions read
    interface: Interface
    tiled: bool  # the clean run worked on tiles and kept no patterns

    @property
    def places_alike(self) -> bool:
        """See Forward."""
        return self.weights.positional == "standard"

    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ModelForward."""
        with attending(self.config, stop, self.interface):
            try:
                layer.attention_call(layer.attention, read)
            except Made as made:
                q, k, v = made.tensors
                kv = self.weights.W_K.shape[1]
                return q, k[:, :: k.shape[1] // kv], v[:, :: v.shape[1] // kv]
        raise RuntimeError(f"{type(layer.attention).__name__} does not call transformers' attention interface")

    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ModelForward."""
        out: Tensor = self._attend(len(q))(layer.attention, q, k, v, **layer.options)[0]
        return out.transpose(1, 2)

    def score_scale(self, layer: int) -> float:
        """See Forward: the factor that is left to the interface, 1 where queries come multiplied by theirs (OPT)."""
        return float(self.layers[layer].options["scaling"])

    def run(self, layer: Layer, stream: Tensor) -> Tensor:
        """See ModelForward."""
        with attending(self.config, self._attend(len(stream)), self.interface):
            return super().run(layer, stream)

    def _attend(self, rows: int) -> Any:
        """The attention function of the clean run, for so many rows of tokens."""
        if not self.tiled:
            return plain if self.interface == "sdpa" else eager
        return tiled(None if self.mask is None else self.mask.repeat(rows // self.batch, 1))


@dataclass(frozen=True, eq=False)
class ProductsForward(ModelForward):
    """The Forward of an attention that calls no interface: it is stopped, and changed, at its products."""

    def made(self, layer: Layer, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ModelForward."""
        (q, keys), (_, v) = self._reached(layer, Products(2), read)
        kv = self.weights.W_K.shape[1]
        q, k, v = (x.reshape(len(read), -1, *x.shape[-2:]) for x in (q, keys.mT, v))
        return q.to(v.dtype), k[:, :: k.shape[1] // kv].to(v.dtype), v[:, :: v.shape[1] // kv]

    def mixed(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ModelForward."""
        read = q.new_zeros(*v.shape[:1], v.shape[2], self.weights.d_model, dtype=self.dtype)
        pattern = self._reached(layer, Products(2, q, k.mT), read)[1][0]
        values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return pattern.reshape(len(q), -1, *pattern.shape[-2:]).to(v.dtype) @ values

    def run(self, layer: Layer, stream: Tensor) -> Tensor:
        """See ModelForward."""
        with attending(self.model.config, None, "products"):
            return super().run(layer, stream)

    def _reached(self, layer: Layer, products: Products, read: Tensor) -> list[tuple[Tensor, Tensor]]:
        try:
            with attending(self.model.config, None, "products"), products:
                layer.attention_call(layer.attention, read)
        except Reached as reached:
            return reached.factors
        raise RuntimeError(f"{type(layer.attention).__name__} makes no product of patterns and values")
