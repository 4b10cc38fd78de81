"""The files that the command writes: Parquet tables (pyarrow) and heatmaps (matplotlib)."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits.command.show import METRIC_NAMES, Composition, of_pairs, order_rows
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


def write_table(table: pa.Table, file: Path) -> None:
    """Write a Parquet file whole or not at all."""
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.replace(file)


def write_orders(sweep: fc.Sweep, file: Path) -> None:
    """Write one row for each step of the order table: paths, loss, fall (nats)."""
    names, losses = zip(*order_rows(sweep), strict=True)
    falls = [None, *(a - b for a, b in itertools.pairwise(losses))]
    write_table(pa.table({"paths": list(names), "loss": list(losses), "fall": falls}), file)


def write_composition(found: Composition, file: Path) -> None:
    """Write one row for each pair: source_layer, source_head, dest_layer, dest_head, score, baseline, z.

    With K-composition the eigenvalues of the composed QK circuit follow as lists, real and imaginary.
    """
    names = ("source_layer", "source_head", "dest_layer", "dest_head")
    heads = zip(*(itertools.chain(*pair) for pair in found.pairs), strict=True)
    columns = {name: pa.array(values, pa.int32()) for name, values in zip(names, heads, strict=True)}
    for name in ("score", "baseline", "z"):
        columns[name] = pa.array(getattr(found, name).double().numpy())
    if len(found.eigenvalues):
        columns["eigenvalues_real"] = pa.array(found.eigenvalues.real.double().tolist())
        columns["eigenvalues_imag"] = pa.array(found.eigenvalues.imag.double().tolist())
    write_table(pa.table(columns), file)


def write_head_tables(
    weights: fc.CircuitWeights,
    k: int,
    out: Path,
    text: TokenText,
    *,
    normed: bool,
    offset: int,
    backend: Backend,
    progress: Callable[[float], None],
) -> list[Path]:
    """Write every head's tables, each a file with the columns of HEAD_TABLES: their k largest entries, and copying.

    A column of text follows each column of tokens. Attention is less the destination's mean over sources, logits are
    less the mean over outputs; `score` is their product.

    Returns:
        The files.
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
    for name, names in HEAD_TABLES.items():
        write_table(_with_text(names, rows[name], text), out / f"{name}.parquet")
    return [out / f"{name}.parquet" for name in HEAD_TABLES]


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


def effect_heatmap(found: fc.Result, file: Path, title: str) -> None:
    """Draw the change of the metric: by source and destination for pairs, by layer and head for heads and layers."""
    label = f"change of the {METRIC_NAMES[found.metric]}"
    if of_pairs(found):
        _pair_heatmap(found.labels, found.delta.tolist(), file, title, label)
    else:
        grid = found.delta.double().cpu().view(found.values.shape[0], -1).numpy()
        across = [str(i) for i in range(grid.shape[1])] if grid.shape[1] > 1 else ["all heads"]
        _heatmap(grid, [str(i) for i in range(grid.shape[0])], across, ("head", "layer"), file, title, label)


def composition_heatmap(found: Composition, file: Path, title: str) -> None:
    """Draw the z-score of every pair."""
    label = f"{found.kind}-composition, standard deviations from a random rotation"
    _pair_heatmap(found.pairs, found.z.tolist(), file, title, label)


def _pair_heatmap(pairs: Iterable[Any], values: list[float], file: Path, title: str, label: str) -> None:
    """Sources go down, destinations across."""
    sources, destinations = (sorted({tuple(head) for head in side}) for side in zip(*pairs, strict=True))
    grid = np.full((len(sources), len(destinations)), np.nan)
    for (source, destination), value in zip(pairs, values, strict=True):
        grid[sources.index(tuple(source)), destinations.index(tuple(destination))] = value
    down, across = (list(map(label_name, side)) for side in (sources, destinations))
    _heatmap(grid, down, across, ("destination head (layer.head)", "source head (layer.head)"), file, title, label)


def _heatmap(
    grid: Any, down: list[str], across: list[str], axes_names: tuple[str, str], file: Path, title: str, label: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = max(5.0, 0.45 * len(across)), max(4.0, 0.45 * len(down))
    figure, axes = plt.subplots(figsize=(min(size[0], 40) + 1.5, min(size[1], 40)), layout="constrained")
    bound = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_xticks(range(len(across)), across, rotation=90)
    axes.set_yticks(range(len(down)), down)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.set_title(title)
    if grid.size <= 400:
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * bound else "black"
                axes.text(j, i, f"{value:+.3f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, label=label)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
