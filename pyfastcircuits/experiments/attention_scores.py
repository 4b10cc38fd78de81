"""Why a head attends: its attention scores as a sum of terms, one component's query with another component's key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.nodes import Head, heads_written, nodes_before, non_heads_written, parse_head, written
from pyfastcircuits.run.patterns import head_pattern, stored
from pyfastcircuits.run.trace import FrozenTrace

Split = Literal["layer", "head", "component"]


@dataclass(frozen=True, eq=False)
class QKTerms(Result):
    """The terms of a head's attention scores; `labels` are pairs (query component, key component).

    Attributes:
        share: [C * C], each term's share of the scores' variance; see qk_terms.
    """

    share: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))


@public
@torch.no_grad()
def qk_terms(trace: FrozenTrace, head: Sequence[int], by: Split = "layer", *, per_token: bool = True) -> QKTerms:
    """The attention scores of a head as a sum of terms: one component's query with another component's key.

    The residual stream that the head reads is a sum of components, and scores are bilinear in what queries and keys
    read: so they are a sum over pairs (query component, key component). For a head of the second layer these are, by
    default, the four terms of the article's C_QK: direct with direct; "heads 0" on the keys' side (K-composition), on
    the queries' (Q-composition), or on both. A head of layer 0 has the first alone.

    Held at the clean run's: norm scales, those of norms of queries and keys too. Biases and positions that only queries
    and keys see belong to the first component. A head's value bias belongs to the head. What a model adds to scores
    that no query and key makes (ALiBi) is in no term.

    Args:
        trace: a frozen run.
        head: (layer, head).
        by: the components. "layer": "direct" (embedding, MLPs, biases) and the heads of each earlier layer together,
            "heads 0", ...; "head": "direct" and each earlier head, ((layer, head),); "component": "embed" and each
            earlier head, MLP (("mlp", 0), ...) and bias of a layer's heads (("bias", 0), ...).
        per_token: False leaves the scores out and returns only the shares; then nothing of size [T, T] is kept for a
            term, and the number of terms, the square of the components', may be large.

    Returns:
        Terms in the order of (query component, key component), C * C of them. Values [C * C, B, T, T]: scores as the
        softmax sees them, rows destinations, before caps and masks; they sum to the head's own. `.share` [C * C] is
        each term's share of the scores' variance, cov(term, scores) / var(scores) over the sources that each
        destination gives any weight to, centred for each destination (what is the same for all its sources changes no
        pattern), and pooled: shares sum to 1 and may be negative; NaN where scores never differ. Without `per_token`
        the shares are the values.

    Raises:
        ValueError: a head that is no pair of integers; an unknown split; a run whose model cannot be rerun.
        IndexError: a head that the model does not have.

    Source: "Path Expansion of Attention Scores QK Circuit", Elhage et al. 2021.
    """
    trace.guard.check_values()
    layer, index = parse_head(trace.weights, head)
    labels, queries, keys = _queries_and_keys(trace, layer, index, by)
    terms: list[Label] = [(query, key) for query in labels for key in labels]
    share = _shares(trace, layer, index, queries, keys).flatten()
    scores = torch.einsum("ibtr,jbsr->ijbts", queries, keys).flatten(0, 1) if per_token else share
    return QKTerms(
        terms,
        scores,
        torch.zeros_like(scores[0]),
        "score" if per_token else "share",
        setup={"head": f"{layer}.{index}", "by": by},
        harm="size",
        share=share,
    )


def _queries_and_keys(trace: FrozenTrace, layer: int, head: int, by: Split) -> tuple[list[Label], Tensor, Tensor]:
    """Labels, and a head's queries and keys of each component [C, B, T, r]: its scores are the sum of all products."""
    forward, scale = trace.forward, trace.forward.score_scale(layer)

    def read(stream: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = forward.qkv(layer, trace.normed(stream, layer)[None], frozen=True)
        return scale * q[0, :, head], k[0, :, head // (q.shape[2] // k.shape[2])]

    fixed = read(torch.zeros_like(trace.embedded))  # queries and keys are affine in what is read
    labels: list[Label] = []
    queries, keys = [], []
    for label, stream in _components(trace, layer, by):
        q, k = read(stream)
        queries.append(q - fixed[0] if labels else q)
        keys.append(k - fixed[1] if labels else k)
        labels.append(label)
    return labels, torch.stack(queries), torch.stack(keys)


def _components(trace: FrozenTrace, last: int, by: Split) -> Iterator[tuple[Label, Tensor]]:
    """Everything that layer `last` reads, in parts [B, T, d]."""
    if by == "component":
        yield from ((node.label, written(trace, node)) for node in nodes_before(trace, last))
        return
    yield "direct", sum((non_heads_written(trace, layer) for layer in range(last)), trace.embedded)
    for layer in range(last):
        if by == "layer":
            yield f"heads {layer}", heads_written(trace, layer)
        else:
            for head in range(trace.weights.n_heads):
                yield Head(layer, head).label, written(trace, Head(layer, head))


def _shares(trace: FrozenTrace, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """cov(term, scores) / var(scores), [C, C]."""
    seen = stored(head_pattern(trace.patterns[layer], head))[:, 0] > 0
    if trace.mask is not None:
        seen = seen & trace.mask[:, :, None] & trace.mask[:, None]
    scores = torch.where(seen, queries.sum(0) @ keys.sum(0).mT, 0)
    centered = torch.where(seen, scores - scores.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True), 0)
    # the covariance with what is centred is bilinear too: no term's own scores are needed
    return torch.einsum("ibtr,jbtr->ij", queries, centered @ keys) / centered.square().sum()
