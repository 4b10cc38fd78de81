"""The documents of a corpus: texts and lists of tokens in files, read a few at a time and packed into sequences."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.tokenizer import start_token
from pyfastcircuits.arguments import describe

COLUMNS = ("input_ids", "tokens", "text")  # that are looked for, in this order
TABLES = {".parquet", ".jsonl", ".json", ".arrow"}
PIECE = 1 << 20  # characters of a text that are tokenized at a time
ROWS = 256  # of a table that are read at a time


class Encoder:
    """A tokenizer, and the token that it puts in front."""

    def __init__(self, tokenizer: Any, name: str | Path) -> None:
        """Raise ValueError where there is no tokenizer."""
        if tokenizer is None:
            raise ValueError(f"tokenizer is {str(name)!r}, which has no tokenizer.json")
        self.tokenizer, self.start = tokenizer, start_token(tokenizer)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text.

        Raises:
            ValueError: the tokenizer does not know one.
        """
        try:
            return [x.ids for x in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"tokenizer does not know all of the text: {error}") from error


class Documents:
    """The documents of files, as tokens."""

    def __init__(self, files: list[Path], column: str | None, encode: Encoder | None) -> None:
        """Choose the column, and see that texts have a tokenizer, before any work; errors as `corpus`."""
        self.files, self.encode, self.column = files, encode, ""
        self.texts = files[0].suffix not in TABLES
        if not self.texts:
            first = next(_batches(files[0]), None)
            if first is None:
                raise ValueError(f"path is {str(files[0])!r}, which has no rows")
            there = [x for x in ((column,) if column else COLUMNS) if x in first]
            if not there:
                wanted = repr(column) if column else "one of " + ", ".join(COLUMNS)
                raise ValueError(f"column is {column!r}, expected {wanted} of {', '.join(first)}")
            self.column = there[0]
            self.texts = isinstance(_listed(first[self.column])[0], str)
        if self.texts and encode is None:
            raise ValueError(f"tokenizer is missing, but {files[0].name} holds texts")

    @property
    def lead(self) -> list[int]:
        """The tokens in front of each sequence."""
        return [self.encode.start] if self.texts and self.encode is not None and self.encode.start is not None else []

    def __iter__(self) -> Iterator[Tensor]:
        """The tokens of some documents, or of a piece of one, after the others."""
        for file in self.files:
            if self.column:
                for number, batch in enumerate(_batches(file, self.column)):
                    where = f"{file}: rows {number * ROWS} to {number * ROWS + ROWS - 1}"
                    yield self._read(batch[self.column], where)
            else:
                yield torch.tensor(self.lead, dtype=torch.long)
                for piece in _pieces(file):
                    yield self._encoded([piece], [])

    def _read(self, values: Any, where: str) -> Tensor:
        if not self.texts:
            return _ids(values, where, self.column)
        texts = _listed(values)
        wrong = next((x for x in texts if not isinstance(x, str)), "")
        if wrong != "":
            raise ValueError(f"{where} have {describe(wrong)} in {self.column!r}, expected texts")
        return self._encoded(texts, self.lead)

    def _encoded(self, texts: list[str], lead: list[int]) -> Tensor:
        assert self.encode is not None
        return torch.tensor([x for ids in self.encode(texts) for x in (*lead, *ids)], dtype=torch.long)


def packed(documents: Iterable[Tensor], length: int, lead: list[int]) -> Iterator[Tensor]:
    """Documents one after the other, cut into sequences, each behind `lead`."""
    width, waiting, size = length - len(lead), list[Tensor](), 0

    def cut() -> tuple[Tensor, Tensor]:
        ids = torch.cat(waiting) if waiting else torch.empty(0, dtype=torch.long)
        rows = ids[: len(ids) // width * width].view(-1, width)
        led = torch.tensor(lead, dtype=torch.long).expand(len(rows), -1)
        return torch.cat((led, rows), 1), ids[rows.numel() :]

    for ids in documents:
        waiting.append(ids)
        size += len(ids)
        if size >= max(width, PIECE >> 4):
            rows, rest = cut()
            waiting, size = [rest], len(rest)
            yield rows
    rows, _ = cut()
    if len(rows):
        yield rows


def _pieces(file: Path) -> Iterator[str]:
    """A text, some lines at a time."""
    lines: list[str] = []
    size = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            while line := opened.readline(PIECE):
                lines.append(line)
                size += len(line)
                if size >= PIECE:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        raise ValueError(f"path is {str(file)!r}, expected a text in UTF-8: {error.reason} at {error.start}") from error
    if lines:
        yield "".join(lines)


def _batches(file: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The columns of some rows of a table, or one of them: lists, or Arrow's arrays."""
    if file.suffix in (".jsonl", ".json"):
        yield from _lines(file, column)
        return
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("corpora of tables need pyarrow: pip install 'pyfastcircuits[cli]'") from error
    columns = None if column is None else [column]
    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=columns):
                yield dict(zip(batch.schema.names, batch.columns, strict=True))
        else:
            with pa.memory_map(str(file)) as opened:
                for whole in pa.ipc.open_stream(opened):
                    for start in range(0, len(whole), ROWS):
                        batch = whole.slice(start, ROWS)
                        yield dict(zip(batch.schema.names, batch.columns, strict=True))
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"path is {str(file)!r}, which is not readable: {error}") from error


def _lines(file: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """The same of JSON lines."""
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: line {number} is no JSON: {error}") from error
            if not isinstance(found, dict) or (column is not None and column not in found):
                expected = "an object" if column is None else f"an object with {column!r}"
                raise ValueError(f"{file}: line {number} holds {describe(found)}, expected {expected}")
            rows.append(found)
            if column is None:  # the first row says what columns there are
                break
            if len(rows) == ROWS:
                yield {column: [row[column] for row in rows]}
                rows = []
    if rows:
        yield (
            {name: [row[name] for row in rows] for name in rows[0]}
            if column is None
            else {column: [row[column] for row in rows]}
        )


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else list(values.to_pylist())


def _ids(values: Any, where: str, column: str) -> Tensor:
    """The tokens of some documents, one after the other."""
    if isinstance(values, list):
        wrong = next((x for x in values if not isinstance(x, list)), None)
        ids: Any = [x for document in values for x in document] if wrong is None else []
        wrong = next((x for x in ids if type(x) is not int), wrong)
    else:
        import pyarrow.types as kinds

        listed = kinds.is_list(values.type) or kinds.is_large_list(values.type) or kinds.is_fixed_size_list(values.type)
        right = listed and kinds.is_integer(values.type.value_type) and not values.null_count
        ids = values.flatten() if right else []
        wrong = None if right and not ids.null_count else str(values.type)
        ids = ids.to_numpy(zero_copy_only=False).astype("int64") if wrong is None else []
    if wrong is not None:
        raise ValueError(f"{where} have {describe(wrong)} in {column!r}, expected lists of tokens")
    found = torch.tensor(ids, dtype=torch.long)
    if len(found) and int(found.min()) < 0:
        raise ValueError(f"{where} have {int(found.min())} in {column!r}, expected tokens, integers from 0")
    return found
