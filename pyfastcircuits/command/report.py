"""What a sweep shows and writes: tables (rich), Parquet (pyarrow), a heatmap (matplotlib)."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyfastcircuits.circuits.composition import Kind
from pyfastcircuits.circuits.vocabulary import positivity
from pyfastcircuits.command.text import TokenText
from pyfastcircuits.experiments.sweep import Example, Sweep, uniform_loss
from pyfastcircuits.result import Result, label_name

__all__ = [
    "Composition",
    "composition_heatmap",
    "composition_table",
    "effect_heatmap",
    "effect_table",
    "marginal_table",
    "order_table",
    "write_composition",
    "write_orders",
    "write_table",
]

# Elhage et al. 2021, "Term importance analysis", two layers: fall of the loss in nats.
ARTICLE_ORDERS = (1.8, 5.2, 0.3)
ARTICLE_MARGINALS = ((1.3, 0.05), (5.2, 4.0))


METRIC_NAMES = {
    "nll": "loss",
    "kl": "divergence",
    "logit_difference": "logit difference",
    "probability": "probability",
    "rank": "rank",
    "top1": "top-1 accuracy",
}


def _order_rows(sweep: Sweep) -> list[tuple[str, float]]:
    orders = sweep.orders.tolist()
    names = ["order 0 (direct path)", *(f"order <= {k}" for k in range(1, len(orders)))]
    rows = [("uniform", uniform_loss(sweep.trace.weights)), *zip(names, orders, strict=True)]
    return [*rows, ("full model", float(sweep.trace.loss))]


def order_table(sweep: Sweep) -> Table:
    """Loss with the paths of each order added, beside the article's two-layer model."""
    table = Table(title="Term importance: loss with all paths up to an order, in nats")
    for name in ("paths", "loss", "fall", "article's fall"):
        table.add_column(name, justify="left" if name == "paths" else "right")
    before = None
    for i, (name, loss) in enumerate(_order_rows(sweep)):
        article = f"{ARTICLE_ORDERS[i - 1]}" if 1 <= i <= len(ARTICLE_ORDERS) and name != "full model" else ""
        fall = "" if before is None else f"{round(before - loss, 4) + 0.0:.4f}"  # no negative zero
        table.add_row(name, f"{loss:.4f}", fall, article)
        before = loss
    return table


def marginal_table(sweep: Sweep) -> Table:
    """Each layer's heads as order-1 terms, beside the article's two-layer model."""
    table = Table(title="Marginal effect of each layer's single-head paths: fall of the loss, in nats")
    columns = ("given the direct path alone", "article", "given the other layers too", "article")
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for layer, values in enumerate(zip(*(m.tolist() for m in sweep.marginals), strict=True)):
        article = ARTICLE_MARGINALS[layer] if len(sweep.orders) == 3 else ("", "")
        table.add_row(str(layer + 1), f"{values[0]:.4f}", f"{article[0]}", f"{values[1]:.4f}", f"{article[1]}")
    return table


def effect_table(found: Result, examples: list[Example], text: TokenText) -> Table:
    """The ablations that harm most, each with the token that suffers most."""
    verb = {"rise": "rise", "fall": "fall", "size": "change"}[found.order]
    kind = "Head pairs whose path" if found.setup.get("scope") == "path" else "What"
    unit = ", in nats" if found.metric in ("nll", "kl") else ""
    table = Table(title=f"{kind} matters most: {verb} of the {METRIC_NAMES[found.metric]} without it{unit}")
    names = (
        ("source", "dest")
        if _in_pairs(found)
        else ("layer",)
        if found.what and isinstance(found.what[0], int)
        else ("head",)
    )
    for name in (*names, verb, "kl"):
        table.add_column(name, justify="right")
    table.add_column("hit hardest: context -> token (with, without)")
    kl = dict(zip(found.what, found.kl.flatten().tolist(), strict=True)) if "kl" in found.measured else {}
    for (label, change), example in zip(found.top(len(examples)), examples, strict=True):
        shown = Text(text(example.context)[-40:], style="dim")
        shown.append(" -> ").append(repr(text([example.target])), style="bold")
        shown.append(f" ({example.clean:.2f}, {example.ablated:.2f})")
        cells = map(label_name, label) if _in_pairs(found) else [label_name(label)]
        table.add_row(*cells, f"{change:+.4f}", f"{kl[label]:.4f}" if kl else "", shown)
    return table


def _in_pairs(found: Result) -> bool:
    return "scope" in found.setup


def write_orders(sweep: Sweep, file: Path) -> None:
    """One row for each step of the order table: paths, loss, fall (nats)."""
    names, losses = zip(*_order_rows(sweep), strict=True)
    falls = [None, *(a - b for a, b in pairwise(losses))]
    write_table(pa.table({"paths": list(names), "loss": list(losses), "fall": falls}), file)


def _head_columns(pairs: Tensor) -> dict[str, pa.Array]:
    heads = pairs.reshape(-1, 4)
    names = ("source_layer", "source_head", "dest_layer", "dest_head")
    return {name: pa.array(heads[:, i].numpy(), pa.int32()) for i, name in enumerate(names)}


def _floats(x: Tensor) -> pa.Array:
    return pa.array(x.double().cpu().numpy())


def write_table(table: pa.Table, file: Path) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.replace(file)


def effect_heatmap(found: Result, file: Path, title: str) -> None:
    """The change of the metric: of every pair, sources down, destinations across; of every head, by layer and head."""
    label = f"change of the {METRIC_NAMES[found.metric]}"
    if _in_pairs(found):
        _pair_heatmap(found.pairs.tolist(), found.delta.tolist(), file, title, label)
    else:
        grid = found.delta.double().cpu().view(found.values.shape[0], -1).numpy()
        across = [str(i) for i in range(grid.shape[1])] if grid.shape[1] > 1 else ["all heads"]
        _heatmap(grid, [str(i) for i in range(grid.shape[0])], across, ("head", "layer"), file, title, label)


def _pair_heatmap(heads: list[list[list[int]]], values: list[float], file: Path, title: str, label: str) -> None:
    import numpy as np

    sources = sorted({tuple(pair[0]) for pair in heads})
    destinations = sorted({tuple(pair[1]) for pair in heads})
    grid = np.full((len(sources), len(destinations)), np.nan)
    for (source, destination), value in zip(heads, values, strict=True):
        grid[sources.index(tuple(source)), destinations.index(tuple(destination))] = value
    down, across = ([f"{a}.{b}" for a, b in side] for side in (sources, destinations))
    _heatmap(grid, down, across, ("destination head (layer.head)", "source head (layer.head)"), file, title, label)


def _heatmap(
    grid: Any, down: list[str], across: list[str], axes_names: tuple[str, str], file: Path, title: str, label: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

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


@dataclass(frozen=True)
class Composition:
    """Composition scores of all pairs of heads with layer1 < layer2, and what goes with them."""

    kind: Kind
    pairs: list[list[list[int]]]  # of (layer, head): source, destination
    score: Tensor  # [P]
    baseline: Tensor  # [P]: mean under a random rotation
    z: Tensor  # [P]
    eigenvalues: Tensor  # [P, r] complex, of the K-composed QK circuit; [0, r] for other kinds
    copying: Tensor  # [L, H]


def composition_table(found: Composition, top: int) -> Table:
    """The pairs that stand out most from a random rotation, by z-score."""
    title = f"{found.kind}-composition: pairs that stand out most from a random rotation"
    table = Table(title=title, collapse_padding=True)
    names = ["source", "dest", "score", "random", "z", "source copies", "dest copies"]
    for name in [*names, *(["composed QK", "largest"] if len(found.eigenvalues) else [])]:
        table.add_column(name, justify="right", overflow="fold")  # in a narrow window, of names rather than figures
    for i in found.z.argsort(descending=True)[:top].tolist():
        (a, b), (c, d) = found.pairs[i]
        row = [f"{a}.{b}", f"{c}.{d}", *(f"{float(x[i]):.4f}" for x in (found.score, found.baseline))]
        row += [f"{float(found.z[i]):+.1f}", *(f"{float(found.copying[head]):+.2f}" for head in ((a, b), (c, d)))]
        if len(found.eigenvalues):
            spectrum = found.eigenvalues[i]
            largest = complex(spectrum[spectrum.abs().argmax()])
            row += [f"{float(positivity(spectrum)):+.2f}", f"{largest.real:.1e}"]
        table.add_row(*row)
    caption = ["random: mean score under a random rotation; z: score**2 against it. copies: eigenvalue copying score."]
    if len(found.eigenvalues):
        caption += [
            "composed QK: positivity of the K-composed QK circuit's eigenvalues; largest: real part of the largest."
        ]
    table.caption = "\n".join(caption)
    return table


def write_composition(found: Composition, file: Path) -> None:
    """One row for each pair: source_layer, source_head, dest_layer, dest_head, score, baseline, z; with K-composition,
    the eigenvalues of the composed QK circuit as lists, real and imaginary.
    """
    columns = _head_columns(torch.tensor(found.pairs, dtype=torch.long))
    columns |= {name: _floats(getattr(found, name)) for name in ("score", "baseline", "z")}
    if len(found.eigenvalues):
        parts = {"eigenvalues_real": found.eigenvalues.real, "eigenvalues_imag": found.eigenvalues.imag}
        columns |= {name: pa.array(x.double().cpu().tolist()) for name, x in parts.items()}
    write_table(pa.table(columns), file)


def composition_heatmap(found: Composition, file: Path, title: str) -> None:
    """z-score of every pair: sources down, destinations across."""
    label = f"{found.kind}-composition, standard deviations from a random rotation"
    _pair_heatmap(found.pairs, found.z.tolist(), file, title, label)
