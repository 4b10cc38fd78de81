"""From text to sequences of tokens, for the command line. Needs the `cli` extra (tokenizers, numpy)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfastcircuits.command.corpus import stdlib_files
from pyfastcircuits.model.weights import model_folder

__all__ = ["TokenText", "corpus_tokens", "held_out_text", "read_tokens", "rows_of", "sequences_of"]

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
        return self.decode(ids).replace("\n", "\\n").replace("\t", "\\t")

    def decode(self, ids: list[int]) -> str:
        """The tokens as one string; ids where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the model has no tokenizer.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json, so it reads token ids and no text; pass --tokens")
        return [encoded.ids for encoded in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def token(self, text: str) -> int:
        """The one token that a text is; "\\n" and "\\t" stand for a line break and a tab. An id without a tokenizer.

        Raises:
            ValueError: a text of no token, or of several; no id where there is no tokenizer.
        """
        if self.tokenizer is None:
            if not text.isdecimal():
                raise ValueError(f"{text!r} is no token id, and this model has no tokenizer.json")
            return int(text)
        ids = self.encode(text.replace("\\n", "\n").replace("\\t", "\t"))
        if len(ids) != 1:
            pieces = ", ".join(repr(self.decode([i])) for i in ids) or "none"
            raise ValueError(f"{text!r} is {len(ids)} tokens, expected one: {pieces}")
        return ids[0]

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


def corpus_tokens(text: TokenText, held_out: bool) -> Tensor:
    """The standard library's files one after the other, each behind [START], [N].

    Raises:
        ValueError: the model has no tokenizer.
    """
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(held_out)]
    lead = [] if text.start is None else [text.start]
    ids: list[int] = []
    for encoded in text.encode_all(contents):
        ids += lead + encoded
    return torch.tensor(ids)


def rows_of(text: TokenText, ids: Tensor, length: int) -> Tensor:
    """Consecutive tokens cut into rows [B, length], each behind [START]; a shorter text gives one shorter row."""
    lead = [] if text.start is None else [text.start]
    width = min(length - len(lead), len(ids))
    windows = ids[: len(ids) // width * width].view(-1, width)
    return torch.cat((torch.tensor(lead, dtype=torch.long).expand(len(windows), -1), windows), 1)


def sequences_of(text: TokenText, content: str, length: int, most: int) -> Tensor:
    """At most `most` sequences [B, length], evenly spaced over the text, each [START] and then consecutive tokens.

    A text shorter than one sequence gives one shorter sequence.

    Raises:
        ValueError: a text of no tokens.
    """
    ids = torch.tensor(text.encode(content), dtype=torch.long)
    if not len(ids):
        raise ValueError("the text is empty: it has no tokens")
    rows = rows_of(text, ids, length)
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()]


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
