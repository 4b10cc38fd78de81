"""The graph of a model: the nodes that write to its residual stream, the receivers that read it, and the edges between.

An edge leads from every node to every receiver that reads after it has written. In the order in which layers run, the
nodes in front of a receiver are always the first few, so an edge is named by two numbers and no list of edges is kept.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from pyfastcircuits.result import Label
from pyfastcircuits.run.forward import MLPReads
from pyfastcircuits.run.nodes import KINDS
from pyfastcircuits.run.trace import FrozenTrace

EMBED, LOGITS, MLP = "embed", "logits", "mlp"
NodeLabel = Any  # "embed", (layer, head) or ("mlp", layer)
ReceiverLabel = Any  # ((layer, head), "Q" | "K" | "V"), ("mlp", layer) or "logits"
EdgeLabel = tuple[NodeLabel, ReceiverLabel]


def reader(receiver: ReceiverLabel) -> NodeLabel:
    """What writes of what a receiver has read: the head or MLP itself, and "logits" for the logits."""
    return receiver[0] if isinstance(receiver, tuple) and isinstance(receiver[0], tuple) else receiver


def layer_of(node: NodeLabel) -> float:
    """The layer of a node, -1 for the embedding and infinity for the logits; an MLP's lies half behind its heads'."""
    if isinstance(node, tuple):
        return node[1] + 0.5 if node[0] == MLP else float(node[0])
    return -1.0 if node == EMBED else float("inf")


@dataclass(frozen=True)
class Graph:
    """The nodes and receivers of a model.

    Attributes:
        heads: the number of heads in a layer.
        mlps: of each layer, the stream that its MLP reads; None: it has none (see Forward.mlp_reads).
    """

    heads: int
    mlps: tuple[MLPReads | None, ...]

    @staticmethod
    def of(trace: FrozenTrace) -> "Graph":
        """The graph of the model that a run is of."""
        weights = trace.guard.weights
        return Graph(weights.n_heads, tuple(trace.forward.mlp_reads(layer) for layer in range(weights.n_layers)))

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.mlps)

    @cached_property
    def nodes(self) -> list[NodeLabel]:
        """Every node, in the order in which they write."""
        nodes: list[NodeLabel] = [EMBED]
        for layer, mlp in enumerate(self.mlps):
            nodes += [(layer, head) for head in range(self.heads)]
            nodes += [(MLP, layer)] * (mlp is not None)
        return nodes

    @cached_property
    def receivers(self) -> list[ReceiverLabel]:
        """Every receiver, in the order in which they read: of a layer all queries, all keys, all values, the MLP."""
        receivers: list[ReceiverLabel] = []
        for layer, mlp in enumerate(self.mlps):
            receivers += [((layer, head), kind) for kind in KINDS for head in range(self.heads)]
            receivers += [(MLP, layer)] * (mlp is not None)
        return [*receivers, LOGITS]

    @cached_property
    def heads_at(self) -> list[int]:
        """The number of nodes in front of each layer's heads, which stand there among the nodes; last, of all nodes."""
        counts = [1]
        for mlp in self.mlps:
            counts.append(counts[-1] + self.heads + (mlp is not None))
        return counts

    @cached_property
    def receivers_at(self) -> list[int]:
        """Where each layer's receivers begin; last, the logits."""
        counts = [0]
        for mlp in self.mlps:
            counts.append(counts[-1] + len(KINDS) * self.heads + (mlp is not None))
        return counts

    def read_by_mlp(self, layer: int) -> int:
        """The number of nodes that a layer's MLP reads."""
        return self.heads_at[layer] + (self.heads if self.mlps[layer] == "after heads" else 0)

    @cached_property
    def before(self) -> list[int]:
        """How many nodes, the first ones, each receiver reads."""
        counts = []
        for layer, mlp in enumerate(self.mlps):
            counts += [self.heads_at[layer]] * (len(KINDS) * self.heads)
            counts += [self.read_by_mlp(layer)] * (mlp is not None)
        return [*counts, self.heads_at[-1]]

    @cached_property
    def offsets(self) -> list[int]:
        """The number of the first edge to each receiver, and last the number of all edges."""
        offsets = [0]
        for count in self.before:
            offsets.append(offsets[-1] + count)
        return offsets

    @cached_property
    def edges(self) -> "Edges":
        """Every edge: those to the first receiver, to the second, ..., each from the first node on."""
        return Edges(self)

    @cached_property
    def _places(self) -> tuple[dict[NodeLabel, int], dict[ReceiverLabel, int]]:
        return {x: i for i, x in enumerate(self.nodes)}, {x: i for i, x in enumerate(self.receivers)}

    def place(self, edge: EdgeLabel) -> tuple[int, int]:
        """The numbers of an edge's node and receiver.

        Raises:
            ValueError: the model has no such edge.
        """
        nodes, receivers = self._places
        try:
            source, receiver = nodes[edge[0]], receivers[edge[1]]
        except (KeyError, TypeError, IndexError):
            source, receiver = len(self.nodes), 0
        if source >= self.before[receiver]:
            raise ValueError(
                f"edge is {edge!r}, expected (node, receiver), of 'embed', (layer, head) or ('mlp', layer) and of "
                f"((layer, head), 'Q', 'K' or 'V'), ('mlp', layer) or 'logits' behind it, in a model of {self.layers} "
                f"layers of {self.heads} heads {'with' if any(self.mlps) else 'without'} MLPs"
            )
        return source, receiver


class Edges(Sequence[Label]):
    """The labels (node, receiver) of all edges of a graph, each made when it is asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __len__(self) -> int:
        """The number of edges."""
        return self.graph.offsets[-1]

    @overload
    def __getitem__(self, index: int) -> EdgeLabel: ...
    @overload
    def __getitem__(self, index: slice) -> list[Label]: ...
    def __getitem__(self, index: Any) -> Any:
        """The label of one edge, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        receiver = bisect_right(self.graph.offsets, number) - 1
        return self.graph.nodes[number - self.graph.offsets[receiver]], self.graph.receivers[receiver]

    def __iter__(self) -> Iterator[Label]:
        """Edge by edge."""
        for receiver, count in zip(self.graph.receivers, self.graph.before, strict=True):
            yield from ((node, receiver) for node in self.graph.nodes[:count])

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """The number of an edge; errors as Graph.place."""
        source, receiver = self.graph.place(value)
        return self.graph.offsets[receiver] + source
