"""Figures of a run: its attention patterns."""

from collections.abc import Sequence
from typing import Any

import torch

from pyfastcircuits.arguments import public
from pyfastcircuits.drawing.patterns import glance, pattern
from pyfastcircuits.run.nodes import parse_head
from pyfastcircuits.run.trace import FrozenTrace


@public
def attention(
    trace: FrozenTrace, head: Sequence[int], *, sequence: int = 0, tokens: Sequence[str] | None = None
) -> Any:
    """Draw the attention pattern of one head: destinations down, sources across; later sources are blank.

    Args:
        trace: a run.
        head: (layer, head).
        sequence: which one of the run.
        tokens: the texts of its tokens; None: positions.

    Raises:
        ValueError: the head is no pair of integers; as many tokens as positions were expected.
        IndexError: the model has no such head, the run no such sequence.
    """
    layer, index = parse_head(trace.weights, head)
    _check(trace, sequence, tokens)
    title = f"Attention pattern of head {layer}.{index}"
    return pattern(trace.pattern(layer)[sequence, index], tokens, title=title)


@public
@torch.no_grad()
def patterns(trace: FrozenTrace, *, sequence: int = 0, layers: Sequence[int] | None = None) -> Any:
    """Draw the attention patterns of all heads at a glance: layers down, heads across.

    Args:
        trace: a run.
        sequence: which one of the run.
        layers: only these; None: all.

    Raises:
        ValueError: there is no layer to draw.
        IndexError: no such layer or sequence.
    """
    _check(trace, sequence, None)
    chosen = list(range(trace.weights.n_layers)) if layers is None else list(layers)
    if not chosen:
        raise ValueError("layers is empty, or the model has none: there is nothing to draw")
    found = torch.stack([trace.pattern(layer)[sequence] for layer in chosen])
    return glance(found, chosen, title=f"Attention patterns of sequence {sequence}")


def _check(trace: FrozenTrace, sequence: int, tokens: Sequence[str] | None) -> None:
    count, length = trace.tokens.shape
    if not -count <= sequence < count:
        raise IndexError(f"sequence is {sequence}, expected 0 to {count - 1}")
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens has {len(tokens)} texts, expected {length}, one for each position")
