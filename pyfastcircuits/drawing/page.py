"""The page that figures are drawn on: sizes in inches, fonts, palettes, and texts that fit.

Every figure is laid out from the sizes of its texts, as a renderer measures them, so that nothing overlaps or is cut
off. None goes through pyplot, so none stays open.
"""

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

INK, FAINT = "#222222", "#6b6b6b"
BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette: told apart with any colour vision
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
TITLE, LABEL, TICK, CELL = 9.5, 8.0, 7.0, 6.5  # sizes of fonts in points
WIDEST = 7.0  # inches of axes: with margins, the width of a page
NARROWEST = 4.2  # inches of a figure, so that titles have room
EDGE = 0.12  # inches around everything
STYLE = {
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.linewidth": 0.6, "axes.labelsize": LABEL,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": TICK, "ytick.labelsize": TICK, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "legend.fontsize": TICK, "legend.frameon": False,
    "text.color": INK, "text.parse_math": False, "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip


class Picture(Figure):
    """A matplotlib figure that notebooks show; `savefig` writes PNG, SVG or PDF by the ending of the file."""

    def draw(self, renderer: Any) -> None:
        """Draw in this library's style, whatever the caller's is: matplotlib makes some texts only now."""
        with quiet_fonts(), matplotlib.rc_context(STYLE):
            super().draw(renderer)

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write the figure: PNG in 200 dots an inch unless `dpi` says otherwise; texts of a PDF stay texts."""
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "pyfastcircuits"}):
            super().savefig(fname, **{"dpi": 200, **options})

    def png(self, dpi: float = 110) -> bytes:
        """The figure as a PNG file."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=dpi)
        return file.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without warnings of letters that the font has not, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


@lru_cache(4096)
def text_width(text: str, size: float) -> float:
    """The width in inches of the widest line of a text."""
    font = FontProperties(size=size)
    with quiet_fonts():
        return max(text_to_path.get_text_width_height_descent(x, font, False)[0] for x in text.split("\n")) / 72


def widest(texts: Sequence[str], size: float) -> float:
    """The width in inches of the widest of some texts."""
    return max((text_width(text, size) for text in texts), default=0.0)


def wrapped(text: str, width: float, size: float) -> str:
    """The text in lines of at most so many inches."""
    return "\n".join(textwrap.wrap(text, max(12, int(width * 72 / (0.58 * size)))))


def shown(text: object, most: int = 40) -> str:
    """A text on one line: spaces at its ends as "·", line breaks as "↵", what is not printable escaped."""
    whole = "".join(
        "↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )
    ends = len(whole) - len(whole.lstrip(" ")), len(whole) - len(whole.rstrip(" "))
    if whole:
        whole = "·" * len(whole) if whole.isspace() else "·" * ends[0] + whole.strip(" ") + "·" * ends[1]
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def array(values: Any) -> Any:
    """A tensor of any device and type, or whatever numpy takes, as an array in double precision."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values if values.is_complex() else values.double()).numpy()
    return np.asarray(values)


def number(value: float, bound: float, digits: int = 3) -> str:
    """A value with as many places as give `bound` so many digits; what rounds to zero is "0"."""
    if not np.isfinite(value):
        return "" if np.isnan(value) else str(value)
    places = int(np.clip(digits - 1 - np.floor(np.log10(bound)), 0, 8)) if bound > 0 else 0
    text = f"{value:.{places}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


DIVERGING = LinearSegmentedColormap.from_list(  # from blue over light grey to red: white is left for what is not there
    "blue_grey_red", ["#08306b", "#2b74b3", "#8fbcdb", "#e3e3e3", "#f0a184", "#c93f3a", "#67001f"]
)
RISING = LinearSegmentedColormap.from_list("grey_blue", ["#ececec", "#a9cbe4", "#4a93c9", "#135a9e", "#08264f"])


def colours(values: Any, *, rising: bool = False, bound: float | None = None) -> tuple[Any, Normalize]:
    """The palette and its scale: diverging and centred at zero, or from zero up if `rising`."""
    finite = np.abs(values[np.isfinite(values)])
    bound = bound or float(finite.max(initial=0)) or 1.0
    return (RISING, Normalize(0, bound)) if rising else (DIVERGING, Normalize(-bound, bound))


def page(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float, title: str, caption: str = ""
) -> tuple[Picture, Any]:
    """A picture with axes of so many inches, margins around them, a title above and a caption beneath it.

    `left`, `right`, `top` and `bottom` are what the axes' own texts need.
    """
    whole = max(NARROWEST, EDGE + left + width + right + EDGE)
    title, caption = wrapped(shown(title, 200), whole - 2 * EDGE, TITLE), wrapped(caption, whole - 2 * EDGE, TICK)
    heads = [(text, size, colour) for text, size, colour in ((title, TITLE, INK), (caption, TICK, FAINT)) if text]
    head = sum(1.3 * size / 72 * (text.count("\n") + 1) + 0.05 for text, size, _ in heads)
    tall = EDGE + bottom + height + top + head + EDGE
    picture = Picture(figsize=(whole, tall))
    y = tall - EDGE
    for text, size, colour in heads:
        picture.text(EDGE / whole, y / tall, text, size=size, color=colour, va="top", linespacing=1.2)
        y -= 1.3 * size / 72 * (text.count("\n") + 1) + 0.05
    box = ((EDGE + left) / whole, (EDGE + bottom) / tall, width / whole, height / tall)
    return picture, picture.add_axes(box)


def colour_bar(picture: Picture, mappable: Any, axes: Any, beneath: float, label: str) -> None:
    """A horizontal colour bar of at most 2.4 inches, so many inches beneath the axes, its label at its right."""
    width, height = picture.get_size_inches()
    place = axes.get_position()
    long = min(2.4, max(1.4, place.width * width / 2))
    box = (place.x0, place.y0 - (beneath + 0.1) / height, long / width, 0.1 / height)
    bar = picture.colorbar(mappable, cax=picture.add_axes(box), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=TICK, length=2)
    bar.locator = matplotlib.ticker.MaxNLocator(4)
    bar.update_ticks()
    room = width - (place.x0 * width + long + 0.2) - EDGE
    picture.text(
        place.x0 + (long + 0.16) / width, box[1] + box[3] / 2, wrapped(label, room, LABEL), size=LABEL, va="center"
    )


BAR = 0.42  # inches that a colour bar and its figures take, beneath what is above it


def grouped_ticks(groups: Sequence[tuple[str, float, float]], inches: float, size: float) -> Mapping[float, str]:
    """Names in the middle of groups (name, start, stop), as many as fit when a unit has so many inches."""
    room = max(1.15 * widest([name for name, _, _ in groups], size), 1.3 * size / 72)
    kept: dict[float, str] = {}
    last = -np.inf
    for name, start, stop in groups:
        middle = (start + stop - 1) / 2
        if (middle - last) * inches >= room:
            kept[middle], last = name, middle
    return kept
