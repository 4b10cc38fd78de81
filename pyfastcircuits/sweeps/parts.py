"""One file of a stored sweep: the findings of some chunks as a Parquet table, whose name has a checksum of its bytes.

The rows are what users query, the effect of each experiment on each sequence. What a sweep needs besides to go on, the
chunks and the clean run's losses, is in the file's metadata.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.result import Label, label_columns
from pyfastcircuits.sweeps.work import Chunk, Findings

_KEY = "chunks"
_NAME = re.compile(r"part-\d{8}-([0-9a-f]{16})\.parquet")


class Torn(Exception):
    """A file is not what was written."""


def part_name(first: int, content: bytes) -> str:
    """The name of a part with these bytes, whose first chunk is `first`."""
    return f"part-{first:08d}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"


def is_part(name: str) -> bool:
    """Whether a file has the name of a part."""
    return _NAME.fullmatch(name) is not None


def encoded(findings: Sequence[Findings], labels: Sequence[Label]) -> bytes:
    """The bytes of a part: for each sequence and experiment of each chunk a row.

    Columns: sequence; those that name the experiment, as in Result.table; positions, how many were measured in the
    sequence; `delta_` of the metric and kl, the mean effects over them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, told = [], []
    for found in findings:
        chunk, (sequences, count) = found.chunk, found.chunk.shape
        some = label_columns(labels[chunk.experiments], True)
        columns = {"sequence": _rows(torch.arange(sequences) + chunk.sequences.start, count)}
        columns |= {name: pa.array(values * sequences) for name, values in some.items()}
        columns["positions"] = _rows(found.positions, count)
        columns |= {column(name): pa.array(x.flatten().numpy()) for name, x in found.effects.items()}
        tables.append(pa.table(columns))
        ends = [chunk.sequences.start, chunk.sequences.stop, chunk.experiments.start, chunk.experiments.stop]
        numbers = [_packed(x) for x in (found.positions.double(), found.clean, found.losses)]
        told.append([chunk.index, *ends, *numbers])
    table, sink = pa.concat_tables(tables), pa.BufferOutputStream()
    effects = [column(name) for name in findings[0].effects]
    repeated = [name for name in table.column_names if name not in effects]
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=repeated, store_schema=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: json.dumps([effects, told])})
    return bytes(sink.getvalue())


def decoded(name: str, content: bytes) -> list[Findings]:
    """What `encoded` was given.

    Raises:
        Torn: the bytes are not those that were written under this name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    checksum = _NAME.fullmatch(name)
    if checksum is None or checksum[1] != hashlib.sha256(content).hexdigest()[:16]:
        raise Torn(name)
    file = pq.ParquetFile(pa.BufferReader(content))
    columns, told = json.loads(file.metadata.metadata[_KEY.encode()])
    table = file.read(columns=columns)
    effects = {x: torch.tensor(table[x].to_numpy()) for x in columns}
    found, first = [], 0
    for index, start, stop, begin, end, *numbers in told:
        chunk = Chunk(index, slice(start, stop), slice(begin, end))
        sequences, count = chunk.shape
        positions, clean, losses = (_unpacked(x) for x in numbers)
        rows = slice(first, first + sequences * count)
        here = {name.removeprefix("delta_"): x[rows].view(sequences, count) for name, x in effects.items()}
        found.append(
            Findings(chunk, positions.long(), here, clean, losses.view(sequences, len(losses) // max(sequences, 1)))
        )
        first = rows.stop
    if first != table.num_rows:
        raise Torn(name)
    return found


def column(metric: str) -> str:
    """The column of a metric's effects: a divergence from the clean run is one itself."""
    return metric if metric == "kl" else f"delta_{metric}"


def _rows(values: Tensor, count: int) -> Any:
    import pyarrow as pa

    return pa.array(values.repeat_interleave(count).numpy())


def _packed(numbers: Tensor) -> str:
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    content = bytearray(base64.b64decode(text))
    return torch.frombuffer(content, dtype=torch.float64) if content else torch.empty(0, dtype=torch.float64)
