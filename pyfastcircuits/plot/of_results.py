"""Figures of what experiments found."""

from math import log
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.skip_trigrams import SkipTrigrams
from pyfastcircuits.drawing import labelled
from pyfastcircuits.drawing.marks import curve
from pyfastcircuits.drawing.marks import scatter as points
from pyfastcircuits.drawing.matrix import Side, matrix, tiles
from pyfastcircuits.experiments.orders import LayerMarginals
from pyfastcircuits.result import Result, label_name
from pyfastcircuits.sweeps.sweep import Sweep


@public
def orders(found: Sweep | Tensor, *, title: str | None = None) -> Any:
    """Draw the loss with all paths up to each order ("Term importance analysis", Elhage et al. 2021).

    Args:
        found: a Sweep, beside which the loss of a uniform prediction stands; or what order_losses gave, [K + 1] (with
            `per_token` [K + 1, B, T'], whose means are drawn).
        title: above the figure.

    Raises:
        ValueError: a tensor of another shape.
    """
    losses = found.orders if isinstance(found, Sweep) else found
    if losses.dim() not in (1, 3) or not len(losses):
        raise ValueError(f"found has shape {list(losses.shape)}, expected [K + 1] or [K + 1, B, T'] of order_losses")
    means = losses.detach().double().reshape(len(losses), -1).nanmean(-1)
    levels = {"uniform prediction:": log(found.trace.weights.d_vocab_out)} if isinstance(found, Sweep) else {}
    title = "Term importance: loss with all paths up to an order" if title is None else title
    x = "paths of at most so many heads"
    return curve(range(len(means)), {"loss": means}, title=title, x=x, y="loss (nats)", levels=levels, zero=True)


@public
def marginals(found: Sweep | LayerMarginals) -> Any:
    """Draw how much better the metric is with each layer's single-head paths; the same as `LayerMarginals.plot`."""
    return (found.marginals if isinstance(found, Sweep) else found).plot()


@public
def pairs(found: Result | Tensor, *, title: str | None = None, scale: str = "value") -> Any:
    """Draw a value for each pair of heads, sources down and destinations across; blank where there is no such pair.

    Args:
        found: a Result of pairs; or [L, H, L, H], such as composition_scores, source first.
        title: above the figure; None: what a result says of itself.
        scale: the quantity and its unit, where `found` is a tensor.

    Raises:
        ValueError: a result of something else than pairs, or a tensor of another shape; a model of one layer.
    """
    if isinstance(found, Result):
        if not found.labels or not all(isinstance(x, tuple) and len(x) == 2 for x in found.labels):
            raise ValueError("found is a Result of something else, expected one of pairs of heads")
        return found.plot(title=title)
    shape = list(found.shape)
    if len(shape) != 4 or shape[:2] != shape[2:] or not found.numel():
        raise ValueError(f"found has shape {shape}, expected [L, H, L, H]")
    if shape[0] < 2:
        raise ValueError(f"found is of {shape[0]} layer, expected two: a pair is of heads in different layers")
    cells = found.detach().double().cpu()
    return labelled.pairs(cells, label_name, title=title or "", scale=scale, rising=not bool((cells < 0).any()))


@public
def heads(found: Result | Tensor, *, title: str | None = None, scale: str = "value") -> Any:
    """Draw a value for each head, layers down and heads across.

    Args:
        found: a Result of heads; or [L, H], such as copying_scores.
        title, scale: as in pairs.

    Raises:
        ValueError: a result of something else than heads, or a tensor of another shape.
    """
    if isinstance(found, Result):
        if not _of_heads(found):
            raise ValueError("found is a Result of something else, expected one of heads")
        return found.plot(title=title)
    if found.dim() != 2 or not found.numel():
        raise ValueError(f"found has shape {list(found.shape)}, expected [L, H]")
    cells = found.detach().double().cpu()
    return labelled.by_layer(cells, title=title or "", scale=scale, rising=not bool((cells < 0).any()))


@public
def head_scores(found: Result) -> Any:
    """Draw every score of head_scores side by side, layers down and heads across.

    Raises:
        ValueError: a result of something else than heads.
    """
    if not _of_heads(found):
        raise ValueError("found is a Result of something else, expected what head_scores gives")
    names = found.measured
    values = torch.stack([getattr(found, name).detach().double().cpu() for name in names])
    sheet, _, across = tiles(values[None])
    layers = Side("layer", [str(i) for i in range(values.shape[1])])
    columns = Side("heads", [], [(name.replace("_", " "), a, b) for name, (_, a, b) in zip(names, across, strict=True)])
    rising = not bool((values < 0).any())
    return matrix(sheet, layers, columns, title="Scores of known heads", scale="score", rising=rising, bound=1.0)


@public
def scatter(found: Result, x: str, y: str) -> Any:
    """Draw two quantities of a result against each other, a point for each label; the outermost are named.

    Raises:
        ValueError: a quantity that was not measured; a result with positions.
    """
    if found.baseline.dim():
        raise ValueError("found has positions (per_token), expected one value for each label")
    for name, quantity in (("x", x), ("y", y)):
        if quantity not in found.measured:
            raise ValueError(f"{name} is {quantity!r}, expected one of {', '.join(found.measured)}")
    across, up = (getattr(found, quantity).detach().double().flatten() for quantity in (x, y))
    names = [label_name(label) for label in found.labels]
    words, other = (quantity.replace("_", " ") for quantity in (x, y))
    return points(across, up, names, title=f"{other.capitalize()} against {words}", x=words, y=other)


@public
def skip_trigrams(found: SkipTrigrams, n: int | None = None) -> Any:
    """Draw the n largest skip-trigrams of a head; the same as `found.plot(n)`."""
    return found.plot(n)


def _of_heads(found: Result) -> bool:
    return len(found.labels) > 0 and found.values.dim() == 2 and not found.baseline.dim()
