"""Models on disk: the bundled ones, safetensors files of CircuitWeights, and local folders of Hugging Face models.

Such a folder holds config.json, safetensors in one file or in shards, and perhaps a tokenizer. Its weights are read
without transformers, by what the configuration says, and stay memory-mapped: only the tensors that are used are ever
read. Nothing is downloaded, and no pickle is opened, because loading one runs code.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyfastcircuits.adapters.checkpoint import Checkpoint, Entry
from pyfastcircuits.adapters.families import family_of
from pyfastcircuits.adapters.reading import read_checkpoint
from pyfastcircuits.arguments import describe, public
from pyfastcircuits.model.weights import METADATA, CircuitWeights

BUNDLED = ("bigram-0l", "skip-trigram-1l", "induction-2l", "deep-4l")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


@public
def load_weights(name_or_path: str | Path) -> CircuitWeights:
    """Weights of a bundled model, or of a safetensors file or folder.

    Bundled are "bigram-0l", "skip-trigram-1l", "induction-2l" and "deep-4l", of zero to four layers. The last comes
    with the source, not with wheels.

    A folder is one that CircuitWeights.save has written to, or one of a Hugging Face model, whose files stay
    memory-mapped. Of such a model only the circuits are read; `trace` needs the model itself. Weights keep the dtype of
    their file; float16, which no kernel computes in, becomes float32.

    Raises:
        FileNotFoundError: there is no such model, or a shard of it is missing.
        OSError: a file cannot be read.
        ValueError: a file is corrupt, or a pickle (which is never opened); tensors are missing, extra or do not fit; a
            Hugging Face family or option is not supported. Each is named.
        ImportError: the safetensors package is missing.
    """
    with _naming(name_or_path):
        path = Path(name_or_path)
        if _is_hugging_face(path):
            return _weights_in(path)
        return _weights_of(_files(name_or_path)[0])


def _weights_of(file: Path) -> CircuitWeights:
    """What CircuitWeights.save has written."""
    opened = _open_safetensors(file)
    metadata = opened.metadata() or {}
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    tensors = {name: x.float() if x.dtype == torch.float16 else x for name, x in tensors.items()}
    if METADATA not in metadata:
        raise ValueError(
            f"{file} holds no '{METADATA}' metadata: it was not written by CircuitWeights.save (a Hugging Face model "
            "is loaded by its folder)"
        )
    try:
        options = json.loads(metadata[METADATA])
        if not isinstance(options, dict):
            raise ValueError(f"its options are {describe(options)}, expected an object")
        return CircuitWeights(**(tensors | options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold a CircuitWeights: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} does not hold a CircuitWeights: its metadata is nested too deeply") from None


def load_model(name_or_path: str | Path, dtype: torch.dtype) -> Any:
    """A model that `trace` can run: CircuitWeights, or of a Hugging Face folder the model itself.

    Transformers makes the latter, with eager attention and in evaluation mode.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError, ValueError: as load_weights; tensors are missing beside those of the circuits.
    """
    weights, folder = load_weights(name_or_path), Path(name_or_path)
    if not _is_hugging_face(folder):
        return weights.to(
            dtype
        )  # of a Hugging Face model they are read all the same: transformers makes up missing ones
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("running this model needs transformers: pip install 'pyfastcircuits[hf]'") from error
    with _naming(name_or_path):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, attn_implementation="eager",
            output_loading_info=True,
        )  # fmt: skip
        missing = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
        if missing:
            raise ValueError(f"{folder} has no tensor {missing[0]!r}, which its configuration asks for")
    return model.eval()


@contextmanager
def _naming(name_or_path: str | Path) -> Iterator[None]:
    """Name the argument in errors of the files that it leads to."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        kind = next((x for x in (FileNotFoundError, OSError) if isinstance(error, x)), ValueError)
        reason = f"it cannot be read ({error.strerror})" if isinstance(error, OSError) and error.strerror else error
        raise kind(f"name_or_path is {describe(str(name_or_path))}: {reason}") from error


def model_files(name_or_path: str | Path) -> list[Path]:
    """The files that a model is read from: its weights; its configuration and tokenizer, where there are such.

    Raises:
        FileNotFoundError, OSError, ValueError: as load_weights.
    """
    with _naming(name_or_path):
        beside = (_folder(name_or_path) / name for name in (_CONFIG, "tokenizer.json"))
        return [*_files(name_or_path), *(file for file in beside if file.is_file())]


def _files(name_or_path: str | Path) -> list[Path]:
    """The files of a model's weights."""
    folder, path = _folder(name_or_path), Path(name_or_path)
    if _is_hugging_face(path):
        return _shards(path)
    file = path if path.is_file() else folder / _SINGLE
    if file.suffix in _PICKLES:
        raise ValueError(f"{file} is a pickle by its name, and loading one runs code; convert it to safetensors")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    return [file]


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a bundled model, or of a model on disk: model.safetensors, tokenizer.json, README.md.

    Raises:
        FileNotFoundError: there is neither a bundled model nor a folder or file of this name.
        OSError: it cannot be read.
    """
    with _naming(name_or_path):
        return _folder(name_or_path)


def _folder(name_or_path: str | Path) -> Path:
    if str(name_or_path) in BUNDLED:
        return Path(__file__).parents[1] / "models" / str(name_or_path)
    path = Path(name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"neither a file or folder nor a bundled model ({', '.join(BUNDLED)})")
    return path if path.is_dir() else path.parent


def _is_hugging_face(path: Path) -> bool:
    return (path / _CONFIG).is_file()


def _weights_in(folder: Path) -> CircuitWeights:
    """Views of the memory-mapped files of a Hugging Face folder; `attention_only` is False."""
    config = _read_json(folder / _CONFIG)
    family = family_of(config.get("model_type"), str(folder))
    tensors: dict[str, Entry] = {}
    for file in _shards(folder):
        opened = _open_safetensors(file)
        tensors |= {name: Entry(partial(opened.get_tensor, name)) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    checkpoint = Checkpoint(str(folder), config, tensors, family.body)
    checkpoint.refuse("quantization_config", "of a model on disk that is not read: load the model itself")
    return read_checkpoint(family, checkpoint)


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, which its index names where there are several."""
    index, names = folder / _INDEX, [_SINGLE]
    if index.exists():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{index} has no 'weight_map'")
        names = sorted({str(name) for name in placed.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of the folder")
        if not (folder / name).is_file():
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
            if pickles and names == [_SINGLE]:
                raise ValueError(
                    f"{folder} has its weights in a pickle ({pickles[0]}), and loading one runs code; convert it to "
                    "safetensors"
                )
            raise FileNotFoundError(f"{folder / name} is missing")
    return [folder / name for name in names]


def _open_safetensors(file: Path) -> Any:
    """A safetensors file, memory-mapped."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("loading weights needs safetensors: pip install 'pyfastcircuits[cli]'") from error
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of its encoding too
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is not readable JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content
