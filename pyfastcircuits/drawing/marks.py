"""Curves, bars, points, and eigenvalues on the complex plane."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from pyfastcircuits.drawing.page import (
    BLUE,
    CELL,
    FAINT,
    INK,
    ORANGE,
    SERIES,
    STYLE,
    TICK,
    Picture,
    array,
    number,
    page,
    shown,
    text_width,
    widest,
)


def _open(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def curve(
    places: Sequence[float],
    series: Mapping[str, Any],
    *,
    title: str,
    x: str,
    y: str,
    caption: str = "",
    levels: Mapping[str, float] | None = None,
    zero: bool = False,
) -> Picture:
    """Draw series of values over whole numbers, such as layers or orders, each point marked.

    Args:
        places: [N], the numbers.
        series: a name and [N] values each; a single one needs no name.
        title, caption: above the figure.
        x, y: what the axes show, with its unit.
        levels: values that are drawn as dotted lines, by name.
        zero: the axis begins at zero, or at what is below it.
    """
    with matplotlib.rc_context(STYLE):
        arrays = {name: array(values) for name, values in series.items()}
        named = len(arrays) > 1
        picture, axes = page(
            4.6, 2.5, left=0.62, right=0.25, top=0.22 * named + 0.04, bottom=0.48, title=title, caption=caption
        )
        marker = "o" if len(places) <= 40 else None
        for (name, values), colour in zip(arrays.items(), SERIES, strict=False):
            axes.plot(places, values, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=shown(name))
        bound = max((float(np.abs(v[np.isfinite(v)]).max(initial=0)) for v in arrays.values()), default=0.0)
        for name, value in (levels or {}).items():
            axes.axhline(value, color=FAINT, linewidth=0.8, linestyle=":")
            text = f"{name} {number(value, bound)}"
            axes.annotate(
                text,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                size=CELL,
                color=FAINT,
            )
        if not named and len(places) <= 10:
            for place, value in zip(places, next(iter(arrays.values()), ()), strict=True):
                axes.annotate(
                    number(float(value), bound),
                    (place, value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    size=CELL,
                )
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if len(places) == 1:
            axes.set_xlim(places[0] - 1, places[0] + 1)
        axes.margins(x=0.06, y=0.12)
        if zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0] if any((v < 0).any() for v in arrays.values()) else 0.0))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _open(axes)
        if named:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(arrays)), borderpad=0, borderaxespad=0.3
            )
        return picture


def bars(names: Sequence[str], values: Any, *, title: str, x: str, caption: str = "") -> Picture:
    """Draw a bar for each name, from top to bottom, with its value at its end; negative ones in another colour."""
    with matplotlib.rc_context(STYLE):
        values, names = array(values), [shown(name, 60) for name in names]
        finite = values[np.isfinite(values)]
        bound = float(np.abs(finite).max(initial=0))
        texts = [number(float(v), bound) for v in values]
        room = widest(texts, TICK) + 0.08
        low, high = min(0.0, float(finite.min(initial=0))), max(0.0, float(finite.max(initial=0)))
        span = (high - low) or 1.0
        before, long = (room if low < 0 else 0.0), 3.2
        picture, axes = page(
            long + before + (room if high > 0 or low == 0 else 0.05),
            0.19 * max(len(names), 1) + 0.08,
            left=widest(names, TICK) + 0.1,
            right=0.05,
            top=0.02,
            bottom=0.46,
            title=title,
            caption=caption,
        )
        tall = np.arange(len(names))
        axes.barh(tall, np.nan_to_num(values), color=np.where(values < 0, BLUE, ORANGE), height=0.72)
        for place, value, text in zip(tall, values, texts, strict=True):
            down = value < 0
            axes.annotate(
                text,
                (value if np.isfinite(value) else 0, place),
                xytext=(-3 if down else 3, 0),
                textcoords="offset points",
                ha="right" if down else "left",
                va="center",
                size=TICK,
            )
        axes.axvline(0, color=FAINT, linewidth=0.6)
        width = axes.get_position().width * picture.get_size_inches()[0]
        unit = span / long
        axes.set_xlim(low - before * unit, low - before * unit + width * unit)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(tall, names)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        return picture


def scatter(
    across: Any, up: Any, names: Sequence[str], *, title: str, x: str, y: str, caption: str = "", most: int = 12
) -> Picture:
    """Draw a point for each name, and write the names of those farthest from the middle where they have room."""
    with matplotlib.rc_context(STYLE):
        across, up = array(across), array(up)
        picture, axes = page(4.2, 3.4, left=0.6, right=0.5, top=0.04, bottom=0.48, title=title, caption=caption)
        axes.scatter(across, up, s=12, color=BLUE, alpha=0.65, linewidths=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(0.08)
        axes.axhline(0, color=FAINT, linewidth=0.4, zorder=0)
        axes.axvline(0, color=FAINT, linewidth=0.4, zorder=0)
        _open(axes)
        there = np.isfinite(across) & np.isfinite(up)
        if there.any():
            points = np.stack([across, up], -1)
            middle, width = np.median(points[there], 0), np.ptp(points[there], 0)
            far = np.abs((points - middle) / np.where(width > 0, width, 1)).max(-1)
            taken: list[tuple[float, float, float, float]] = []
            for i in np.argsort(-np.where(there, far, -1), kind="stable")[: 4 * most]:
                left, bottom = axes.transData.transform(points[i]) / picture.dpi + (0.05, 0.03)
                box = (left, bottom, left + text_width(shown(names[i]), CELL), bottom + CELL / 72)
                free = all(box[0] > t[2] or t[0] > box[2] or box[1] > t[3] or t[1] > box[3] for t in taken)
                if there[i] and free and len(taken) < most:
                    taken.append(box)
                    axes.annotate(shown(names[i]), points[i], xytext=(3.6, 2.2), textcoords="offset points", size=CELL)
        return picture


def spectra(eigenvalues: Any, names: Sequence[str], *, title: str, caption: str = "") -> Picture:
    """Draw eigenvalues [N, r] on the complex plane, a panel for each name, in units of its largest modulus."""
    with matplotlib.rc_context(STYLE):
        values = array(eigenvalues)
        across = min(len(names), 6)
        down = -(-len(names) // across) if names else 1
        side, gap, above = 0.98, 0.12, 0.3
        names = [shown(name, 24) for name in names]
        step = max(side, widest(names, CELL)) + gap
        picture, whole = page(
            across * step,
            down * (side + above),
            left=0.1,
            right=0.1,
            top=0.0,
            bottom=0.05,
            title=title,
            caption=caption,
        )
        width, height = picture.get_size_inches()
        corner = whole.get_position()
        whole.remove()
        for i, (name, some) in enumerate(zip(names, values, strict=True)):
            row, column = divmod(i, across)
            box = (
                corner.x0 + column * step / width,
                corner.y1 - ((row + 1) * (side + above)) / height,
                side / width,
                side / height,
            )
            axes = picture.add_axes(box)
            size = np.abs(some).max(initial=0) or 1.0
            turn = np.linspace(0, 2 * np.pi, 100)
            axes.plot(np.cos(turn), np.sin(turn), color="#d0d0d0", linewidth=0.5)
            axes.axhline(0, color="#d0d0d0", linewidth=0.5)
            axes.axvline(0, color="#d0d0d0", linewidth=0.5)
            axes.scatter(
                some.real / size, some.imag / size, s=9, alpha=0.8, linewidths=0,
                color=np.where(some.real >= 0, ORANGE, BLUE),
            )  # fmt: skip
            axes.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(name, size=CELL, color=INK, pad=2)
        return picture
