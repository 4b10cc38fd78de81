"""Corpora of any size: files of texts or of tokens, read as sequences of one length, a few at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pyfastcircuits.adapters.tokenizer import read_tokenizer, tokenizer_file
from pyfastcircuits.arguments import describe, public
from pyfastcircuits.sweeps.documents import Documents, Encoder, packed
from pyfastcircuits.sweeps.identity import tokens_hash

TokenType = Literal["uint16", "uint32"]
_BLOCKS, _BLOCK = 64, 1 << 16  # of each file, that its fingerprint is made of: the first, the last and evenly between


class Sequences(Protocol):
    """What a sweep runs over.

    Attributes:
        length: T.
        count: how many sequences; None if nobody knows before they have been read.
        fingerprint: what tells them from others.
    """

    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def count(self) -> int | None: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    def read(self, start: int, stop: int) -> Tensor:
        """Sequences number start to stop - 1, or those of them that there are, int64 [N, T]."""


@dataclass(frozen=True, eq=False)
class Given:
    """Sequences that are in memory, [B, T]."""

    tokens: Tensor

    @property
    def length(self) -> int:
        """See Sequences."""
        return self.tokens.shape[1]

    @property
    def count(self) -> int:
        """See Sequences."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """See Sequences."""
        return tokens_hash(self.tokens.long())

    def read(self, start: int, stop: int) -> Tensor:
        """See Sequences."""
        return self.tokens[start:stop].long()


@dataclass(eq=False, repr=False)
class Corpus:
    """Sequences of one length in files; made by `corpus`.

    Attributes:
        path: the file or folder.
        length: T, the tokens of each sequence.
        count: how many sequences; None where nobody knows before all has been read.
        fingerprint: a hash of how it is read and of blocks of its files, 64 of each evenly spaced.
    """

    path: Path
    length: int
    count: int | None
    fingerprint: str
    _rows: Callable[[int, int], Tensor] | None  # of what can be read from anywhere
    _stream: Callable[[], Iterator[Tensor]] | None  # of what is read from its beginning: some sequences at a time
    _most: int | None = None
    _at: int = 0
    _rest: Tensor | None = None
    _open: Iterator[Tensor] | None = field(default=None)

    @public
    def read(self, start: int, stop: int) -> Tensor:
        """Sequences number start to stop - 1, or those of them that there are: int64 [N, T].

        Texts and tables are read on from where the last call ended; a call that goes back begins anew.

        Raises:
            ValueError: start is negative, or a file holds something else than it should.
        """
        if start < 0:
            raise ValueError(f"start is {start}, expected at least 0")
        stop = stop if self._most is None else min(stop, self._most)
        if self._rows is not None:
            return self._rows(start, max(start, stop))
        if self._open is None or start < self._at:
            assert self._stream is not None
            self._open, self._at, self._rest = self._stream(), 0, None
        taken = []
        while self._at < stop:
            block = next(self._open, None) if self._rest is None else self._rest
            if block is None:
                break
            skipped = min(max(start - self._at, 0), len(block))
            used = min(stop - self._at, len(block))
            taken.append(block[skipped:used])
            self._rest = block[used:] if used < len(block) else None
            self._at += used
        return torch.cat(taken) if taken else torch.empty(0, self.length, dtype=torch.long)

    def __repr__(self) -> str:
        """Where it is and how much of it there is."""
        return f"Corpus({str(self.path)!r}, {self.count or 'unknown many'} sequences of {self.length} tokens)"


@public
def corpus(
    path: str | Path,
    length: int,
    *,
    tokenizer: str | Path | None = None,
    column: str | None = None,
    dtype: TokenType = "uint16",
    sequences: int | None = None,
) -> Corpus:
    """The sequences of a corpus on disk, for `sweep`; nothing of it is held in memory but the few that are in use.

    Texts are tokenized and follow one another, each document behind the tokenizer's start token if it has one; so does
    each sequence. Tokens follow one another as they are. What is left over at the end is left out.

    Args:
        path: a text (.txt, .md, or any other file in UTF-8); JSON lines (.jsonl); Parquet; tokens as a .npy array of
            integers, [B, T'] (the first `length` tokens of each row) or [N], or as a .bin of unsigned integers in the
            machine's order, which are mapped into memory; the folder that datasets.Dataset.save_to_disk wrote; or a
            folder of files of one of these kinds, in the order of their names.
        length: T, the tokens of a sequence.
        tokenizer: the model whose tokenizer.json makes tokens of texts: its name or path.
        column: of JSON lines, Parquet and datasets: lists of tokens, or texts. None: the first that is there of
            "input_ids", "tokens" and "text".
        dtype: of a .bin.
        sequences: at most so many, the first ones.

    Raises:
        ValueError: length below 2 or sequences below 1; a file that does not hold what it should; texts without a
            tokenizer.
        FileNotFoundError, OSError: the path cannot be read.
        ImportError: pyarrow, numpy or tokenizers is missing.
    """
    if length < 2:
        raise ValueError(f"length is {length}, expected at least 2")
    if sequences is not None and sequences < 1:
        raise ValueError(f"sequences is {sequences}, expected at least 1")
    path = Path(path)
    try:
        files = _files(path)
    except OSError as error:
        missing = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise missing(f"path is {describe(str(path))}: it cannot be read ({error.strerror})") from error
    how = {"length": length, "column": column, "dtype": dtype, "sequences": sequences}
    kind = files[0].suffix
    if kind in (".npy", ".bin"):
        if len(files) > 1:
            raise ValueError(f"path is {str(path)!r}, which has {len(files)} files of {kind}: give one of them")
        rows, count = _mapped(files[0], length, dtype)
        count = count if sequences is None else min(count, sequences)
        return Corpus(path, length, count, _fingerprint(files, how), rows, None, sequences)
    encode = None
    if tokenizer is not None:
        encode = Encoder(read_tokenizer(tokenizer), tokenizer)
        how["tokenizer"] = hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()
    documents = Documents(files, column, encode)

    def stream() -> Iterator[Tensor]:
        return packed(documents, length, documents.lead)

    return Corpus(path, length, None, _fingerprint(files, how), None, stream, sequences)


def _files(path: Path) -> list[Path]:
    """The files of a corpus, all of one kind."""
    if "\0" in str(path):
        raise ValueError(f"path is {describe(str(path))}, expected the path of a file or folder")
    if not path.is_dir():
        with path.open("rb"):
            return [path]
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise ValueError(f"path is {str(path)!r}, which has several data sets: give one of {', '.join(splits)} in it")
    if (path / "state.json").exists():
        listed = json.loads((path / "state.json").read_text()).get("_data_files", [])
        found = [path / x["filename"] for x in listed]
    else:
        found = sorted(x for x in path.iterdir() if x.is_file() and not x.name.startswith((".", "_")))
    kinds = sorted({x.suffix for x in found})
    if len(kinds) != 1:
        raise ValueError(
            f"path is {str(path)!r}, which has files of {', '.join(kinds) or 'no kind'}, expected one kind"
        )
    return found


def _mapped(file: Path, length: int, dtype: TokenType) -> tuple[Callable[[int, int], Tensor], int]:
    """The sequences of an array on disk by their numbers, and how many there are."""
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("corpora of arrays need numpy: pip install 'pyfastcircuits[cli]'") from error
    try:
        array = np.load(file, mmap_mode="r") if file.suffix == ".npy" else np.memmap(file, dtype, "r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"path is {str(file)!r}, which is not a readable array: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ValueError(
            f"path is {str(file)!r}, which holds {array.dtype} of shape {list(array.shape)}, expected "
            "integers [N] or [B, T]"
        )
    rows = array if array.ndim == 2 else array[: len(array) // length * length].reshape(-1, length)
    if not len(rows) or rows.shape[1] < length:
        raise ValueError(f"length is {length}, but {file.name} has shape {list(array.shape)}: it gives no sequence")

    def read(start: int, stop: int) -> Tensor:
        return torch.from_numpy(rows[start:stop, :length].astype(np.int64))

    return read, len(rows)


def _fingerprint(files: list[Path], how: dict[str, Any]) -> str:
    """See Corpus."""
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        last = max(0, size - _BLOCK)
        with file.open("rb") as opened:
            for place in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                opened.seek(place)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
