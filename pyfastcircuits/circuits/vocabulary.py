"""The circuits of the article over the vocabulary: the bigram table, and every head's OV and QK circuit.

A head's OV circuit says what attending to a token adds to the logits, its QK circuit which tokens attend to which, and
the bigram table what the direct path predicts. Each is a matrix of low rank and stays factored: it is never formed. Its
size is [V, V], or [V, V'] where columns are tokens that are predicted. Rows are the tokens that are read, as row
vectors ("A Mathematical Framework for Transformer Circuits", Elhage et al. 2021).

The weights are taken as they are, with the gains of the norms in them. A layernorm also subtracts the mean: `center`
the weights first, and that is in them too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.norms import centered, norm_scale, normalized
from pyfastcircuits.model.queries import queries_or_keys
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.nodes import Head, parse_ends, parse_head


def embedded_tokens(weights: CircuitWeights, normed: bool = False) -> Tensor:
    """The embeddings of all tokens [V, d] in the computing dtype; as the norm before heads gives them if `normed`."""
    tokens = weights.W_E.to(weights.compute_dtype)
    tokens = tokens if weights.embed_scale == 1 else tokens * weights.embed_scale
    return normalized(tokens, weights) if normed else tokens


def through_final_gain(weights: CircuitWeights, written: Tensor) -> Tensor:
    """Vectors of the residual stream [..., d] times the gain of the final norm, as W_U reads them."""
    return written if weights.ln_final_w is None else written * weights.ln_final_w.to(written.dtype)


@public
def bigrams(weights: CircuitWeights, *, normed: bool = False) -> FactoredMatrix:
    """The direct path W_E @ W_U [V, V']: row = present token, column = next token, in logits.

    With `normed`, each embedding goes through the norm first. The table then holds the logits of a model without
    layers, but for b_U.
    """
    tokens = embedded_tokens(weights)
    if normed:
        tokens = centered(tokens, weights) * norm_scale(tokens, weights)[:, None]
    return FactoredMatrix(through_final_gain(weights, tokens), weights.W_U.to(weights.compute_dtype))


@public
def ov_circuit(weights: CircuitWeights, head: Sequence[int], *, normed: bool = False) -> FactoredMatrix:
    """W_E @ OV @ W_U [V, V']: attending to a source token (row) adds so much to the logit of an output token (column).

    The value bias and the scale of the final norm are left out.

    Args:
        weights: the model.
        head: (layer, head).
        normed: each embedding goes through the norm first, as a first layer reads it (but without the positions, where
            a model adds these to the residual stream).

    Raises:
        ValueError: the head is not a pair of integers.
        IndexError: the model has no such head.
    """
    head = parse_head(weights, head)
    values = embedded_tokens(weights, normed) @ weights.head("W_V", *head)
    written = through_final_gain(weights, weights.head("W_O", *head))
    return FactoredMatrix(values, written @ weights.W_U.to(weights.compute_dtype))


@public
def qk_circuit(
    weights: CircuitWeights, head: Sequence[int], *, scaled: bool = False, normed: bool = False, offset: int = 0
) -> FactoredMatrix:
    """W_E @ QK @ W_E.T [V, V]: a destination token (row) attends to a source token (column) with this score.

    Biases and positions are left out; `qk_tables` has them.

    Args:
        weights: the model.
        head: (layer, head).
        scaled: scores are divided by the attention scale, sqrt(r) by default.
        normed: each embedding goes through the norm first; see ov_circuit.
        offset: with rotary positions, the destination stands so many positions after the source. Where a model turns
            long sequences otherwise than short ones, the scores are those of short ones (`weights.rotary_length`).

    Raises:
        ValueError: the head is not a pair of integers; the offset is below 0, above 0 and positions are not rotary, or
            beyond `weights.rotary_length`; queries and keys come through norms that the weights do not hold.
        IndexError: the model has no such head.
    """
    tokens = embedded_tokens(weights, normed)
    queries, keys = _queries_and_keys(weights, parse_head(weights, head), tokens, scaled, offset)
    return FactoredMatrix(queries, keys.mT)


@public
def composed_qk_circuit(
    weights: CircuitWeights, source: Sequence[int], destination: Sequence[int], *, scaled: bool = False
) -> FactoredMatrix:
    """The K-composed QK circuit W_E @ QK2 @ OV1.T @ W_E.T [V, V] of two heads.

    The row is the token at the destination's query. The column is the token that `source` attended to from the position
    of the key; for an induction head behind a previous-token head, that is the token before the key.

    Raises:
        ValueError: the source is not in an earlier layer.
        IndexError: the model has no such head.
    """
    first, second = parse_ends(weights, source, destination)
    tokens, scale = embedded_tokens(weights), weights.score_scale(second.layer) if scaled else 1.0
    through = weights.head("W_O", *first) @ weights.head("W_K", *second)  # [r, r]
    keys = (tokens @ weights.head("W_V", *first)) @ through
    return FactoredMatrix((tokens @ weights.head("W_Q", *second)) * scale, keys.mT)


class QKTables(NamedTuple):
    """Attention scores are bilinear, so positions added to tokens give four terms (rows: destinations).

    Those with positions are None where the model has no W_pos.
    """

    token_token: FactoredMatrix  # [V, V]
    token_position: FactoredMatrix | None  # [V, n_ctx]: the query of a token, the key of a position
    position_token: FactoredMatrix | None  # [n_ctx, V]
    position_position: FactoredMatrix | None  # [n_ctx, n_ctx]


@public
@torch.no_grad()
def qk_tables(
    weights: CircuitWeights, head: Sequence[int], *, scaled: bool = True, normed: bool = False, offset: int = 0
) -> QKTables:
    """The attention scores of a head over all tokens and positions, as terms that sum to them.

    Biases count with the tokens: b_Q is in every token's query, b_K in every token's key (it shifts all scores of a
    destination alike, and so changes no pattern). For a first layer the sum is exactly the model's scores: without a
    norm, or, where positions are not added to the residual stream, with `normed`. With "standard" positions and a norm,
    the norm scales of a run multiply the terms: `trace.scales[0]` at the destination times that at the source.

    Args, errors: as qk_circuit; `scaled`, the default, gives the scores that the softmax sees.
    """
    head = parse_head(weights, head)
    queries, keys = _queries_and_keys(weights, head, embedded_tokens(weights, normed), scaled, offset, biased=True)
    token_token = FactoredMatrix(queries, keys.mT)
    if weights.W_pos is None:
        return QKTables(token_token, None, None, None)
    positions = weights.W_pos.to(weights.compute_dtype)
    at_destinations, at_sources = _queries_and_keys(weights, head, positions, scaled, offset)
    return QKTables(
        token_token,
        FactoredMatrix(queries, at_sources.mT),
        FactoredMatrix(at_destinations, keys.mT),
        FactoredMatrix(at_destinations, at_sources.mT),
    )


class OVTables(NamedTuple):
    """Attending to a source adds these terms to the logits of an output token (column)."""

    token: FactoredMatrix  # [V, V']: of the source's token
    position: FactoredMatrix | None  # [n_ctx, V']: of its position; None unless the residual stream holds positions


@public
@torch.no_grad()
def ov_tables(weights: CircuitWeights, head: Sequence[int], *, normed: bool = False) -> OVTables:
    """A head's additions to the logits, by the source's token and by its position; ov_circuit says what is left out.

    Raises:
        ValueError, IndexError: as ov_circuit.
    """
    token = ov_circuit(weights, head, normed=normed)
    if weights.positional != "standard" or weights.W_pos is None:
        return OVTables(token, None)
    values: Tensor = weights.W_pos.to(weights.compute_dtype) @ weights.head("W_V", *parse_head(weights, head))
    return OVTables(token, FactoredMatrix(values, token.B))


def _queries_and_keys(
    weights: CircuitWeights, head: Head, stream: Tensor, scaled: bool, offset: int, *, biased: bool = False
) -> tuple[Tensor, Tensor]:
    """A head's queries [N, r] and keys [N, r] of the rows of `stream` [N, d]; queries stand `offset` positions later.

    Raises:
        ValueError: the offset is below 0, or above 0 and positions are not rotary.
    """
    if offset < 0 or (offset > 0 and weights.positional != "rotary"):
        least = "at least 0" if weights.positional == "rotary" else f"0: positional is {weights.positional!r}"
        raise ValueError(f"offset is {offset}, expected {least}")
    if weights.rotary_length is not None and offset >= weights.rotary_length:
        raise ValueError(
            f"offset is {offset}, but the weights hold the rotation of sequences of up to {weights.rotary_length} "
            "tokens: this model turns longer ones otherwise"
        )
    later, start = (torch.tensor([place], device=weights.device) for place in (offset, 0))
    queries = queries_or_keys(weights, "Q", head.layer, stream, later, head=head.head, biased=biased)
    keys = queries_or_keys(weights, "K", head.layer, stream, start, head=head.head, biased=biased)
    return queries * (weights.score_scale(head.layer) if scaled else 1.0), keys
