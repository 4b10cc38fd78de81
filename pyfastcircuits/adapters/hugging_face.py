"""Hugging Face causal language models in memory: their weights as views, and one forward pass recorded by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family
from pyfastcircuits.adapters.recording import Hooks, Recording
from pyfastcircuits.weights import CircuitWeights

__all__ = ["FAMILIES", "family_of", "read_checkpoint", "record", "weights_of"]

FAMILIES = ("gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # config.model_type, a module each


def family_of(model_type: str | None, where: str) -> Family:
    """The adapter of a family.

    Raises:
        ValueError: a family that has none.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    family: Family = import_module(f"pyfastcircuits.adapters.{model_type}").FAMILY
    return family


def read_checkpoint(family: Family, checkpoint: Checkpoint) -> CircuitWeights:
    """The weights of a checkpoint of the family. Not those of its MLPs: `attention_only` is False."""
    checkpoint.refuse("quantization_config", "quantized weights are not supported")
    return CircuitWeights(**family.read(checkpoint), attention_only=False)


def weights_of(model: Any) -> CircuitWeights:
    """Views of the weights of a model in memory; errors as CircuitWeights.from_model."""
    where, config = type(model).__name__, model.config.to_dict()
    family = family_of(config.get("model_type"), where)
    if not hasattr(model, family.body):
        raise ValueError(f"{where} has no {family.body!r}: expected the family's causal language model")
    tensors = {name: lambda tensor=tensor: tensor for name, tensor in model.state_dict().items()}
    return read_checkpoint(family, Checkpoint(where, config, tensors, family.body))


def record(model: Any, tokens: Tensor, mask: Tensor | None) -> Recording:
    """One forward pass of the model below its output embedding."""
    family = family_of(model.config.model_type, type(model).__name__)
    body = model.get_submodule(family.body)
    layers = list(body.get_submodule(family.layers))
    seen = Recording([], [], [], [], tokens)
    with _eager(model), Hooks(model) as hooks:
        for layer in layers:
            hooks.before(layer, seen.streams.append)
            hooks.after(layer.get_submodule(family.attention), lambda _, out: _keep_attention(out, seen))
            if family.post_norm is not None:
                hooks.after(layer.get_submodule(family.post_norm), lambda x, out: _keep_post_norm(x, out, seen))
        norm = body.get_submodule(family.final_norm)
        hooks.before(norm, seen.streams.append)
        hooks.after(norm, lambda _, out: setattr(seen, "normed", out))
        body(input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False)
    return seen


def _keep_attention(out: tuple[Tensor, Tensor | None], seen: Recording) -> None:
    written, pattern = out
    if pattern is None:
        raise RuntimeError("the model's attention gave no pattern, though it was told to be eager")
    seen.written.append(written)
    seen.patterns.append(pattern)


def _keep_post_norm(attended: Tensor, written: Tensor, seen: Recording) -> None:
    seen.attended.append(attended)
    seen.written[-1] = written


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """With attention that gives its patterns."""
    implementation = model.config._attn_implementation
    try:
        if implementation != "eager":
            model.set_attn_implementation("eager")
        yield
    finally:
        if implementation != "eager":
            model.set_attn_implementation(implementation)
