"""Full circuits where positions come in: token and positional terms, kept apart.

Attention scores are bilinear in what queries and keys read, so positions added to tokens give four terms: token-token,
token-position, position-token and position-position (Elhage et al. 2021). What a head copies has two, where positions
are added to the residual stream.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.circuits.composition import checked_head
from pyfastcircuits.circuits.vocabulary import ov_circuit, queries_and_keys, read_embeddings
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.weights import CircuitWeights

__all__ = ["OVTables", "QKTables", "ov_tables", "qk_tables"]


class QKTables(NamedTuple):
    """Terms of a head's attention scores: rows destinations, columns sources; None where there is no W_pos."""

    token_token: FactoredMatrix  # [V, V]
    token_position: FactoredMatrix | None  # [V, n_ctx]: a token's query, a position's key
    position_token: FactoredMatrix | None  # [n_ctx, V]
    position_position: FactoredMatrix | None  # [n_ctx, n_ctx]


class OVTables(NamedTuple):
    """Terms of what attending to a source (row) adds to the logits of an output token (column)."""

    token: FactoredMatrix  # [V, V]
    position: FactoredMatrix | None  # [n_ctx, V]; None unless positions are added to the residual stream


@torch.no_grad()
def qk_tables(
    weights: CircuitWeights, head: Sequence[int], *, scaled: bool = True, normed: bool = False, offset: int = 0
) -> QKTables:
    """The attention scores of a head over all tokens and positions, as terms that sum to them.

    Biases count with the tokens: b_Q is in every token's query, b_K in every token's key (which shifts all scores of a
    destination alike, and so changes no pattern). For a first layer the sum is exactly the scores of the model: without
    a norm, or, where positions are not added to the residual stream, with `normed`. With "standard" positions and a
    norm, a run's norm scales multiply the terms: `trace.scales[0]` at the destination times that at the source.

    Args:
        weights: the model.
        head: (layer, head).
        scaled: divided by the attention scale, as the softmax sees them.
        normed: each embedding goes through the norm first; see ov_circuit.
        offset: with rotary positions, how far the destination stands behind the source.

    Raises:
        ValueError, IndexError: as qk_circuit.
    """
    head = checked_head(weights, head)
    tokens = read_embeddings(weights, normed)
    queries, keys = queries_and_keys(weights, head, tokens, scaled=scaled, biased=True, offset=offset)
    token_token = FactoredMatrix(queries, keys.mT)
    if weights.W_pos is None:
        return QKTables(token_token, None, None, None)
    positions = weights.W_pos.to(weights.compute_dtype)
    turned, places = queries_and_keys(weights, head, positions, scaled=scaled, biased=False, offset=offset)
    return QKTables(
        token_token,
        FactoredMatrix(queries, places.mT),
        FactoredMatrix(turned, keys.mT),
        FactoredMatrix(turned, places.mT),
    )


@torch.no_grad()
def ov_tables(weights: CircuitWeights, head: Sequence[int], *, normed: bool = False) -> OVTables:
    """What a head adds to the logits, by the source's token and by its position; see ov_circuit for what is left out.

    Raises:
        ValueError, IndexError: no such head.
    """
    token = ov_circuit(weights, head, normed=normed)
    if weights.positional != "standard" or weights.W_pos is None:
        return OVTables(token, None)
    values: Tensor = weights.W_pos.to(weights.compute_dtype) @ weights.head("W_V", *checked_head(weights, head))
    return OVTables(token, FactoredMatrix(values, token.B))
