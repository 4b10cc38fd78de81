"""Attention patterns: of one head over its tokens, and of many heads at a glance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyfastcircuits.drawing.matrix import Side, matrix, tiles
from pyfastcircuits.drawing.page import Picture, array


def causal(values: Any) -> Any:
    """The same with NaN where a source comes after its destination."""
    values = array(values).copy()
    later = np.triu(np.ones(values.shape[-2:], dtype=bool), 1)
    values[..., later] = np.nan
    return values


def pattern(values: Any, tokens: Sequence[str] | None, *, title: str, scale: str = "attention") -> Picture:
    """Draw a pattern [T, T], destinations down and sources across; what cannot be attended to is blank."""
    values = causal(values)
    names = [str(i) for i in range(len(values))] if tokens is None else list(tokens)
    groups = [] if tokens is not None else [(name, i, i + 1) for i, name in enumerate(names)]
    bound = max(1.0, float(np.nanmax(values, initial=0)))
    sides = Side("destination", names, groups), Side("source", names, groups)
    return matrix(
        values, *sides, title=title, scale=scale, rising=True, bound=bound, numbers=len(values) <= 16, square=True
    )


def glance(values: Any, layers: Sequence[int], *, title: str, scale: str = "attention") -> Picture:
    """Draw patterns [L, H, T, T] of some layers side by side: layers down and heads across."""
    sheet, down, across = tiles(causal(values))
    rows = Side("layer", [], [(str(layer), *group[1:]) for layer, group in zip(layers, down, strict=True)])
    caption = "In each square: destinations down, sources across."
    how: dict[str, Any] = {"rising": True, "bound": 1.0, "numbers": False, "square": True}
    return matrix(sheet, rows, Side("head", [], across), title=title, scale=scale, caption=caption, **how)
