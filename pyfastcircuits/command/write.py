"""The files that the command writes: Parquet tables (pyarrow) and heatmaps (matplotlib)."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits.command.show import of_pairs
from pyfastcircuits.command.text import TokenText
from pyfastcircuits.ops import Backend
from pyfastcircuits.result import label_name

HEAD_TABLES = {
    "ov": ("layer", "head", "rank", "source", "output", "logit"),
    "qk": ("layer", "head", "rank", "source", "destination", "attention"),
    "skip-trigrams": ("layer", "head", "rank", "source", "destination", "output", "attention", "logit", "score"),
    "copying": ("layer", "head", "top1", "top5", "positive", "eigenvalues"),
    "bigrams": ("rank", "token", "next", "logit"),
}
_TOKENS = ("source", "destination", "output", "token", "next")
_REALS = ("attention", "logit", "score", "top1", "top5", "positive", "eigenvalues")


def write_tables(folder: Path, tables: Mapping[str, pa.Table]) -> list[Path]:
    """Write each table as NAME.parquet, whole or not at all; the files."""
    files = []
    for name, table in tables.items():
        partial, file = folder / f"{name}.partial", folder / f"{name}.parquet"
        pq.write_table(table, partial)
        files.append(partial.replace(file))
    return files


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


def heatmap(found: fc.Result, file: Path, title: str, label: str) -> None:
    """Draw each difference from the baseline: by source and destination for pairs, else by layer and head."""
    from matplotlib.figure import Figure

    if of_pairs(found):
        grid, down, across = _grid_of_pairs(found)
        names = {"xlabel": "destination head (layer.head)", "ylabel": "source head (layer.head)"}
    else:
        grid = found.delta.double().cpu().view(found.values.shape[0], -1).numpy()
        down, across = ([str(i) for i in range(size)] for size in grid.shape)
        across = across if len(across) > 1 else ["all heads"]
        names = {"xlabel": "head", "ylabel": "layer"}
    size = max(5.0, 0.45 * len(across)), max(4.0, 0.45 * len(down))
    figure = Figure(figsize=(min(size[0], 40) + 1.5, min(size[1], 40)), layout="constrained")
    axes = figure.subplots()
    bound = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(across)), across, rotation=90)
    axes.set_yticks(range(len(down)), down)
    axes.set(title=title, **names)
    if grid.size <= 400:
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * bound else "black"
                axes.text(j, i, f"{value:+.3f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, label=label)
    figure.savefig(file, dpi=150, bbox_inches="tight")


def _grid_of_pairs(found: fc.Result) -> tuple[Any, list[str], list[str]]:
    """Differences with sources down and destinations across, NaN where there is no pair; and the names of both."""
    pairs: Any = found.labels
    sources, destinations = (sorted(set(side)) for side in zip(*pairs, strict=True))
    grid = np.full((len(sources), len(destinations)), np.nan)
    for (source, destination), value in zip(pairs, found.delta.tolist(), strict=True):
        grid[sources.index(source), destinations.index(destination)] = value
    return grid, list(map(label_name, sources)), list(map(label_name, destinations))
