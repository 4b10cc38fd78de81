"""Figures of values that have labels: the labels say whether they are of pairs, of heads by layer, of layers or others.

A label is the number of a layer, a name, a path or set of heads (layer, head), or a pair of such things.
"""

from collections.abc import Callable, Hashable, Sequence
from math import isqrt
from typing import Any

import numpy as np

from pyfastcircuits.drawing.marks import bars, curve
from pyfastcircuits.drawing.matrix import Group, Side, matrix, tiles
from pyfastcircuits.drawing.page import Picture, array
from pyfastcircuits.drawing.patterns import causal

Name = Callable[[Hashable], str]
FILLED = 0.3  # the least share of a matrix that is there: what is emptier is shown as bars
UNITS = {"nats": 1.0, "millinats": 1e3, "micronats": 1e6}
WORDS = {
    "nll": "loss",
    "kl": "divergence",
    "top1": "top-1 accuracy",
    "z": "standard deviations from a random rotation",
}


def in_unit(quantity: str, values: Any, *, change: bool) -> tuple[Any, str]:
    """Values in a unit in which some reach a tenth, and the quantity in words with that unit."""
    words = WORDS.get(quantity, quantity.replace("_", " "))
    words = f"change of the {words}" if change else words
    if quantity in ("nll", "kl"):
        largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
        unit = next((unit for unit, scale in UNITS.items() if largest * scale >= 0.1 or not largest), "micronats")
        return values * UNITS[unit], f"{words} ({unit})"
    return values, words


def is_head(part: Hashable) -> bool:
    """Whether it is (layer, head)."""
    return isinstance(part, tuple) and len(part) == 2 and all(isinstance(x, int) for x in part)


def heads_side(label: str, heads: Sequence[Any], name: Name) -> Side:
    """A side of heads in order, grouped by layer."""
    groups: list[Group] = []
    for i, (layer, _) in enumerate(heads):
        start = groups.pop()[1] if groups and groups[-1][0] == f"layer {layer}" else i
        groups.append((f"layer {layer}", start, i + 1))
    return Side(label, [name(head) for head in heads], groups)


def grid(labels: Sequence[Any], values: Any) -> tuple[list[Any], list[Any], Any] | None:
    """What stands down and across, and values [R, C] with NaN where there is none, if labels are pairs that fill it."""
    if not labels or not all(isinstance(x, tuple) and len(x) == 2 and not is_head(x) for x in labels):
        return None
    sides = [list(dict.fromkeys(side)) for side in zip(*labels, strict=True)]
    sides = [sorted(side) if all(map(is_head, side)) else side for side in sides]
    if len(labels) < FILLED * len(sides[0]) * len(sides[1]):
        return None
    places = [{part: i for i, part in enumerate(side)} for side in sides]
    out = np.full((len(sides[0]), len(sides[1])), np.nan)
    at = [[place[part] for part in side] for place, side in zip(places, zip(*labels, strict=True), strict=True)]
    out[at[0], at[1]] = values
    return sides[0], sides[1], out


def one_point(labels: Sequence[Any]) -> list[Any] | None:
    """The head of each label, if all are of heads, or all of one point of a head each, such as its queries."""
    if not labels or not all(isinstance(x, tuple) and 0 < len(x) < 3 and is_head(x[0]) for x in labels):
        return None
    points = {x[1:] for x in labels}
    if len(points) > 1 or any(not isinstance(x, str) for point in points for x in point):
        return None
    return [x[0] for x in labels]


def picture(
    labels: Sequence[Any],
    values: Any,
    name: Name,
    best: Callable[[int], list[Hashable]],
    *,
    title: str,
    scale: str,
    rising: bool = False,
    bound: float | None = None,
    most: int = 30,
) -> Picture:
    """Draw a value for each label: a matrix, a curve over layers, or bars of those that matter most.

    Args:
        labels, values: N of each.
        name: a label in words.
        best: the n labels that matter most.
        title: above the figure.
        scale: the quantity and its unit.
        rising, bound: as in matrix.
        most: bars to draw.
    """
    values = array(values)
    how: dict[str, Any] = {"title": title, "scale": scale, "rising": rising, "bound": bound}
    heads = one_point(labels)
    found = grid(labels, values) if heads is None else None
    if found is not None:
        down, across, cells = found
        if all(map(is_head, down)) and all(map(is_head, across)):
            strongest = ", ".join(name(label) for label in best(3))
            return matrix(
                cells,
                heads_side("source head", down, name),
                heads_side("destination head", across, name),
                caption=f"Largest: {strongest}.",
                **how,
            )
        return matrix(cells, Side("", list(map(name, down))), Side("", list(map(name, across))), **how)
    if heads is not None:
        cells = np.full([1 + max(head[i] for head in heads) for i in (0, 1)], np.nan)
        cells[tuple(zip(*heads, strict=True))] = values
        return by_layer(cells, **how)
    if labels and all(isinstance(label, int) for label in labels):
        return curve(list(labels), {scale: values}, title=title, x="layer", y=scale)
    chosen = best(most)
    place = {label: i for i, label in enumerate(labels)}
    more = f"The {len(chosen)} that matter most of {len(labels)}." if len(chosen) < len(labels) else ""
    return bars([name(x) for x in chosen], values[[place[x] for x in chosen]], title=title, x=scale, caption=more)


def by_layer(cells: Any, **how: Any) -> Picture:
    """Draw a value for each head, [L, H]."""
    layers, heads = np.shape(cells)
    return matrix(
        cells, Side("layer", list(map(str, range(layers)))), Side("head", list(map(str, range(heads)))), **how
    )


def pairs(values: Any, name: Name, **how: Any) -> Picture:
    """Draw a value for each pair of heads, [L, H, L, H]; blank where the source is not in an earlier layer."""
    values = array(values)
    layers, heads, _, _ = values.shape
    cells = values.reshape(layers * heads, layers * heads).copy()
    layer = np.arange(layers * heads) // heads
    cells[layer[:, None] >= layer] = np.nan
    every = [divmod(i, heads) for i in range(layers * heads)]
    down, across = every[: (layers - 1) * heads], every[heads:]
    there = cells[: (layers - 1) * heads, heads:]
    sizes = np.where(np.isnan(there), -1.0, np.abs(there)).ravel()
    largest = np.argpartition(-sizes, min(3, sizes.size - 1))[:3]
    top = [np.unravel_index(i, there.shape) for i in largest[np.argsort(-sizes[largest])] if sizes[i] >= 0]
    strongest = ", ".join(f"{name(down[i])} -> {name(across[j])}" for i, j in top)
    sides = heads_side("source head", down, name), heads_side("destination head", across, name)
    return matrix(there, *sides, caption=f"Largest: {strongest}.", **how)


def by_position(names: Sequence[str], values: Any, tokens: Sequence[str] | None, **how: Any) -> Picture:
    """Draw values [N, T] of N labels at each position."""
    positions = tokens or [str(i) for i in range(np.shape(values)[1])]
    numbered = [(str(i), i, i + 1) for i in range(len(positions))]
    return matrix(values, Side("", names), Side("position", positions, [] if tokens else numbered), **how)


def by_source(labels: Sequence[Any], values: Any, name: Name, **how: Any) -> Picture:
    """Draw values [N, T, T] of N labels at each destination and source; in a square of them if labels are pairs."""
    values = causal(values)
    side = isqrt(len(values))
    if side * side != len(values) or not side:
        values, side, labels = values[:1], 1, labels[:1]
    sheet, down, across = tiles(values.reshape(side, side, *values.shape[1:]))
    first, second = [x[0] for x in labels[::side]], [x[1] for x in labels[:side]]
    rows, columns = (
        [(name(part), start, stop) for part, (_, start, stop) in zip(parts, groups, strict=True)]
        for parts, groups in ((first, down), (second, across))
    )
    return matrix(sheet, Side("query", [], rows), Side("key", [], columns), numbers=False, square=True, **how)
