"""What nodes write when they are outside of a circuit: their writes of the corrupted run, zero, or a mean."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue, AverageOver, Mode, check_same_model
from pyfastcircuits.run.graph import Graph
from pyfastcircuits.run.nodes import MLP, Embedding, Head, Node
from pyfastcircuits.run.trace import FrozenTrace

HELD = 256 << 20  # bytes of the changes of all nodes that are held at a time; where they take more, they are made again


class Outside:
    """See `edge_scores` for mode, corrupted and over.

    Raises:
        TypeError, ValueError: runs of different models or shapes; no corrupted run where one is needed.
    """

    def __init__(self, clean: FrozenTrace, corrupted: FrozenTrace | None, mode: Mode, over: AverageOver) -> None:
        if corrupted is not None:
            check_same_model("corrupted", corrupted, clean)
        elif mode == "resample":
            raise ValueError("corrupted is None, but mode is 'resample': give the run that writes are taken from")
        self.mode, self.corrupted = mode, corrupted
        self.value = AblationValue(clean, mode, None if mode == "zero" else corrupted, over)
        self.graph = Graph.of(clean)

    def changes(self, part: FrozenTrace, nodes: Sequence[Node]) -> Tensor:
        """What a group of nodes writes outside of the circuit, less what it writes in the clean run: [n, B, T, d]."""
        outputs = nodes[0].outputs
        if self.mode != "resample" or part.post_scales is None:
            removal = self.value.removal(outputs, part)
            return -torch.stack([node.write(part, removal[node.index]) for node in nodes])
        assert self.corrupted is not None
        other = self.corrupted[part.sequences]
        clean, theirs = outputs(part), outputs(other)
        return torch.stack(
            [node.write(other, theirs[node.index]) - node.write(part, clean[node.index]) for node in nodes]
        )


class Changes:
    """The changes of all nodes of a part of a run: held, if they fit, or made again for each use."""

    def __init__(self, part: FrozenTrace, outside: Outside) -> None:
        self.part, self.outside, graph = part, outside, outside.graph
        self.groups: list[tuple[slice, Sequence[Node]]] = [(slice(0, 1), [Embedding()])]  # outputs are made by group
        for layer, mlp in enumerate(graph.mlps):
            first, last = graph.heads_at[layer : layer + 2]
            heads = slice(first, first + graph.heads)
            self.groups.append((heads, [Head(layer, head) for head in range(graph.heads)]))
            if mlp is not None:
                self.groups.append((slice(last - 1, last), [MLP(layer)]))
        self.held: Tensor | None = None
        if len(graph.nodes) * part.embedded.nbytes <= HELD:
            held = part.embedded.new_empty(len(graph.nodes), *part.embedded.shape)
            for where, nodes in self.groups:
                held[where] = outside.changes(part, nodes)
            self.held = held

    def blocks(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """The changes of the first `count` nodes [n, B, T, d], a few at a time."""
        if self.held is not None:
            yield slice(0, count), self.held[:count]
            return
        for where, nodes in self.groups:
            if where.start < count:
                yield where, self.outside.changes(self.part, nodes)

    def of(self, some: slice) -> Tensor:
        """The changes of some nodes of one group, [n, B, T, d]."""
        if self.held is not None:
            return self.held[some]
        where, nodes = next(group for group in self.groups if some.start < group[0].stop)
        return self.outside.changes(self.part, nodes)[some.start - where.start : some.stop - where.start]
