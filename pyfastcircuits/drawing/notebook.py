"""What notebooks show of a finding: a sentence, a table of what matters most, and its picture."""

import base64
from collections.abc import Callable, Sequence
from html import escape
from typing import Any


def card(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], draw: Callable[[], Any] | None) -> str:
    """HTML of a table and a picture; without the picture where there are no rows, no `draw` or no matplotlib.

    Every text is escaped.
    """
    cells = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>" if rows else ""
    return f"<div><p>{escape(title)}</p>{table}{_image(title, draw) if rows and draw else ''}</div>"


def _image(title: str, draw: Callable[[], Any]) -> str:
    try:
        content = base64.b64encode(draw().png()).decode()
    except ImportError:
        return ""
    return f"<img alt='{escape(title)}' style='max-width:100%' src='data:image/png;base64,{content}'>"
