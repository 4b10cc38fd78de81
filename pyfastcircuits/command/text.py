"""Texts and their tokens: the tokenizer beside a model, the standard library as a corpus, files of token ids.

The standard library of the running interpreter is a text that everyone already has: the bundled models are trained on
it, and the sweep reads it unless it is given another. This needs the `cli` extra (tokenizers, numpy).
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfastcircuits.adapters.files import model_folder

START = "[START]"
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TokenText:
    """Turns tokens into text and back by the tokenizer.json beside a model; without one, tokens are shown as ids."""

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

    def encode(self, *texts: str) -> list[list[int]]:
        """Token ids of each text, on all cores.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json, so it reads token ids and no text; pass --tokens")
        return [encoded.ids for encoded in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def token(self, text: str) -> int:
        """The token of a text that is one token; "\\n" and "\\t" stand for a line break and a tab.

        Without a tokenizer the text is the id of the token.

        Raises:
            ValueError: the text has no token, or several; it is not an id, and there is no tokenizer.
        """
        if self.tokenizer is None:
            if not text.isdecimal():
                raise ValueError(f"{text!r} is no token id, and this model has no tokenizer.json")
            return int(text)
        (ids,) = self.encode(text.replace("\\n", "\n").replace("\\t", "\t"))
        if len(ids) != 1:
            pieces = ", ".join(repr(self.decode([i])) for i in ids) or "none"
            raise ValueError(f"{text!r} is {len(ids)} tokens, expected one: {pieces}")
        return ids[0]

    @property
    def start(self) -> int | None:
        """The token that every sequence begins with: its own start token or [START]; None without both."""
        if self.tokenizer is None:
            return None
        put_in_front: list[int] = self.tokenizer.encode("").ids
        return put_in_front[0] if put_in_front else self.tokenizer.token_to_id(START)


def stdlib_files(held_out: bool) -> list[Path]:
    """Source files of the standard library, sorted by path: the held-out twentieth, or the rest, for training.

    A hash of its path says whether a file is held out, so that every Python version splits the same names alike.

    Raises:
        FileNotFoundError: the interpreter ships no source of its standard library (a zipped or stripped install).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            if (digest[0] < 13) == held_out:
                files.append(path)
    if not files:
        raise FileNotFoundError(f"no standard-library source under {root}; pass a text of your own")
    return files


def read_text(file: Path) -> str:
    """A text as UTF-8, in which bytes that are not are replaced."""
    return file.read_text(encoding="utf-8", errors="replace")


def held_out_text() -> str:
    """The files of the standard library that the bundled models were not trained on, one after the other."""
    return "".join(map(read_text, stdlib_files(held_out=True)))


def corpus_tokens(text: TokenText, held_out: bool) -> Tensor:
    """The files of the standard library one after the other, each behind [START], [N].

    Raises:
        ValueError: the model has no tokenizer.
    """
    lead = [] if text.start is None else [text.start]
    files = text.encode(*map(read_text, stdlib_files(held_out)))
    return torch.tensor([token for file in files for token in (*lead, *file)])


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
        ValueError: the text has no tokens; the model has no tokenizer.
    """
    ids = torch.tensor(text.encode(content)[0], dtype=torch.long)
    if not len(ids):
        raise ValueError("the text is empty: it has no tokens")
    rows = rows_of(text, ids, length)
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()]


def read_tokens(file: Path) -> Tensor:
    """Token ids [B, T] from a .npy array ([T] or [B, T]), or from text: ids separated by spaces, a sequence a line.

    Raises:
        ValueError: the file holds something else than integers, or lines of different lengths.
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
