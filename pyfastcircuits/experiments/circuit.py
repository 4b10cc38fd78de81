"""A circuit as a value: the edges that matter, each with its score. It is made of scores by label."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyfastcircuits.arguments import describe, public
from pyfastcircuits.experiments import circuit_formats
from pyfastcircuits.result import Result, label_name
from pyfastcircuits.run.graph import EMBED, LOGITS, EdgeLabel, NodeLabel, layer_of, reader
from pyfastcircuits.run.nodes import KINDS


class Overlap(NamedTuple):
    """What two circuits, or a circuit and a list of nodes, have in common.

    Attributes:
        shared, only_here, only_there: edges, or nodes, in order.
    """

    shared: tuple[Any, ...]
    only_here: tuple[Any, ...]
    only_there: tuple[Any, ...]

    @property
    def precision(self) -> float:
        """The share of what is here that is there too; NaN if nothing is here."""
        return _share(len(self.shared), len(self.shared) + len(self.only_here))

    @property
    def recall(self) -> float:
        """The share of what is there that is here too; NaN if nothing is there."""
        return _share(len(self.shared), len(self.shared) + len(self.only_there))

    @property
    def jaccard(self) -> float:
        """What is shared over all that is here or there."""
        return _share(len(self.shared), sum(map(len, self)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True)
class Circuit:
    """A set of edges of a model, each with its score.

    An edge is (node, receiver): a node is "embed", (layer, head) or ("mlp", layer), and a receiver is ((layer, head),
    "Q" | "K" | "V"), ("mlp", layer) or "logits". `fc.circuit` makes circuits of scores.

    Attributes:
        scores: the score of each edge, by edge; the order is that of the edges' worth.
        candidates: the number of edges that it was chosen from.
        setup: how the scores were made.
    """

    scores: Mapping[EdgeLabel, float]
    candidates: int
    setup: Mapping[str, str | int | float] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of edges."""
        return len(self.scores)

    def __repr__(self) -> str:
        """Its size, and its best edges."""
        best = ", ".join(f"{label_name(edge)} {score:+.4g}" for edge, score in [*self.scores.items()][:3])
        return f"Circuit({len(self)} of {self.candidates} edges, {len(self.nodes)} nodes; best: {best})"

    @property
    def edges(self) -> tuple[EdgeLabel, ...]:
        """The edges, best first."""
        return tuple(self.scores)

    @property
    def nodes(self) -> tuple[NodeLabel, ...]:
        """Every node at an end of an edge, in the order in which they write; the logits are no node."""
        ends = {source for source, _ in self.scores} | {reader(receiver) for _, receiver in self.scores}
        return tuple(sorted(ends - {LOGITS}, key=_order))

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The heads among the nodes."""
        return tuple(node for node in self.nodes if isinstance(node, tuple) and isinstance(node[0], int))

    @public
    def pruned(self) -> "Circuit":
        """The circuit without dead ends: edges of a node that reads nothing in it, or that nothing of it reads.

        What such a node writes is the same inside and outside of the circuit, or does not reach the logits.
        """
        kept = dict(self.scores)
        while True:
            reads = {reader(receiver) for _, receiver in kept} | {EMBED}
            is_read = {source for source, _ in kept} | {LOGITS}
            left = {e: x for e, x in kept.items() if e[0] in reads and reader(e[1]) in is_read}
            if len(left) == len(kept):
                return Circuit(kept, self.candidates, self.setup)
            kept = left

    @public
    def top(self, n: int) -> "Circuit":
        """The circuit of the n best edges.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n is {n}, expected at least 0")
        return Circuit(dict([*self.scores.items()][:n]), self.candidates, self.setup)

    @public
    def compare(self, other: Any) -> Overlap:
        """What it shares with another circuit, by edges, or with a list of nodes, by nodes.

        A list of heads is compared with the heads alone.

        Raises:
            TypeError: neither a Circuit nor nodes.
        """
        if isinstance(other, Circuit):
            return _overlap(self.edges, other.edges)
        if isinstance(other, (str, bytes, Mapping)) or not hasattr(other, "__iter__"):
            raise TypeError(f"other is {describe(other)}, expected a Circuit or a list of nodes")
        there = [tuple(node) if isinstance(node, (list, tuple)) else node for node in other]
        if not all(node == EMBED or (isinstance(node, tuple) and len(node) == 2) for node in there):
            raise TypeError("other holds something else than 'embed', (layer, head) and ('mlp', layer)")
        heads = all(isinstance(node, tuple) and isinstance(node[0], int) for node in there)
        return _overlap(self.heads if heads else self.nodes, there)

    @public
    def table(self) -> Any:
        """A pyarrow.Table with a row for each edge: source, receiver, input, score. Input is "Q", "K", "V" or "".

        Raises:
            ImportError: pyarrow is missing.
        """
        return circuit_formats.table(self.scores, self.setup)

    @public
    def to_networkx(self) -> Any:
        """A networkx.MultiDiGraph: nodes by label, edges with `input` ("Q", "K", "V" or "") as key, and `score`.

        Raises:
            ImportError: networkx is missing.
        """
        return circuit_formats.networkx_graph(self.scores)

    @public
    def to_json(self, name: str = "circuit") -> dict[str, Any]:
        """The circuit in the graph format of circuit-tracer's viewer: metadata, qParams, nodes and links.

        Every node stands at one position, because an edge of a circuit is of all positions. A link holds its `input`
        ("Q", "K", "V" or "") beside source, target and weight.
        """
        return circuit_formats.graph_json(self.scores, self.candidates, self.setup, name)

    @public
    def save(self, file: str | Path) -> None:
        """Write `to_json` to a file, whose name is the graph's.

        Raises:
            OSError: it cannot be written.
        """
        circuit_formats.write_json(self.to_json(Path(file).stem), Path(file))

    @staticmethod
    @public
    def load(file: str | Path) -> "Circuit":
        """A circuit that `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no circuit.
        """
        scores, candidates, setup = circuit_formats.read_json(Path(file))
        return Circuit(scores, candidates, setup)

    @public
    def to_dot(self) -> str:
        """The circuit as Graphviz source, layers from the bottom up.

        Raises:
            ImportError: the Python package graphviz is missing; its programs are not needed.
        """
        return circuit_formats.dot(self.scores)

    @public
    def plot(self, file: str | Path | None = None) -> Any:
        """A layered plot, the embedding at the bottom and the logits on top; a matplotlib Figure, which needs no
        Graphviz. Edges are as wide as their scores are large: blue where a score is negative, red where it is positive.

        Args:
            file: where to save it too, as its suffix says.

        Raises:
            ImportError: matplotlib is missing.
            OSError, ValueError: the file cannot be written, or is of an unknown kind.
        """
        return circuit_formats.figure(self.scores, file)


def _order(node: NodeLabel) -> tuple[float, Any]:
    return layer_of(node), node[1] if isinstance(node, tuple) else 0


def _overlap(here: Sequence[Any], there: Sequence[Any]) -> Overlap:
    shared = [x for x in here if x in set(there)]
    return Overlap(tuple(shared), *(tuple(x for x in side if x not in set(shared)) for side in (here, there)))


Scores = Result | Mapping[Any, float] | Sequence[Result]


@public
def circuit(
    scores: Any,
    *,
    top: int | None = None,
    threshold: float | None = None,
    greedy: bool = False,
) -> Circuit:
    """The circuit of the edges that matter most, by the size of their scores.

    Args:
        scores: by edge: the Result of `edge_scores`; of experiments on pairs of heads (`edge_attribution`,
            `path_patching` and `composition_ablation` say in `setup["kind"]` which input of the destination the edge
            leads to; the pairs of `pair_ablation` are edges to values); a list of such Results; or a mapping.
        top: take this many edges.
        threshold: take edges whose score is at least so large, in size.
        greedy: start from the logits and take, again and again, the best edge into what has been taken; then prune dead
            ends (Hanna et al. 2024). The circuit is connected, and may have fewer edges than `top`. False: take the
            best edges wherever they are.

    Returns:
        A Circuit. Without `top` and `threshold`, of all edges.

    Raises:
        TypeError: scores of another kind.
        ValueError: top or threshold below 0; scores that are not of edges, or NaN; greedy without edges to the logits.
    """
    if top is not None and top < 0:
        raise ValueError(f"top is {top}, expected at least 0")
    if threshold is not None and threshold < 0:
        raise ValueError(f"threshold is {threshold}, expected at least 0")
    found, setup = _by_edge(scores)
    candidates = len(found)
    best = sorted(found, key=lambda edge: -abs(found[edge]))
    if threshold is not None:
        best = [edge for edge in best if abs(found[edge]) >= threshold]
    if greedy:
        best = _from_the_logits(best, found, len(best) if top is None else top)
    chosen = Circuit({edge: found[edge] for edge in best[:top]}, candidates, setup)
    return chosen.pruned() if greedy else chosen


def _by_edge(scores: Any) -> tuple[dict[EdgeLabel, float], dict[str, str | int | float]]:
    """The score of each edge, and how they were made; errors as circuit."""
    if isinstance(scores, Result):
        found = dict(zip(_edges_of(scores), scores.means().tolist(), strict=True))
        setup = dict(scores.setup)
    elif isinstance(scores, Mapping):
        found, setup = {edge: float(x) for edge, x in scores.items()}, {}
    elif isinstance(scores, Iterable) and not isinstance(scores, (str, bytes, torch.Tensor)):
        found, setup = {}, {}
        for part in scores:
            if not isinstance(part, Result):
                raise TypeError(f"scores holds {describe(part)}, expected Results")
            more, setup = _by_edge(part)
            found |= more
    else:
        raise TypeError(f"scores is {describe(scores)}, expected a Result, a mapping of edges, or a list of Results")
    for edge, score in found.items():
        if not _is_edge(edge):
            raise ValueError(f"scores holds {describe(edge, entries=True)}, expected an edge, (node, receiver)")
        if score != score:
            raise ValueError(f"scores holds NaN for edge {label_name(edge)}")
    return found, setup


def _edges_of(scores: Result) -> Iterable[Any]:
    kind = scores.setup.get("kind", "V")
    return (
        (label[0], (label[1], kind)) if _is_node(label[0]) and _is_head(label[1]) else label
        for label in (x if isinstance(x, tuple) and len(x) == 2 else (None, None) for x in scores.labels)
    )


def _is_head(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(isinstance(i, int) for i in x)


def _is_mlp(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and x[0] == "mlp" and isinstance(x[1], int)


def _is_node(x: Any) -> bool:
    return x == EMBED or _is_head(x) or _is_mlp(x)


def _is_edge(edge: Any) -> bool:
    if not (isinstance(edge, tuple) and len(edge) == 2 and _is_node(edge[0])):
        return False
    to = edge[1]
    return (
        to == LOGITS or _is_mlp(to) or (isinstance(to, tuple) and len(to) == 2 and _is_head(to[0]) and to[1] in KINDS)
    )


def _from_the_logits(edges: Sequence[EdgeLabel], scores: Mapping[EdgeLabel, float], count: int) -> list[EdgeLabel]:
    """Edges, best first, each into the logits or into the source of one that has been taken before."""
    into: dict[NodeLabel, list[EdgeLabel]] = {}
    for edge in edges:
        into.setdefault(reader(edge[1]), []).append(edge)
    if edges and LOGITS not in into:
        raise ValueError("greedy is True, but scores hold no edge to the logits to start from")
    taken: list[EdgeLabel] = []
    reached, heap = {LOGITS}, [(-abs(scores[edge]), i, edge) for i, edge in enumerate(into.get(LOGITS, []))]
    heapq.heapify(heap)
    serial = len(heap)
    while heap and len(taken) < count:
        edge = heapq.heappop(heap)[2]
        taken.append(edge)
        if edge[0] not in reached:
            reached.add(edge[0])
            for further in into.get(edge[0], []):
                heapq.heappush(heap, (-abs(scores[further]), serial, further))
                serial += 1
    return taken
