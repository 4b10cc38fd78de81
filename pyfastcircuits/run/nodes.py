"""Heads as nodes of a circuit, and how a head that a caller names is checked."""

from collections.abc import Sequence
from typing import NamedTuple

from pyfastcircuits.model.weights import CircuitWeights

__all__ = ["Head", "parse_head"]


class Head(NamedTuple):
    """One attention head of a model."""

    layer: int
    head: int


def parse_head(weights: CircuitWeights, head: Sequence[int], name: str = "head") -> Head:
    """The head of a pair (layer, head); `name` is what messages call it.

    Raises:
        ValueError: the head is not a pair of integers.
        IndexError: the model has no such head.
    """
    try:
        layer, index = (int(x) for x in head)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {head!r}, expected (layer, head)") from None
    if not (0 <= layer < weights.n_layers and 0 <= index < weights.n_heads):
        raise IndexError(
            f"{name} is {layer}.{index}; the model has layers 0 to {weights.n_layers - 1} "
            f"and heads 0 to {weights.n_heads - 1}"
        )
    return Head(layer, index)
