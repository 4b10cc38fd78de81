"""What the features of a dictionary do: to logits, to heads, and why a head attends, in features.

A feature writes one direction as strongly as it is active. So what it does to a reader is one vector times its
activations, and thousands of features cost one product with the dictionary's decoder.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.attribution import toward_targets
from pyfastcircuits.experiments.metrics import Positions, asked
from pyfastcircuits.model.norms import centered
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.dictionary import Dictionary, Feature
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import Kind, parse_head
from pyfastcircuits.run.trace import FrozenTrace

STREAMS = 32  # of features that one call of a layer's projections reads
REST = "rest"


@public
@torch.no_grad()
def feature_attribution(
    trace: FrozenTrace,
    dictionary: Dictionary,
    *,
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
) -> Result:
    """What each feature adds to the target's logit, straight through the frozen final norm; the mean over positions.

    Args:
        trace: a frozen run.
        dictionary: of its model.
        targets, against, positions: as in direct_logit_attribution, of whose sum these are parts.

    Returns:
        values [F], in logits (of a logit difference where `against` is given); labels "feature 3.17", ....

    Raises:
        ValueError, IndexError: a dictionary of another model; as direct_logit_attribution.
    """
    where = asked(trace, positions, targets=targets, against=against)
    directions, _ = toward_targets(trace, where, center=False)
    active = where.rows(dictionary.activations(trace))
    values = torch.zeros(dictionary.size, dtype=torch.float64, device=active.device)
    decoder = dictionary.W_dec.to(directions.dtype)
    for some in slices(len(active), 256):
        values += (active[some] * (directions[some] @ decoder.mT)).sum(0, dtype=torch.float64)
    values = (values / len(active)).to(directions.dtype)
    name = "logit" if against is None else "logit_difference"
    return Result(_labels(dictionary, range(dictionary.size)), values, values.new_zeros(()), name, harm="size")


@public
@torch.no_grad()
def feature_reads(trace: FrozenTrace, dictionary: Dictionary, kind: Kind) -> Tensor:
    """How strongly each feature moves each head's queries, keys or values: the edges from features to heads.

    Args:
        trace: a frozen run.
        dictionary: of its model.
        kind: "Q", "K" or "V".

    Returns:
        [F, L, H]: the root mean square, over real positions, of the length of what the feature adds to a head's
        queries, keys or values (before norms of queries and keys); 0 for heads that read before it is written.

    Raises:
        ValueError, IndexError: a dictionary of another model.
    """
    weights, active = trace.weights, dictionary.activations(trace)
    real = torch.ones_like(trace.tokens, dtype=torch.bool) if trace.mask is None else trace.mask
    power = active[real].square()
    out = active.new_zeros(dictionary.size, weights.n_layers, weights.n_heads)
    direction = centered(dictionary.W_dec.to(active.dtype), weights)
    for layer in range(_first_reader(dictionary), weights.n_layers):
        scale = trace.value_scale(layer) if kind == "V" else trace.scales[layer]
        strength = (power * scale[real][:, None].square()).mean(0).sqrt()
        for head in range(weights.n_heads):
            length = torch.linalg.vector_norm(direction @ weights.head(_WEIGHT[kind], layer, head), dim=-1)
            out[:, layer, head] = strength * length
    return out


_WEIGHT: dict[Kind, Literal["W_Q", "W_K", "W_V"]] = {"Q": "W_Q", "K": "W_K", "V": "W_V"}


@public
@torch.no_grad()
def feature_qk_terms(
    trace: FrozenTrace,
    head: Sequence[int],
    dictionary: Dictionary,
    *,
    sequence: int,
    destination: int,
    source: int,
) -> Result:
    """Why a head attends from one position to another, in features: its attention score as a sum over their pairs.

    Only features that are active at the two positions are in it, so that nothing of features by features is made. All
    else that the head reads, biases included, is the "rest". Norm scales are held, as in qk_terms.

    Args:
        trace: a frozen run.
        head: (layer, head), which reads what the dictionary's features write.
        dictionary: of the run's model.
        sequence, destination, source: which score; counted from 0.

    Returns:
        values [Q * K], in the order of (query feature, key feature), which sum to the head's score (before caps and
        masks); the last of either is "rest". `.top(n)` gives the largest.

    Raises:
        ValueError: no such head; one that reads before the features are written; a dictionary of another model.
        IndexError: no such head, sequence or position.

    Source: "Path Expansion of Attention Scores QK Circuit", Elhage et al. 2021.
    """
    layer, index = parse_head(trace.weights, head)
    if layer < _first_reader(dictionary):
        raise ValueError(
            f"head is {layer}.{index}, which reads before features of layer {dictionary.layer} are written"
        )
    places = {"sequence": sequence, "destination": destination, "source": source}
    for name, place in places.items():
        size = trace.tokens.shape[name != "sequence"]
        if not 0 <= place < size:
            raise IndexError(f"{name} is {place}, expected 0 to {size - 1}")
    part = trace[sequence : sequence + 1]
    active = dictionary.activations(part)[0]
    queries, q = _parts(part, layer, index, dictionary, active[destination], destination, 0)
    keys, k = _parts(part, layer, index, dictionary, active[source], source, 1)
    values = (trace.forward.score_scale(layer) * q @ k.mT).flatten()
    labels: list[Label] = [(query, key) for query in queries for key in keys]
    setup: dict[str, str | int | float] = {"head": f"{layer}.{index}", **places}
    return Result(labels, values, values.new_zeros(()), "score", setup=setup, harm="size")


def _parts(
    part: FrozenTrace, layer: int, head: int, dictionary: Dictionary, active: Tensor, place: int, which: int
) -> tuple[list[Label], Tensor]:
    """The parts of a head's query (`which` 0) or key (1) at a position, by feature and the rest: [n + 1, r]."""

    def made(streams: Tensor) -> Tensor:
        x = part.forward.qkv(layer, part.normed(streams, layer), frozen=True)[which]
        return x[:, 0, head // (part.weights.n_heads // x.shape[2]), place]

    numbers = active.nonzero()[:, 0]
    fixed, whole = made(torch.zeros_like(part.embedded)[None]), made(part.streams[layer][None])
    parts = [whole[:0]]
    for some in numbers.split(STREAMS):
        streams = part.embedded.new_zeros(len(some), *part.embedded.shape)
        streams[:, 0, place] = active[some, None] * dictionary.W_dec[some].to(streams.dtype)
        parts.append(made(streams) - fixed)
    features = torch.cat(parts)
    rest = whole - features.sum(0, keepdim=True)
    return [*_labels(dictionary, numbers.tolist()), REST], torch.cat((features, rest))


def _first_reader(dictionary: Dictionary) -> int:
    """The first layer whose heads read what the features write."""
    return Feature(dictionary, 0).layer + 1


def _labels(dictionary: Dictionary, numbers: Sequence[int]) -> list[Label]:
    return [Feature(dictionary, number).label for number in numbers]
