"""A local folder as Hugging Face keeps models: config.json, safetensors in one file or in shards, a tokenizer.

Weights are read without transformers, by what the configuration says, and stay memory-mapped: only what is used is
ever read. A model that can run is made by transformers. Nothing is downloaded and no pickle is opened.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.hugging_face import family_of, read_checkpoint
from pyfastcircuits.model.weights import PICKLES, CircuitWeights, open_safetensors

__all__ = ["is_folder", "model_in", "weights_in"]

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


def is_folder(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / _CONFIG).is_file()


def weights_in(folder: Path) -> CircuitWeights:
    """Views of the memory-mapped files; `attention_only` is False.

    Raises:
        FileNotFoundError: no weights, or a shard that is missing.
        ValueError: weights in pickles alone; files that are corrupt; a family, an option, tensors or shapes that do not
            fit, each named.
    """
    config = _read_json(folder / _CONFIG)
    family = family_of(config.get("model_type"), str(folder))
    return read_checkpoint(family, Checkpoint(str(folder), config, _tensors(folder), family.body))


def model_in(folder: Path, dtype: torch.dtype) -> Any:
    """The model itself, by transformers, with eager attention and in evaluation mode.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError, ValueError: as weights_in; tensors that are missing in the parts that it does not read.
    """
    weights_in(folder)  # transformers would make up what is missing
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("running this model needs transformers: pip install 'pyfastcircuits[hf]'") from error
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    missing = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if missing:
        raise ValueError(f"{folder} has no tensor {missing[0]!r}, which its configuration asks for")
    return model.eval()


def _tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Every tensor of the folder by name, not read yet."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in _files(folder):
        opened = open_safetensors(file)
        found |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.exists():
        names = [_SINGLE]
    else:
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{index} has no 'weight_map'")
        names = sorted({str(name) for name in placed.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of the folder")
        if not (folder / name).is_file():
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
            if pickles and names == [_SINGLE]:
                raise ValueError(
                    f"{folder} has its weights in a pickle ({pickles[0]}), and loading one runs code; convert it to "
                    "safetensors"
                )
            raise FileNotFoundError(f"{folder / name} is missing")
    return [folder / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content
