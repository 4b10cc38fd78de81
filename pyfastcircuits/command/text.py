"""The texts and token ids that a command reads: files of the user's, beside what adapters.texts has.

This needs the `cli` extra (tokenizers, numpy).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")  # those that texts do not hold


def read_text(file: Path) -> str:
    """A text of the user's.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or holds control characters as only binary files do.
    """
    with _reading("--text", file):
        content = file.read_text(encoding="utf-8-sig")
        controls = _CONTROLS.findall(content)
        if "\0" in controls or len(controls) > len(content) / 100:
            raise ValueError(f"it is a binary file: it holds {len(controls)} control characters")
    return content


@contextmanager
def _reading(option: str, file: Path) -> Iterator[None]:
    """Name the option in errors of its file."""
    try:
        yield
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(f"{option} is {str(file)!r}, expected a text in UTF-8, which has no {where}") from error
    except (OSError, ValueError) as error:
        reason = f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ValueError(f"{option} is {str(file)!r}: {reason}") from error


def read_tokens(file: Path, vocabulary: int) -> Tensor:
    """Token ids [B, T] from a .npy array ([T] or [B, T]), or from text: ids separated by spaces, a sequence a line.

    Raises:
        ValueError: the file cannot be read, or holds something else than ids below `vocabulary` in lines of one length.
    """
    with _reading("--tokens", file):
        rows = _array(file) if file.suffix == ".npy" else _lines(file)
        if not len(rows) or rows.shape[1] < 2:
            raise ValueError(f"it has shape {list(rows.shape)}, expected at least one sequence of at least 2 ids")
        wrong = np.argwhere((rows < 0) | (rows >= vocabulary))
        if len(wrong):
            where, value = wrong[0].tolist(), rows[tuple(wrong[0])]
            raise ValueError(f"id {where} is {value}, expected 0 to {vocabulary - 1}")
    return torch.from_numpy(rows.astype(np.int64))


def _array(file: Path) -> Any:
    """The array [B, T] of a .npy file."""
    with file.open("rb") as opened:
        try:
            array = np.lib.format.read_array(opened, allow_pickle=False)
        except (ValueError, EOFError, MemoryError, OverflowError) as error:
            raise ValueError(f"it is not a readable .npy array ({error})") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ValueError(f"it holds {array.dtype} of shape {list(array.shape)}, expected integers [T] or [B, T]")
    return np.atleast_2d(array)


def _lines(file: Path) -> Any:
    """The array [B, T] of a text of ids."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.split()
        wrong = next((word for word in words if not re.fullmatch("-?[0-9]{1,18}", word)), None)
        if wrong is not None:
            raise ValueError(f"line {number} holds {wrong[:40]!r}, expected ids: integers separated by spaces")
        rows += [words] if words else []
    lengths = sorted(set(map(len, rows)))
    if len(lengths) != 1:
        raise ValueError(f"it has sequences of lengths {lengths or 'none'}, expected one length")
    return np.array(rows, dtype=np.int64)
