"""The files that the command writes: Parquet tables (pyarrow) and figures (matplotlib)."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.command.guard import Failed
from pyfastcircuits.command.made import KEY
from pyfastcircuits.ops import Backend, TopEntries
from pyfastcircuits.result import label_name
from pyfastcircuits.sweeps.sweep import Example

HEAD_TABLES = {
    "ov": ("layer", "head", "rank", "source", "output", "logit"),
    "qk": ("layer", "head", "rank", "source", "destination", "attention"),
    "skip-trigrams": ("layer", "head", "rank", "source", "destination", "output", "attention", "logit", "score"),
    "copying": ("layer", "head", "top1", "top5", "positive", "eigenvalues"),
    "bigrams": ("rank", "token", "next", "logit"),
}
_TOKENS = ("source", "destination", "output", "token", "next")
_REALS = ("attention", "logit", "score", "top1", "top5", "positive", "eigenvalues")


def write_tables(folder: Path, tables: Mapping[str, pa.Table], made: Mapping[str, Any]) -> list[Path]:
    """Write each table as NAME.parquet, with what made it in its metadata; the files.

    Raises:
        Failed: a file cannot be written.
    """
    files = [folder / f"{name}.parquet" for name in tables]
    for file, table in zip(files, tables.values(), strict=True):
        metadata = {**(table.schema.metadata or {}), KEY: json.dumps(made)}
        with _whole(file) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial)
    return files


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Where to write a file that is to be there whole or not at all."""
    partial = file.with_suffix(".partial")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise Failed(f"--out is {str(file.parent)!r}: {file.name} cannot be written ({reason})") from error
    finally:
        partial.unlink(missing_ok=True)


def composition_columns(found: fc.Result, eigenvalues: Tensor) -> pa.Table:
    """One row for each pair: source_layer, source_head, dest_layer, dest_head, score, baseline, z.

    With K-composition the eigenvalues of the composed QK circuit follow as lists, real and imaginary.
    """
    names = ("source_layer", "source_head", "dest_layer", "dest_head", "score", "baseline", "z")
    table = found.table().select(names)
    if len(eigenvalues):
        for name, part in (("real", eigenvalues.real), ("imag", eigenvalues.imag)):
            table = table.append_column(f"eigenvalues_{name}", pa.array(part.double().tolist()))
    return table


def head_tables(
    weights: fc.CircuitWeights,
    k: int,
    text: TokenText,
    *,
    normed: bool,
    offset: int,
    backend: Backend,
    progress: Callable[[float], None],
) -> dict[str, pa.Table]:
    """Every head's tables, with the columns of HEAD_TABLES: their k largest entries, and copying.

    A column of text follows each column of tokens. Attention is less the destination's mean over sources, logits are
    less the mean over outputs; `score` is their product.
    """
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in HEAD_TABLES}
    eigenvalues = fc.copying_scores(weights)
    for layer, head in itertools.product(range(weights.n_layers), range(weights.n_heads)):
        found = fc.skip_trigrams(weights, (layer, head), k=k, normed=normed, offset=offset, backend=backend)
        for name, tokens, values in (("ov", found.outputs, found.logits), ("qk", found.destinations, found.attention)):
            best = values.flatten().sort(descending=True, stable=True).indices[:k]  # each row's k largest hold them
            columns = (found.sources[best // k], tokens.flatten()[best], values.flatten()[best])
            rows[name] += [(layer, head, *entry) for entry in _ranked(columns)]
        rows["skip-trigrams"] += [(layer, head, i, *t, t.score) for i, t in enumerate(found.top(k))]
        shares = fc.copying_accuracy(weights, [(layer, head)], backend=backend)
        rows["copying"].append((layer, head, *map(float, shares), float(eigenvalues[layer, head])))
        progress(1)
    entries = fc.top_entries(fc.bigrams(weights, normed=normed), k, normalize="center", backend=backend)
    rows["bigrams"] += _ranked((entries.rows, entries.columns, entries.values))
    return {name: _with_text(names, rows[name], text) for name, names in HEAD_TABLES.items()}


def skip_trigram_records(found: fc.SkipTrigrams, text: TokenText, *, ranked: bool) -> dict[str, list[dict[str, Any]]]:
    """Skip-trigrams by rank; or, of some sources, the destinations that attend to each and the outputs it raises."""
    k = found.logits.shape[1]
    if ranked:
        triples: list[tuple[float, ...]] = [(*t, t.score) for t in found.top(k)]
        return {"skip-trigrams": _with_text(HEAD_TABLES["skip-trigrams"][3:], triples, text).to_pylist()}
    sources, parts = found.sources.repeat_interleave(k), {}
    for name, tokens, value, values in (
        ("destination", found.destinations, "attention", found.attention),
        ("output", found.outputs, "logit", found.logits),
    ):
        rows = list(zip(*(x.flatten().tolist() for x in (sources, tokens, values)), strict=True))
        parts[f"{name}s"] = _with_text(("source", name, value), rows, text).to_pylist()
    return parts


def bigram_records(found: TopEntries, text: TokenText) -> list[dict[str, Any]]:
    """Entries of the bigram table."""
    columns = (found.rows, found.columns, found.values)
    rows = list(zip(*(x.flatten().tolist() for x in columns), strict=True))
    return list(_with_text(HEAD_TABLES["bigrams"][1:], rows, text).to_pylist())


def example_records(sweep: fc.Sweep, examples: list[Example], text: TokenText) -> list[dict[str, Any]]:
    """The examples of a sweep, each with its ablation and the texts of its tokens."""
    labels = (label_name(label) for label, _ in sweep.result.top(len(examples)))
    return [
        {
            "ablation": label,
            **asdict(example),
            "context_text": text.decode(example.context),
            "target_text": text.decode([example.target]),
        }
        for label, example in zip(labels, examples, strict=True)
    ]


def _ranked(columns: Iterable[Tensor]) -> Iterable[tuple[float, ...]]:
    return zip(itertools.count(), *(column.tolist() for column in columns), strict=False)


def _with_text(names: tuple[str, ...], rows: list[tuple[float, ...]], text: TokenText) -> pa.Table:
    """A table of the rows, in which a column of text follows each column of tokens."""
    arrays = {}
    for i, name in enumerate(names):
        values = [row[i] for row in rows]
        arrays[name] = pa.array(values, pa.float64() if name in _REALS else pa.int64())
        if name in _TOKENS:
            arrays[f"{name}_text"] = pa.array([text.decode([int(x)]) for x in values], pa.string())
    return pa.table(arrays)


def circuit_graph(found: fc.Circuit, file: Path) -> Path:
    """Write a circuit in the graph format of circuit-tracer's viewer; the file.

    Raises:
        Failed: the file cannot be written.
    """
    with _whole(file) as partial:
        found.save(partial)
    return file


def picture(figure: Any, file: Path, made: Mapping[str, Any]) -> Path:
    """Write a figure as PNG, with what made it among its texts; the file.

    Raises:
        Failed: the file cannot be written.
    """
    with _whole(file) as partial:
        figure.savefig(partial, format="png", metadata={KEY: json.dumps(made)})
    return file
