"""What is in a figure, as a renderer lays it out."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def drawn(figure):
    """The canvas, after everything has been laid out."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts(figure):
    """Every text that is seen, with its box in pixels."""
    renderer = drawn(figure).get_renderer()
    axes = [axis for some in figure.axes for axis in (some.xaxis, some.yaxis)]
    every = {text for axis in axes for tick in axis.get_major_ticks() for text in (tick.label1, tick.label2)}
    inside = {tick.label1 for axis in axes for tick in axis._update_ticks()}  # those that are drawn
    found = [x for x in figure.findobj(Text) if x.get_visible() and x.get_text().strip()]
    return [(x.get_text(), x.get_window_extent(renderer)) for x in found if x in inside or x not in every]


def overlapping(figure):
    """Pairs of texts that cover each other by more than a pixel."""
    found = texts(figure)
    return [
        (a, b)
        for (a, x), (b, y) in itertools.combinations(found, 2)
        if min(x.x1, y.x1) - max(x.x0, y.x0) > 1 and min(x.y1, y.y1) - max(x.y0, y.y0) > 1
    ]


def cut_off(figure):
    """Texts that reach beyond the figure."""
    width, height = figure.bbox.size
    return [name for name, b in texts(figure) if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


def pixels(figure):
    """[height, width, 3], from 0 to 1."""
    return np.asarray(drawn(figure).buffer_rgba())[..., :3] / 255


def pixel(figure, row, column):
    """The colour in the middle of a cell of the first matrix."""
    axes, image = figure.axes[0], pixels(figure)
    x, y = axes.transData.transform((column, row))
    return image[len(image) - 1 - int(y), int(x)]
