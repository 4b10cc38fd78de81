"""Composition: how much of what one head writes another head reads ("Composition Scores", Elhage et al. 2021).

The score of a pair of heads is ||OV1 @ M2|| / (||OV1|| ||M2||) in Frobenius norms, where the source writes
OV1 = W_V @ W_O and the destination reads M2: QK = W_Q @ W_K.T by its queries ("Q"), QK transposed by its keys ("K"), or
OV by its values ("V"). `ops.pair_norms` makes the norms of all pairs at once from factors [r, d] (`head_factors`).

The article's first library moved the factors around cyclically, which is right for traces and wrong for norms.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public, takes_sharded
from pyfastcircuits.circuits.head_factors import HeadFactors, both_sides, earlier_sources, in_asked_order
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, Precision, factored_pair_norms
from pyfastcircuits.processes import ALONE, Processes, dealt, everybody
from pyfastcircuits.run.nodes import KINDS, Kind, grouped, parse_ends, parse_head


@public
@takes_sharded
def composition_scores(
    weights: CircuitWeights,
    kind: Kind | Sequence[Kind],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    destinations: Sequence[Sequence[int]] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Composition scores of all pairs of heads: ||OV1 @ M2|| / (||OV1|| ||M2||), exact zeros where layer1 >= layer2.

    Args:
        weights: the model. Grouped key/value heads are not expanded, but where bfloat16 or Triton multiplies.
        kind: "Q" (M2 = QK, which queries read), "K" (QK transposed, which keys read) or "V" (OV); or several kinds at
            once, which costs less than one by one because they share the sources.
        sources, destinations: only these heads, (layer, head) each; None for all.
        precision, backend: of ops.pair_norms.
        progress: called with the number of pairs finished since the last call.

    Returns:
        [L, H, L, H], source first, in the computing dtype; [S] instead of the source's [L, H] if `sources` is given,
        and likewise [D]; of several kinds, stacked in front. A head whose matrix is zero scores 0, with a warning.
        Differentiable.

    In a process group of torch.distributed all processes make this call, each computes the scores of some layers'
    destinations, and all return the same; where the weights require gradients each computes them all.

    Raises:
        TypeError: the weights have another type.
        ValueError: the kind is unknown, or there is none; a head is not a pair of integers.
        IndexError: the model has no such head.
        RuntimeError: the backend or precision is not there.

    Source: "Composition Scores" in "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021), with its
    erratum.
    """
    kinds = [kind] if isinstance(kind, str) else list(kind)
    if not kinds:
        raise ValueError(f"kind is {kind!r}, expected at least one of {', '.join(KINDS)}")
    options: dict[str, Any] = {"precision": precision, "backend": backend, "progress": progress}
    processes = ALONE if weights.learns else everybody()
    if processes is ALONE:
        scores = _scores(weights, kinds, sources, destinations, **options)
    else:
        scores = _by_layers(weights, kinds, sources, destinations, processes, **options)
    return scores[0] if isinstance(kind, str) else scores


def _by_layers(
    weights: CircuitWeights,
    kinds: Sequence[Kind],
    sources: Sequence[Sequence[int]] | None,
    destinations: Sequence[Sequence[int]] | None,
    processes: Processes,
    **options: Any,
) -> Tensor:
    """The same, each process with the destinations of some layers, of which none has many more pairs than another."""
    every = [(layer, head) for layer in range(weights.n_layers) for head in range(weights.n_heads)]
    heads = every if destinations is None else [parse_head(weights, head, "destination") for head in destinations]
    layers = grouped(layer for layer, _ in heads)
    hands = dealt([layer * len(places) for layer, places in layers.items()], processes.size)
    mine = [place for i in hands[processes.rank] for place in list(layers.values())[i]]
    shape = (weights.n_layers, weights.n_heads) if sources is None else (len(sources),)
    scores = torch.zeros(len(kinds), *shape, len(heads), dtype=weights.compute_dtype, device=weights.device)
    if mine:
        scores[..., mine] = _scores(weights, kinds, sources, [heads[i] for i in mine], **options)
    scores = processes.summed(scores)
    return scores.unflatten(-1, (weights.n_layers, weights.n_heads)) if destinations is None else scores


def _scores(
    weights: CircuitWeights,
    kinds: Sequence[Kind],
    sources: Sequence[Sequence[int]] | None,
    destinations: Sequence[Sequence[int]] | None,
    precision: Precision,
    backend: Backend,
    progress: Callable[[float], None] | None,
) -> Tensor:
    """Of every kind, stacked."""
    source, sides = both_sides(weights, kinds, sources, destinations)
    norms = _product_norms(source, sides, precision, backend, progress)
    scores = []
    _warn_of_zeros(source, "OV")
    for name, side, products in zip(kinds, sides, norms, strict=True):
        _warn_of_zeros(side, "OV" if name == "V" else "QK")
        sizes = source.norms[:, None] * side.norms
        quotient = torch.where(sizes > 0, products / sizes.where(sizes > 0, 1), 0)
        scores.append(in_asked_order(quotient, source, side))
    return torch.stack(scores)


def _product_norms(
    source: HeadFactors,
    destinations: Sequence[HeadFactors],
    precision: Precision,
    backend: Backend,
    progress: Callable[[float], None] | None,
) -> Tensor:
    """Norms of the products of all pairs with layer1 < layer2, 0 elsewhere: [K, S, D]; sets every side's `norms`."""
    kinds, heads = len(destinations), len(destinations[0].heads)
    out = torch.zeros(kinds, len(source.heads), heads, dtype=source.norms.dtype, device=source.norms.device)
    before = earlier_sources(source, destinations[0])
    for rows in source.parts():
        rows = slice(rows.start, min(rows.stop, int(before[-1:].sum())))  # sorted: the last bound is the largest
        if rows.start >= rows.stop:
            break
        outer, inner = source.pair(rows)
        for columns in destinations[0].parts(kinds):
            columns = slice(columns.start + int((before[columns] <= rows.start).sum()), columns.stop)
            if columns.start >= columns.stop:
                continue
            bound = (before[columns] - rows.start).clamp(0, rows.stop - rows.start).repeat(kinds)
            triangles, readers = zip(*(side.pair(columns) for side in destinations), strict=True)
            norms, left, right = factored_pair_norms(
                inner,
                [reader.mT for reader in readers],
                left_outer=outer,
                right_outer=[triangle.mT for triangle in triangles],
                before=bound,
                precision=precision,
                backend=backend,
            )
            out[:, rows, columns], source.norms[rows] = norms.unflatten(1, (kinds, -1)).transpose(0, 1), left
            for side, sizes in zip(destinations, right.chunk(kinds), strict=True):
                side.norms[columns] = sizes
            if progress is not None:
                progress(int(bound.sum()))
    return out


def _warn_of_zeros(side: HeadFactors, name: str) -> None:
    zero = (side.norms == 0).nonzero()[:, 0].tolist()
    if zero:
        heads = ", ".join("{}.{}".format(*side.heads[i]) for i in zero[:8]) + (", ..." if len(zero) > 8 else "")
        warnings.warn(f"the {name} matrix of head {heads} is zero: its composition scores are set to 0", stacklevel=3)


class ComponentScores(NamedTuple):
    """Composition of two heads, singular component by singular component (Merullo et al. 2024, "Talking Heads").

    A component of a head is s_k u_k v_k.T of its singular value decomposition. With weights p = s^2 / sum(s^2) of
    the source's components and q of the destination's, score^2 = sum p * source^2 = sum q * destination^2
    = sum p q pairs^2.
    """

    source: Tensor  # [r]: scores of the source's components with the whole destination
    destination: Tensor  # [r]: of the whole source with the destination's components
    pairs: Tensor  # [r, r]: of component with component, the cosines of their directions
    source_singular_values: Tensor  # [r]
    destination_singular_values: Tensor  # [r]

    @public
    def plot(self) -> Any:
        """Draw `pairs`, component by component; ImportError where matplotlib is missing."""
        from pyfastcircuits.drawing.matrix import Side, matrix

        sides = (
            Side(f"{side} component", list(map(str, range(len(self.pairs))))) for side in ("source", "destination")
        )
        return matrix(self.pairs, *sides, title="Composition by singular components", scale="cosine", rising=True)

    def _repr_html_(self) -> str:
        """The strongest components of both heads, as a table with a picture."""
        from pyfastcircuits.drawing.notebook import card

        rows = [(str(i), *(f"{float(x[i]):.4g}" for x in self[:2])) for i in range(min(8, len(self.source)))]
        return card("Composition by singular components", ("component", "source", "destination"), rows, self.plot)


@public
@torch.no_grad()
def component_scores(
    weights: CircuitWeights, kind: Kind, source: Sequence[int], destination: Sequence[int]
) -> ComponentScores:
    """The composition score of a pair of heads taken apart by singular components, largest first.

    Args:
        weights, kind: as composition_scores.
        source, destination: (layer, head); the source's layer must come first.

    Raises:
        ValueError: the source is not in an earlier layer; else as composition_scores.
    """
    left, (right,) = both_sides(weights, [kind], *([head] for head in parse_ends(weights, source, destination)))
    (_, s, written), (_, t, read) = (
        torch.linalg.svd(x.factors(slice(0, 1))[0], full_matrices=False) for x in (left, right)
    )
    cosines = (written @ read.mT).abs()
    p, q = (x.square() / x.square().sum() for x in (s, t))
    return ComponentScores((cosines.square() @ q).sqrt(), (p @ cosines.square()).sqrt(), cosines, s, t)
