"""What nodes write when they are outside of a circuit: their writes of the corrupted run, zero, or a mean."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue, AverageOver, Mode, check_same_model
from pyfastcircuits.run.graph import Graph
from pyfastcircuits.run.nodes import MLP, Embedding, Head, Node, has_mlp
from pyfastcircuits.run.trace import FrozenTrace

HELD = 256 << 20  # bytes of the changes of all nodes that are held at a time; where they take more, they are made again


class Outside:
    """See `edge_scores` for mode, corrupted and over.

    `clean_norms`: where there is a norm after the heads, z of the corrupted run goes through the clean run's, as in
    `path_patching`, and not through its own.

    Raises:
        TypeError, ValueError: runs of different models or shapes; no corrupted run where one is needed.
    """

    def __init__(
        self,
        clean: FrozenTrace,
        corrupted: FrozenTrace | None,
        mode: Mode = "resample",
        over: AverageOver = "all",
        *,
        clean_norms: bool = False,
    ) -> None:
        if corrupted is not None:
            check_same_model("corrupted", corrupted, clean)
        elif mode == "resample":
            raise ValueError("corrupted is None, but mode is 'resample': give the run that writes are taken from")
        self.writes_from = corrupted if mode == "resample" and not clean_norms else None
        self.value = AblationValue(clean, mode, None if mode == "zero" else corrupted, over)
        self.graph = Graph.of(clean)

    def change(self, part: FrozenTrace, nodes: Sequence[Node], other: FrozenTrace | None) -> Tensor:
        """What a group of nodes gives outside of the circuit, less what it gives in the clean run: [n, B, T, x].

        Of heads it is z, with the scale of a norm after them, and W_O makes it what they write. `other`: the same part
        of the corrupted run; None: what takes the place is scaled as the clean run's.
        """
        outputs, layer = nodes[0].outputs, nodes[0].layer
        through = isinstance(nodes[0], Head)

        def scaled(run: FrozenTrace, x: Tensor) -> Tensor:
            return run.apply_post_norm(x, layer) if through else x

        if other is None:
            return -scaled(part, self.value.removal(outputs, part))
        return scaled(other, outputs(other)) - scaled(part, outputs(part))


class Changes:
    """The changes of what all nodes of a part of a run write.

    Held are the changes themselves, if they fit, or else what heads have mixed, of which they are made for each use.
    """

    def __init__(self, part: FrozenTrace, outside: Outside) -> None:
        self.part, graph = part, outside.graph
        self.groups: list[tuple[slice, Sequence[Node]]] = [(slice(0, 1), [Embedding()])]  # outputs are made by group
        for layer, mlp in enumerate(graph.mlps):
            first, last = graph.heads_at[layer : layer + 2]
            heads = slice(first, first + graph.heads)
            self.groups.append((heads, [Head(layer, head) for head in range(graph.heads)]))
            if mlp is not None:
                self.groups.append((slice(last - 1, last), [MLP(layer)]))
        self.held: Tensor | None = None
        if len(graph.nodes) * part.embedded.nbytes <= HELD:
            self.held = part.embedded.new_empty(len(graph.nodes), *part.embedded.shape)
        self._outputs = self._room()
        self._make(outside)

    def _room(self) -> list[Tensor]:
        """What each group's changes are put into: parts of one tensor, between which no other memory lies."""
        if self.held is not None:
            return [self.held[where] for where, _ in self.groups]
        heads, d_value = self.part.weights.n_heads, self.part.weights.d_value
        places = self.part.embedded.shape
        shapes = [(heads, *places[:2], d_value) if isinstance(x[0], Head) else (1, *places) for _, x in self.groups]
        room = self.part.embedded.new_empty(sum(map(prod, shapes))).split([*map(prod, shapes)])
        return [some.view(shape) for some, shape in zip(room, shapes, strict=True)]

    def _make(self, outside: Outside) -> None:
        """Make the changes of every group; of both runs no layer's z outlives its turn."""
        other = None if outside.writes_from is None else outside.writes_from[self.part.sequences]
        runs = [self.part] if other is None else [self.part, other]
        for out, (_, nodes) in zip(self._outputs, self.groups, strict=True):
            change = outside.change(self.part, nodes, other)
            out.copy_(change if self.held is None else self._written(nodes[0], change))
            if isinstance(nodes[0], MLP) or (isinstance(nodes[0], Head) and not has_mlp(self.part, nodes[0].layer)):
                for run in runs:
                    run.forget_z(nodes[0].layer)

    def _written(self, node: Node, change: Tensor) -> Tensor:
        """What a group, of which this is a node, writes [n, B, t, d] of the change of what it gives."""
        return change @ self.part.weights.heads("W_O", node.layer)[:, None] if isinstance(node, Head) else change

    def blocks(self, count: int, places: slice) -> Iterator[tuple[slice, Tensor]]:
        """The changes of the first `count` nodes at some positions [n, B, t, d], a few nodes at a time."""
        whole = places.start == 0 and places.stop >= self.part.tokens.shape[1]
        if self.held is not None and whole:
            yield slice(0, count), self.held[:count]
            return
        for out, (where, nodes) in zip(self._outputs, self.groups, strict=True):
            if where.start < count:
                some = out[:, :, places]
                yield where, some if self.held is not None else self._written(nodes[0], some)

    def of(self, some: slice) -> Tensor:
        """The changes of some nodes of one group, [n, B, T, d]."""
        if self.held is not None:
            return self.held[some]
        number = self.number(some.start)
        where, nodes = self.groups[number]
        return self._written(nodes[0], self._outputs[number])[some.start - where.start : some.stop - where.start]

    def number(self, node: int) -> int:
        """The number of the group that a node is in."""
        return next(i for i, (where, _) in enumerate(self.groups) if node < where.stop)

    def summed(self, number: int) -> Tensor:
        """The change of what a group of nodes writes together, [B, T, d]."""
        nodes = self.groups[number][1]
        if self.held is not None or not isinstance(nodes[0], Head):
            return self._outputs[number].sum(0)
        return torch.einsum("hbtr,hrd->btd", self._outputs[number], self.part.weights.heads("W_O", nodes[0].layer))
