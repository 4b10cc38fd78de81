"""Texts and their tokens: the tokenizer beside a model, and the standard library as a corpus.

The standard library of the running interpreter is a text that everyone already has: the bundled models are trained on
it, and a sweep or a report reads it unless it is given another. Tokenizers need the `cli` extra.
"""

import hashlib
import json
import re
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.tokenizer import read_tokenizer, start_token

_FILES_AT_ONCE = 64  # encoded in one call, which Ctrl-C waits for
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def visible(text: object) -> str:
    """The text on one line: what is not printable is escaped as in Python's strings, such as "\\n" and "\\x1b"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def quoted(piece: str) -> str:
    """A token's text as Python writes it, long indentation as "' ' * 15"."""
    return f"' ' * {len(piece)}" if len(piece) > 4 and set(piece) == {" "} else repr(piece)


def no_token(token: int) -> str:
    """What is shown of an id for which a tokenizer has no token, as in a vocabulary that is padded."""
    return f"<id {token}>"


class TokenText:
    """Turns tokens into text and back by the tokenizer.json beside a model; without one, tokens are shown as ids."""

    def __init__(self, name_or_path: str | Path | None, tokenizer: Any = None) -> None:
        """The tokenizer is that in a model's folder, or one of the tokenizers library that is given; None: none."""
        self.tokenizer = tokenizer
        if name_or_path is not None and tokenizer is None:
            self.tokenizer = read_tokenizer(name_or_path)

    def __call__(self, ids: list[int]) -> str:
        """The tokens as one string, in which what is not printable is escaped."""
        return visible(self.decode(ids))

    def decode(self, ids: list[int]) -> str:
        """The tokens as one string; ids where there is no tokenizer, and "<id 50300>" where it has no such token."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return "".join(
            self.tokenizer.decode(list(run), skip_special_tokens=False) if there else "".join(map(no_token, run))
            for there, run in groupby(ids, self.has)
        )

    def quoted(self, token: int) -> str:
        """One token as Python writes its text; "<id 50300>", without quotes, where the tokenizer has no such token."""
        return quoted(self.decode([token])) if self.has(token) else no_token(token)

    def has(self, token: int) -> bool:
        """Whether there is such a token; without a tokenizer, there is any."""
        return self.tokenizer is None or self.tokenizer.id_to_token(token) is not None

    def encode(self, *texts: str) -> list[list[int]]:
        """Token ids of each text, on all cores.

        Raises:
            ValueError: the model has no tokenizer, or one that fails where it does not know a text.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json, so it reads token ids and no text; give tokens")
        batches = (list(texts[i : i + _FILES_AT_ONCE]) for i in range(0, len(texts), _FILES_AT_ONCE))
        try:
            return [x.ids for batch in batches for x in self.tokenizer.encode_batch(batch, add_special_tokens=False)]
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"the model's tokenizer does not know all of the text: {error}") from error

    def token(self, text: str) -> int:
        """The token of a text that is one token; "\\n" and "\\t" stand for a line break and a tab.

        Without a tokenizer the text is the id of the token.

        Raises:
            ValueError: the text has no token, or several, or the tokenizer does not know it; it is not an id, and
                there is no tokenizer.
        """
        if self.tokenizer is None:
            if not re.fullmatch("[0-9]{1,18}", text):
                raise ValueError(f"{text!r} is no token id, and this model has no tokenizer.json")
            return int(text)
        piece = text.replace("\\n", "\n").replace("\\t", "\t")
        (ids,) = self.encode(piece)
        if self.unknown in ids and piece != self.tokenizer.id_to_token(self.unknown):
            raise ValueError(f"{text!r} is unknown to the model's tokenizer, expected a token that it has")
        if len(ids) != 1:
            pieces = ", ".join(map(self.quoted, ids)) or "none"
            raise ValueError(f"{text!r} is {len(ids)} tokens, expected one: {pieces}")
        return ids[0]

    @cached_property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer does not know; None where it has none."""
        if self.tokenizer is None:
            return None
        model = json.loads(self.tokenizer.to_str())["model"]
        name = model.get("unk_token")
        token: int | None = model.get("unk_id") if name is None else self.tokenizer.token_to_id(name)
        return token

    @property
    def start(self) -> int | None:
        """The token that every sequence begins with: its own start token or [START]; None without both."""
        return None if self.tokenizer is None else start_token(self.tokenizer)


def stdlib_files(held_out: bool) -> list[Path]:
    """Source files of the standard library, sorted by path: the held-out twentieth, or the rest, for training.

    A hash of its path says whether a file is held out, so that every Python version splits the same names alike.

    Raises:
        FileNotFoundError: the interpreter ships no source of its standard library (a zipped or stripped install).
    """
    import sysconfig  # which takes as long as all of this package's modules

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


def _source(file: Path) -> str:
    """A file of the standard library as UTF-8, in which bytes that are not are replaced."""
    return file.read_text(encoding="utf-8", errors="replace")


def held_out_text() -> str:
    """The files of the standard library that the bundled models were not trained on, one after the other."""
    return "".join(map(_source, stdlib_files(held_out=True)))


def corpus_tokens(text: TokenText, held_out: bool) -> Tensor:
    """The files of the standard library one after the other, each behind [START], [N].

    Raises:
        ValueError: the model has no tokenizer.
    """
    lead = [] if text.start is None else [text.start]
    files = text.encode(*map(_source, stdlib_files(held_out)))
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
        raise ValueError("text is empty: it gives no tokens")
    return evenly(rows_of(text, ids, length), most)


def check_known(tokens: Tensor, text: TokenText, vocabulary: int) -> float:
    """The share of the tokens of a text, behind the first of each sequence, that the tokenizer does not know.

    Raises:
        ValueError: it is more than half; the tokenizer has tokens that the model has not.
    """
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise ValueError(f"the model's tokenizer.json gives token {largest}, expected 0 to {vocabulary - 1}")
    unknown = 0.0 if text.unknown is None else float((tokens[:, 1:] == text.unknown).double().mean())
    if unknown > 0.5:
        raise ValueError(
            f"text has {unknown:.0%} of tokens that are unknown to the model's tokenizer, expected a text that it is "
            "for"
        )
    return unknown


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()]
