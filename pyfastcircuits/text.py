"""From text to sequences of tokens, for the command line. Needs the `cli` extra (tokenizers, numpy)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfastcircuits.corpus import stdlib_files
from pyfastcircuits.weights import model_folder

__all__ = ["TokenText", "held_out_text", "read_tokens", "sequences_of"]

START = "[START]"


class TokenText:
    """Shows tokens as text, by the tokenizer.json beside a model, or as ids where there is none."""

    def __init__(self, name_or_path: str | Path) -> None:
        file = model_folder(name_or_path) / "tokenizer.json"
        self.tokenizer: Any = None
        if file.exists():
            from tokenizers import Tokenizer

            try:
                self.tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises bare Exceptions
                raise ValueError(f"{file} is not a readable tokenizer: {error}") from error

    def __call__(self, ids: list[int]) -> str:
        """The tokens as one string, line breaks and tabs escaped."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace("\n", "\\n").replace("\t", "\\t")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json; pass --tokens instead of a text")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def start(self) -> int | None:
        """The token every sequence begins with: [START], or what the tokenizer puts in front; None if there is none."""
        if self.tokenizer is None:
            return None
        put_in_front: list[int] = self.tokenizer.encode("").ids
        return put_in_front[0] if put_in_front else self.tokenizer.token_to_id(START)


def held_out_text() -> str:
    """The standard library's files that the bundled models were not trained on, one after the other."""
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(held_out=True))


def sequences_of(text: TokenText, content: str, length: int, most: int) -> Tensor:
    """At most `most` sequences [B, length], evenly spaced over the text, each [START] and then consecutive tokens.

    A text shorter than one sequence gives one shorter sequence.

    Raises:
        ValueError: a text of no tokens.
    """
    ids = torch.tensor(text.encode(content), dtype=torch.long)
    if not len(ids):
        raise ValueError("the text is empty: it has no tokens")
    lead = [] if text.start is None else [text.start]
    width = min(length - len(lead), len(ids))
    windows = ids[: len(ids) // width * width].view(-1, width)
    chosen = torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()
    windows = windows[chosen]
    return torch.cat((torch.tensor(lead, dtype=torch.long).expand(len(windows), -1), windows), 1)


def read_tokens(file: Path) -> Tensor:
    """Token ids [B, T] from a .npy array ([T] or [B, T]), or from text: ids separated by spaces, a sequence a line.

    Raises:
        ValueError: something else than integers, or lines of different lengths.
    """
    if file.suffix == ".npy":
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is not a readable .npy array: {error}") from error
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise ValueError(
                f"{file} holds {array.dtype} of shape {list(array.shape)}, expected integers [T] or [B, T]"
            )
        return torch.from_numpy(array.astype(np.int64)).reshape(-1, array.shape[-1])
    try:
        rows = [[int(word) for word in line.split()] for line in file.read_text().splitlines() if line.strip()]
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a text of token ids: {error}") from error
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise ValueError(f"{file} has sequences of lengths {lengths or 'none'}, expected one length")
    return torch.tensor(rows)
