"""Matrices: of pairs of heads, of heads by layer, attention patterns, and many small ones side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib
import numpy as np

from pyfastcircuits.drawing.page import (
    BAR,
    CELL,
    EDGE,
    LABEL,
    STYLE,
    TICK,
    WIDEST,
    Picture,
    array,
    colour_bar,
    colours,
    grouped_ticks,
    number,
    page,
    shown,
    text_width,
    widest,
)

Group = tuple[str, float, float]
LARGEST = 0.42  # inches of a cell
MOST = 700  # cells a side; of more, each cell shows the largest of a block


@dataclass
class Side:
    """What stands along a side of a matrix.

    Attributes:
        label: of the whole side.
        names: of each row or column.
        groups: (name, start, stop) of rows or columns that go together; they are named where single ones have no room.
    """

    label: str
    names: Sequence[str]
    groups: Sequence[Group] = field(default_factory=list)

    def ticks(self, inches: float, *, upright: bool) -> dict[float, str]:
        """Places and names where a row or column has so many inches; `upright`: names of columns as they are read."""
        names = [shown(name, 24) for name in self.names]
        if not names:
            return dict(grouped_ticks(self.groups, inches, TICK))
        room = widest(names, TICK) * 1.2 if upright else 1.25 * TICK / 72
        if inches >= room or not self.groups:
            every = 1 if inches >= room else int(np.ceil(room / inches))
            return {float(i): name for i, name in enumerate(names) if i % every == 0}
        return dict(grouped_ticks(self.groups, inches, TICK))


def matrix(
    values: Any,
    rows: Side,
    columns: Side,
    *,
    title: str,
    scale: str,
    caption: str = "",
    rising: bool = False,
    bound: float | None = None,
    numbers: bool = True,
    square: bool = False,
) -> Picture:
    """Draw a matrix [R, C] in colours; NaN is left blank.

    Args:
        values: [R, C].
        rows, columns: what stands along the sides.
        title, caption: above the matrix.
        scale: the quantity and its unit, beside the colour bar.
        rising: values are not negative, and the palette has one hue.
        bound: the value at the end of the palette; None: the largest magnitude.
        numbers: print the values into the cells if every one fits its cell.
        square: cells are as tall as wide.
    """
    with matplotlib.rc_context(STYLE):
        values = array(values)
        palette, norm = colours(values, rising=rising, bound=bound)
        values, rows, columns, note = _shrunk(values, rows, columns)
        wide, tall = (min(LARGEST, WIDEST / max(n, 1)) for n in reversed(values.shape))
        tall = max(tall, min(0.22, WIDEST / 3 / max(len(values), 1)))
        wide = max(wide, min(0.22, WIDEST / 3 / max(values.shape[1], 1)))
        wide, tall = (min(wide, tall),) * 2 if square else (wide, tall)
        if rows.label and text_width(rows.label, LABEL) > tall * len(values) + 0.1:  # it has no room beside them
            columns = replace(columns, label=f"{columns.label} (down: {rows.label})")
            rows = replace(rows, label="")
        down = rows.ticks(tall, upright=False)
        upright = not columns.names or wide >= 1.2 * widest([shown(x, 24) for x in columns.names], TICK)
        across = columns.ticks(wide, upright=upright)
        flat = upright or across.keys() <= {float((b + c - 1) / 2) for _, b, c in columns.groups}
        last = max(across, default=0.0)
        beyond = text_width(across[last], TICK) / 2 - (values.shape[1] - 0.5 - last) * wide if across and flat else 0.0
        under = 1.3 * TICK / 72 if flat else widest(list(across.values()), TICK)
        beneath = under + 0.09 + (1.4 * LABEL / 72 if columns.label else 0)
        picture, axes = page(
            wide * values.shape[1],
            tall * len(values),
            left=widest(list(down.values()), TICK) + 0.1 + (1.6 * LABEL / 72 if rows.label else 0),
            right=max(0.02, beyond - EDGE / 2),
            top=0.04,
            bottom=beneath + BAR,
            title=title,
            caption=" ".join(filter(None, (caption, note))),
        )
        image = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
        _dress(axes, (rows, columns), (down, across), (tall, wide), flat)
        if numbers:
            _print_numbers(axes, values, palette, norm, wide, tall)
        width, height = picture.get_size_inches()
        place = axes.get_position()
        if rows.label:
            picture.text(
                EDGE / width,
                (place.y0 + place.y1) / 2,
                rows.label,
                rotation=90, va="center", size=LABEL,
            )  # fmt: skip
        if columns.label:
            picture.text(place.x0, place.y0 - (under + 0.09) / height, columns.label, va="top", size=LABEL)
        colour_bar(picture, image, axes, beneath + 0.1, scale)
        return picture


def _dress(axes: Any, sides: tuple[Side, Side], ticks: Any, inches: tuple[float, float], flat: bool) -> None:
    """Ticks with their names, and white lines between groups that are large enough for them."""
    axes.set_yticks(list(ticks[0]), list(ticks[0].values()))
    axes.set_xticks(list(ticks[1]), list(ticks[1].values()), rotation=0 if flat else 90)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    for side, size, draw in zip(sides, inches, (axes.axhline, axes.axvline), strict=True):
        for _, start, stop in side.groups[1:] if side.names else ():
            if (across := (stop - start) * size) > 0.18:
                draw(start - 0.5, color="white", linewidth=0.8 if across > 0.3 else 0.4)


def _print_numbers(axes: Any, values: Any, palette: Any, norm: Any, wide: float, tall: float) -> None:
    finite = values[np.isfinite(values)]
    bound = float(np.abs(finite).max(initial=0))
    if not finite.size or finite.size > 1000 or tall < 1.35 * CELL / 72:
        return
    for digits in (3, 2):
        texts = {float(v): number(float(v), bound, digits) for v in finite}
        if widest(list(texts.values()), CELL) <= 0.88 * wide:
            break
    else:
        return
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = palette(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                j, i, texts[float(value)], ha="center", va="center", size=CELL, color="white" if dark else "black"
            )


def _shrunk(values: Any, rows: Side, columns: Side) -> tuple[Any, Side, Side, str]:
    """At most MOST cells a side, each the value of largest magnitude of a block, and a note that says so."""
    steps = [_step(n, side.groups) for n, side in zip(values.shape, (rows, columns), strict=True)]
    if steps == [1, 1]:
        return values, rows, columns, ""
    down, across = steps
    padding = [(0, -n % step) for n, step in zip(values.shape, steps, strict=True)]
    padded = np.pad(values, padding, constant_values=np.nan)
    tall, wide = padded.shape[0] // down, padded.shape[1] // across
    blocks = padded.reshape(tall, down, wide, across).transpose(0, 2, 1, 3).reshape(tall, wide, down * across)
    best = np.where(np.isnan(blocks), -1.0, np.abs(blocks)).argmax(-1)
    first, second = (
        Side(side.label, list(side.names)[::step], [(name, a / step, b / step) for name, a, b in side.groups])
        for side, step in ((rows, down), (columns, across))
    )
    note = f"Each cell shows the largest in size of {down} x {across}."
    return np.take_along_axis(blocks, best[..., None], -1)[..., 0], first, second, note


def _step(n: int, groups: Sequence[Group]) -> int:
    """How many rows go into one: the least number that leaves at most MOST, and divides groups of equal size."""
    sizes = {int(stop - start) for _, start, stop in groups}
    least = -(-n // MOST)
    if len(sizes) == 1 and least > 1:
        (size,) = sizes
        return next((k for k in range(least, size) if size % k == 0), max(size, least))
    return max(least, 1)


def tiles(values: Any, *, gap: float = 0.08) -> tuple[Any, list[Group], list[Group]]:
    """Matrices [M, N, R, C] as one, M down and N across with blank lines between them; and where each of them is."""
    values = array(values)
    many, along, rows, columns = values.shape
    space = max(1, round(gap * max(rows, columns)))
    out = np.full((many * (rows + space) - space, along * (columns + space) - space), np.nan)
    for i in range(many):
        for j in range(along):
            top, left = i * (rows + space), j * (columns + space)
            out[top : top + rows, left : left + columns] = values[i, j]
    down = [(str(i), i * (rows + space), i * (rows + space) + rows) for i in range(many)]
    across = [(str(j), j * (columns + space), j * (columns + space) + columns) for j in range(along)]
    return out, down, across
