"""Virtual weights and virtual attention heads: components that talk through the residual stream.

The residual stream is a sum, so two components are connected by the product of the weights that write to it and those
that read from it, across any number of layers; and two heads in a row act as one, with a pattern and an OV circuit of
their own (Elhage et al. 2021). As in `vocabulary`, the weights are taken as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.vocabulary import embedded_tokens, through_final_gain
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.weights import CircuitWeights, Weight
from pyfastcircuits.run.nodes import Kind, parse_ends, parse_head
from pyfastcircuits.run.trace import FrozenTrace

_READS: dict[str, Weight] = {"Q": "W_Q", "K": "W_K", "V": "W_V"}


@public
@torch.no_grad()
def virtual_weights(
    weights: CircuitWeights,
    source: Sequence[int] | Literal["embed"],
    destination: Sequence[int] | Literal["unembed"],
    kind: Kind = "V",
    *,
    hops: Literal["direct", "all"] = "direct",
) -> FactoredMatrix:
    """The virtual weights from one component to another, through the residual stream.

    Args:
        weights: the model.
        source: "embed" (rows: W_E, [V, d]) or a head (rows: W_O, [r, d]).
        destination: a head (columns: W_Q, W_K or W_V by `kind`, [d, r]) or "unembed" (columns: W_U, [d, V']).
        kind: a destination head reads by its queries, "Q", its keys, "K", or its values, "V".
        hops: "direct": W_out @ W_in, the connection that skips every layer between. "all": the exact product
            W_out @ prod(I + sum_h OV_h) @ W_in over the layers strictly between, as if every head between passed on
            its own position's value.

    Returns:
        The product, factored: [r or V, r or V'] of inner dimension d.

    Raises:
        ValueError: a component, kind or hops is unknown; the source does not come before the destination.
        IndexError: the model has no such head.

    Source: "Virtual Weights and the Residual Stream as a Communication Channel", Elhage et al. 2021.
    """
    first, last = -1, weights.n_layers
    if isinstance(source, str):
        written = embedded_tokens(weights)
    else:
        head = parse_head(weights, source, "source")
        first, written = head.layer, weights.head("W_O", *head)
    if isinstance(destination, str):
        read = weights.W_U.to(weights.compute_dtype)
    else:
        head = parse_head(weights, destination, "destination")
        last, read = head.layer, weights.head(_READS[kind], *head)
    if first >= last:
        raise ValueError(f"source {tuple(source)} is not in a layer before destination {tuple(destination)}")
    for layer in range(first + 1, last if hops == "all" else first + 1):
        values = torch.einsum("nd,hdr->hnr", written, weights.heads("W_V", layer))
        written = written + torch.einsum("hnr,hrd->nd", values, weights.heads("W_O", layer))
    return FactoredMatrix(through_final_gain(weights, written) if destination == "unembed" else written, read)


class VirtualHead(NamedTuple):
    """Two heads in a row, as the one attention head that they make together."""

    pattern: Tensor  # [B, T, T]: rows are destinations, and sum to 1
    OV: FactoredMatrix  # [d, d]

    @public
    def plot(self, sequence: int = 0) -> Any:
        """Draw the pattern in one sequence.

        Raises:
            IndexError: no such sequence.
            ImportError: matplotlib is missing.
        """
        from pyfastcircuits.drawing.patterns import pattern

        if not -len(self.pattern) <= sequence < len(self.pattern):
            raise IndexError(f"sequence is {sequence}, expected 0 to {len(self.pattern) - 1}")
        return pattern(self.pattern[sequence], None, title="Pattern of the virtual attention head")

    def _repr_html_(self) -> str:
        """Its sizes, with a picture of its pattern in the first sequence."""
        from pyfastcircuits.drawing.notebook import card

        rows = [("pattern", str(list(self.pattern.shape))), ("OV", str(list(self.OV.shape)))]
        return card("Virtual attention head", ("what", "shape"), rows, self.plot)


@public
@torch.no_grad()
def virtual_head(trace: FrozenTrace, source: Sequence[int], destination: Sequence[int]) -> VirtualHead:
    """The virtual attention head of two heads: A2 @ A1 and OV1 @ OV2, norms left out.

    Without norms, the path through both writes `pattern @ x @ OV` to the residual stream, x being the embedded tokens.

    Raises:
        ValueError: the source is not in an earlier layer.
        IndexError: the model has no such head.

    Source: "Virtual Attention Heads", Elhage et al. 2021.
    """
    weights = trace.weights
    first, second = parse_ends(weights, source, destination)
    pattern = trace.pattern(second[0])[:, second[1]] @ trace.pattern(first[0])[:, first[1]]
    through = weights.head("W_O", *first) @ weights.head("W_V", *second)
    OV = FactoredMatrix(weights.head("W_V", *first), through @ weights.head("W_O", *second))
    return VirtualHead(pattern, OV)
