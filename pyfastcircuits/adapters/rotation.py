"""Rotary positions as the model made them: its modules' frequencies, or those of its configuration on disk."""

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family

CHANGING = {"dynamic": "original_max_seq_len", "longrope": "original_max_position_embeddings"}


def rotation(family: Family, c: Checkpoint, r: int) -> dict[str, Any]:
    """The rotary arguments of CircuitWeights.

    Frequencies that depend on the length of a sequence are those of short ones, and `rotary_length` says how short.
    """
    module = c.module(f"{family.body}.rotary_emb")
    settings = dict(c.config) | dict(c.option("rope_scaling", {})) | dict(c.option("rope_parameters", {}))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if module is not None and not any(name.endswith("inv_freq") for name, _ in module.named_buffers()):
        module = None  # GPT-J keeps a table of angles
    if module is not None:
        found = _of_module(family, c, module)
    elif kind == "default" and not family.scaled_rotary:
        found = _default(family, c, settings, r), 1.0, None
    else:
        found = _by_transformers(family, c)
    frequencies, scale, length = found
    if isinstance(frequencies, list) or not all(family.rotates(c, layer) for layer in range(c.n_layers)):
        each = frequencies if isinstance(frequencies, list) else [frequencies] * c.n_layers
        each = [x if family.rotates(c, layer) else torch.zeros_like(x) for layer, x in enumerate(each)]
        frequencies = torch.stack(each)
    out: dict[str, Any] = {"positional": "rotary", "rotary_pairs": family.rotary_pairs, "rotary_length": length}
    return out | {"rotary_frequencies": frequencies, "rotary_scale": scale}


Found = tuple[Tensor | list[Tensor], float, int | None]


def _default(family: Family, c: Checkpoint, settings: dict[str, Any], r: int) -> Tensor:
    share = settings.get("partial_rotary_factor", settings.get("rotary_pct", family.rotary_share))
    width = c.option("qk_rope_head_dim", None) or c.option("rotary_dim", int(r * share))
    base = float(settings.get("rope_theta", settings.get("rotary_emb_base", family.rotary_base)))
    device = None if c.model is None else next(c.model.parameters()).device
    frequencies: Tensor = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    return frequencies


def _of_module(family: Family, c: Checkpoint, module: Any) -> Found:
    """From buffers `inv_freq`, or `<kind of layer>_inv_freq` where layers differ."""
    if hasattr(module, "inv_freq"):
        return _one(module, "")
    kinds = c.option("layer_types")
    each = [_one(module, f"{kinds[layer]}_") for layer in range(c.n_layers)]
    scales = {scale for _, scale, _ in each}
    if len(scales) > 1:
        raise ValueError(f"{c.where}: attention factors of its rotary embeddings differ between layers: {scales}")
    lengths = [length for _, _, length in each if length is not None]
    return [own for own, _, _ in each], scales.pop(), min(lengths, default=None)


def _one(module: Any, prefix: str) -> tuple[Tensor, float, int | None]:
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
    changes = next((attribute for name, attribute in CHANGING.items() if name in str(kind)), None)
    name = "inv_freq" if changes is None else "original_inv_freq"
    held = getattr(module, prefix + name, None)
    frequencies: Tensor = getattr(module, prefix + "inv_freq") if held is None else held
    length = None
    if changes is not None:
        parameters = getattr(module.config, "rope_parameters", None) or {}
        parameters = parameters.get(prefix.rstrip("_"), parameters)
        length = getattr(module, changes, None) or parameters.get(changes) or module.config.max_position_embeddings
    scale = getattr(module, prefix + "attention_scaling", 1.0)
    return frequencies.detach().float(), float(scale), None if length is None else int(length)


def _by_transformers(family: Family, c: Checkpoint) -> Found:
    """As the module says that transformers makes of the configuration."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"{c.where}: its rotary positions are scaled, and reading that needs transformers: "
            "pip install 'pyfastcircuits[hf]'"
        ) from error
    config = AutoConfig.for_model(**c.config)
    model = AutoModelForCausalLM._model_mapping[type(config)]
    kinds = vars(sys.modules[model.__module__]).items()
    rotary = next(kind for name, kind in kinds if name.endswith("RotaryEmbedding"))
    return _of_module(family, replace(c, config=config.to_dict()), rotary(config))
