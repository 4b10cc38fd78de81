"""The edited model: edges inside of a circuit carry what their nodes now write, all others what nodes write outside.

Two forms give the same. A receiver reads the stream of writes outside of the circuit, and for each edge inside what its
node adds to that; or it reads the stream of what all nodes now write, less that for each edge outside. The one with
fewer edges to put right is taken: a small circuit costs little, and so does one that lacks few edges.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.outside import HELD, Changes, Outside
from pyfastcircuits.model.norms import norm_scale, normalized
from pyfastcircuits.run import memory
from pyfastcircuits.run.graph import Graph
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import KINDS, MLP, span, written
from pyfastcircuits.run.split_inputs import SplitInputs, mixed_by_head
from pyfastcircuits.run.trace import FrozenTrace

Place = tuple[int, int]  # the numbers of an edge's node and receiver, see Graph.place


def edited(
    clean: FrozenTrace, outside: Outside, circuits: Sequence[Iterable[Place]], *, without: bool = False
) -> list[Intervention]:
    """Experiments that run the edited model of each circuit: of the edges named, or `without` them of all others.

    A node that the circuit does not lead to from the embedding is outside of it: it writes what it does outside.
    """
    graph, weights = outside.graph, clean.weights
    masks = [_mask(graph, circuit, without) for circuit in circuits]
    kept: dict[FrozenTrace, _Outer] = {}  # of the last part

    def final(part: FrozenTrace, mask: Tensor) -> Tensor:
        if outside.writes_from is not None and not mask.any():
            return outside.writes_from[part.sequences].final  # every node writes what it does in that run
        if part not in kept:
            kept.clear()
            kept[part] = _Outer(part, outside)
        return _Edited(kept[part], mask).final()

    def remove(part: FrozenTrace, some: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.final - final(part, mask) for mask in some])

    block = memory.block_bytes(weights.device)  # of what nodes write HELD is filled, where others fill a block
    floats = max(1, 2 * len(graph.nodes) * weights.d_model * block // HELD)
    return [Intervention(places=range(len(masks)), items=masks, remove=remove, extra_floats_per_position=floats)]


def _mask(graph: Graph, circuit: Iterable[Place], without: bool) -> Tensor:
    """Whether each node's edge to each receiver is inside, [nodes, receivers]."""
    mask = torch.zeros(len(graph.nodes), len(graph.receivers), dtype=torch.bool)
    nodes, receivers = zip(*places, strict=True) if (places := list(circuit)) else ((), ())
    mask[list(nodes), list(receivers)] = True
    if not without:
        return mask
    there = torch.arange(len(mask))[:, None] < torch.tensor(graph.before)
    return there & ~mask


class _Outer:
    """The run of nodes that are all outside, in a part: what circuits of that part share."""

    def __init__(self, part: FrozenTrace, outside: Outside) -> None:
        self.part, self.graph, self.changes = part, outside.graph, Changes(part, outside)
        self._writes: dict[int, Tensor] = {}  # by group
        self._made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._split: dict[int, SplitInputs] = {}

    @property
    def bias_depends_on_heads(self) -> bool:
        """Whether heads have a bias in front of a norm after them: what it writes, which no edge carries, is as it is
        now, and only a stream of what is now written has it.
        """
        weights = self.part.weights
        return weights.ln_post_w is not None and weights.b_O is not None

    @cached_property
    def before(self) -> list[Tensor]:
        """What the stream behind each group has changed by, [B, T, d]."""
        return list(accumulate(map(self.changes.summed, range(len(self.changes.groups)))))

    @cached_property
    def end(self) -> Tensor:
        """The final residual stream, [B, T, d]."""
        stream = self.part.final.clone()
        for number in range(len(self.changes.groups)):
            stream += self.changes.summed(number)
        return stream

    def stream(self, layer: int) -> Tensor:
        """The residual stream in front of a layer, [B, T, d]."""
        return self.part.streams[layer] + self._changed(self.graph.heads_at[layer])

    def read_by_mlp(self, layer: int) -> Tensor:
        """What a layer's MLP reads."""
        if self.graph.mlps[layer] == "before heads":
            return self.stream(layer)
        clean = self.part.streams[layer + 1] - written(self.part, MLP(layer))
        return clean + self._changed(self.graph.read_by_mlp(layer))

    def _changed(self, count: int) -> Tensor:
        """What the first nodes write more than in the clean run."""
        return next(x for (where, _), x in zip(self.changes.groups, self.before, strict=True) if where.stop == count)

    def writes(self, some: Sequence[int]) -> Tensor:
        """What some nodes of one group write, [n, B, T, d]."""
        number, (where, nodes) = next(x for x in enumerate(self.changes.groups) if some[0] < x[1][0].stop)
        writes = self._writes.get(number)
        if writes is None:
            outputs = nodes[0].outputs(self.part)
            writes = torch.stack([node.write(self.part, outputs[node.index]) for node in nodes])
            writes += self.changes.of(where)
            if self.changes.held is not None:
                self._writes[number] = writes
        return writes[span([node - where.start for node in some])]

    def made(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The queries [1, B, H, T, r], keys and values [1, B, Hkv, T, r] of a layer."""
        if layer not in self._made:
            self._made[layer] = self.part.forward.qkv(layer, normalized(self.stream(layer), self.part.weights)[None])
        return self._made[layer]

    def split(self, layer: int) -> SplitInputs:
        """How heads of a layer read streams of their own."""
        if layer not in self._split:
            self._split[layer] = SplitInputs(self.part, layer, self.stream(layer), self.made(layer))
        return self._split[layer]


class _Edited:
    """The edited model of one circuit. `inside` [nodes, receivers] says which edges are."""

    def __init__(self, outer: _Outer, inside: Tensor) -> None:
        self.outer, self.part, self.graph = outer, outer.part, outer.graph
        there = torch.arange(len(inside))[:, None] < torch.tensor(self.graph.before)
        # receivers read the stream of what nodes now write
        self.running = outer.bias_depends_on_heads or 2 * int(inside.sum()) > int(there.sum())
        self.alive = _reached(self.graph, inside)
        wrong = (there & ~inside if self.running else inside) & self.alive[:, None]
        self.needed = wrong.any(1).nonzero().flatten().tolist()
        mix = wrong[self.needed].mT.to(self.part.embedded)
        self.mix = -mix if self.running else mix  # what receivers read more than the stream, [receivers, needed nodes]
        self.wrong = wrong.any(0).tolist()  # whether a receiver reads something else
        self.more = self.part.embedded.new_empty(len(self.needed), self.part.embedded.numel())  # ... than outside
        if self.needed and not self.needed[0]:
            self.more[0] = outer.changes.of(slice(0, 1)).flatten().neg()

    def _rows(self, nodes: Sequence[int]) -> tuple[list[int], slice]:
        """Which of some nodes, that follow one another, are needed, and where they lie among those."""
        first, last = (bisect_left(self.needed, x) for x in (nodes[0], nodes[-1] + 1))
        return self.needed[first:last], slice(first, last)

    def _put_right(self, receivers: Sequence[int], stream: Tensor) -> Tensor:
        """What receivers of one layer read [n, B, T, d] beside a stream that is the same for all [B, T, d]."""
        count = bisect_left(self.needed, self.graph.before[receivers[0]])
        if not count:
            return stream.expand(len(receivers), *stream.shape)
        mix = self.mix[span(list(receivers)), :count]
        read = stream.new_empty(len(receivers), stream.numel())
        return torch.addmm(stream.flatten(), mix, self.more[:count], out=read).view(-1, *stream.shape)

    def final(self) -> Tensor:
        """The final residual stream, [B, T, d]."""
        stream, unchanged = self.part.embedded, self.running
        for layer in range(self.graph.layers):
            first, last = self.graph.receivers_at[layer : layer + 2]
            if unchanged and not any(self.wrong[first:last]):
                self._leave(layer)
                stream = self.part.streams[layer + 1]
                continue
            unchanged = False
            behind = self._heads(layer, stream)
            stream = behind if self.graph.mlps[layer] is None else self._mlp(layer, stream, behind)
        end = stream if self.running else self.outer.end
        return self._put_right([self.graph.receivers_at[-1]], end)[0]

    def _leave(self, layer: int) -> None:
        """Note what the nodes of a layer, which write what they do in the clean run, write more than outside."""
        for where, _ in self.outer.changes.groups:
            if self.graph.heads_at[layer] <= where.start < self.graph.heads_at[layer + 1]:
                own, rows = self._rows(range(where.start, where.stop))
                if own:
                    changes = self.outer.changes.of(where)[span([node - where.start for node in own])]
                    self.more[rows] = changes.flatten(1).neg()

    def _heads(self, layer: int, stream: Tensor) -> Tensor:
        """The stream behind a layer's heads that read `stream`; in the other form it stays as it is."""
        graph, part, first = self.graph, self.part, self.graph.heads_at[layer]
        nodes = range(first, first + graph.heads)
        own, rows = self._rows(nodes)
        if not self.running:
            if not own:
                return stream
            stream, made = self.outer.stream(layer), self.outer.made(layer)
        else:
            made = part.forward.qkv(layer, normalized(stream, part.weights)[None])
        z = self._mixed(layer, stream, made)
        if own:
            writes = _writes(part, layer, z, [node - first for node in own])
            torch.sub(writes.flatten(1), self.outer.writes(own).flatten(1), out=self.more[rows])
        if not self.running:
            return stream
        behind = stream + part.forward.write(layer, z[None])[0]
        if dead := [node for node in nodes if not self.alive[node]]:
            writes = _writes(part, layer, z, [node - first for node in dead])
            behind += (self.outer.writes(dead) - writes).sum(0)
        return behind

    def _mixed(self, layer: int, stream: Tensor, made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """z [B, H, T, r] of heads that make `made` of a stream, but for what they read by edges of their own."""
        heads, begin = self.graph.heads, self.graph.receivers_at[layer]
        own = [[head for head in range(heads) if self.wrong[begin + i * heads + head]] for i in range(len(KINDS))]
        if not any(own):
            return self.part.forward.apply(layer, *made)[0]
        inputs = [common[0].repeat_interleave(heads // common.shape[2], 1) for common in made]
        at_once = len(KINDS) if len(KINDS) * heads * stream.nbytes <= HELD else 1
        for kinds in (range(len(KINDS))[some] for some in slices(len(KINDS), at_once)):
            receivers = [begin + i * heads + head for i in kinds for head in own[i]]
            if receivers:
                streams = self._put_right(receivers, stream).split([len(own[i]) for i in kinds])
                for i, read in zip(kinds, streams, strict=True):
                    if own[i]:
                        made_by_head = self.outer.split(layer).read(KINDS[i], own[i], read)
                        inputs[i] = inputs[i].clone()
                        inputs[i][:, own[i]] = made_by_head.transpose(0, 1)
        return mixed_by_head(self.part, layer, *inputs)

    def _mlp(self, layer: int, before: Tensor, behind: Tensor) -> Tensor:
        """The stream behind a layer's MLP, in front of whose heads is `before` and behind them `behind`."""
        node, receiver = self.graph.heads_at[layer + 1] - 1, self.graph.receivers_at[layer + 1] - 1
        if self.running:
            common = before if self.graph.mlps[layer] == "before heads" else behind
        elif self._rows([node])[0]:
            common = self.outer.read_by_mlp(layer)
        else:
            return behind
        if not self.alive[node]:
            return behind + self.outer.writes([node])[0]
        write = self.part.forward.mlp(layer, self._put_right([receiver], common))[0]
        own, rows = self._rows([node])
        if own:
            self.more[rows] = (write - self.outer.writes(own)).flatten(1)
        return behind + write if self.running else behind


def _reached(graph: Graph, inside: Tensor) -> Tensor:
    """Whether edges inside lead to each node from the embedding, [nodes]; the embedding is one of them."""
    reached = inside.new_zeros(len(graph.nodes))
    reached[0] = True
    for layer in range(graph.layers):
        first, (begin, end) = graph.heads_at[layer], graph.receivers_at[layer : layer + 2]
        reads = (inside[:, begin:end] & reached[:, None]).any(0)
        reached[first : first + graph.heads] = reads[: len(KINDS) * graph.heads].view(len(KINDS), -1).any(0)
        if graph.mlps[layer] is not None:
            reached[graph.heads_at[layer + 1] - 1] = (inside[:, end - 1] & reached).any()
    return reached


def _writes(part: FrozenTrace, layer: int, z: Tensor, heads: Sequence[int]) -> Tensor:
    """What some heads write [n, B, T, d], of z [B, H, T, r] of all heads of their layer."""
    weights = part.weights
    out = z[:, list(heads)].transpose(0, 1) @ weights.heads("W_O", layer)[list(heads)][:, None]
    if weights.ln_post_w is None or not len(heads):
        return out
    read = z.transpose(1, 2).flatten(2) @ weights.W_O[layer].to(z.dtype).flatten(0, 1)
    read = read if weights.b_O is None else read + weights.b_O[layer].to(z.dtype)
    return out * norm_scale(read, weights)[..., None]
