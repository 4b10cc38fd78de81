"""What made a file: each file that a command writes says so, and another run's files are left alone."""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import pyfastcircuits as fc
from pyfastcircuits.adapters.files import model_files

KEY = "made_by"  # in a Parquet file's schema metadata and among a PNG file's texts
_ASKED = ("command_line", "model", "source")  # how a run was asked for: the same run may be asked for in other words


def made_by(
    command: str, model: str, options: Mapping[str, Any], tokens: str | None = None, source: str | None = None
) -> dict[str, Any]:
    """What makes the files of a run.

    Args:
        command: the name of the command.
        model: by its name or path; the hash is of its files.
        options: all that change the results.
        tokens: the hash of what the model runs over.
        source: where the tokens come from.
    """
    return {
        "command": command,
        "command_line": shlex.join(["pyfastcircuits", *sys.argv[1:]]),
        "version": fc.__version__,
        "model": model,
        "model_files_sha256": _files_hash(model),
        "source": source,
        "tokens_sha256": tokens,
        "options": dict(options),
    }


def _files_hash(model: str) -> str:
    whole = hashlib.sha256()
    for file in model_files(model):
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while part := content.read(1 << 22):
                digest.update(part)
        whole.update(digest.digest())
    return whole.hexdigest()


def check_folder(folder: Path) -> None:
    """Fail before the work where nothing can be written, not after it; several processes may look at once.

    Raises:
        ValueError: the folder cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out is {str(folder)!r}: cannot write there ({error.strerror})") from error


def check_files(folder: Path, names: Sequence[str], made: Mapping[str, Any], *, force: bool) -> None:
    """Keep the files of another run, unless `force`.

    Raises:
        ValueError: a file that is to be written is there, and another run made it, or something else.
    """
    for file in (folder / name for name in names):
        if force or not file.exists():
            continue
        other = _maker(file)
        if other is None or _identity(other) != _identity(json.loads(json.dumps(made))):
            by = (
                "does not say what made it"
                if other is None
                else f"was made by another run, {other.get('command_line')!r}"
            )
            raise ValueError(f"--out is {str(folder)!r}: {file.name} there {by}; take another folder, or --force")


def _identity(made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name not in _ASKED}


def _maker(file: Path) -> dict[str, Any] | None:
    """What a file says of the run that made it; None where it says nothing."""
    try:
        if file.suffix == ".png":
            from PIL import Image

            with Image.open(file) as image:
                text = image.info[KEY]
        else:
            text = pq.read_schema(file).metadata[KEY.encode()]
        found = json.loads(text)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
