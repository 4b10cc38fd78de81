"""The ways of a removed output: through frozen layers, through layers that are computed anew, or by one edge alone.

A node's output is taken out of the residual stream; here its loss is carried to the final residual stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.model.norms import centered, normalized
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.nodes import Edge, Head, HeadOutputs, Inputs, Node, grouped
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

Effect = Literal["total", "direct"]
SCORES = 64 << 20  # bytes of attention scores made at a time, at least one experiment's
ROWS = 1024  # positions rerun at a time, at least one experiment's: what a layer makes of more leaves the caches


def removed_z(part: FrozenTrace, layer: int, value: AblationValue) -> Tensor:
    """z of every head of a layer, less the value that takes its place: [H, B, T, r]."""
    return value.removal(HeadOutputs(layer), part)


def frozen_removal(part: FrozenTrace, sets: Sequence[Sequence[Node]], value: AblationValue) -> Tensor:
    """The loss of the final residual stream [P, B, T, d] when each set of nodes is out: directly and by later heads.

    Later heads read the stream without it under their frozen patterns; all else writes what it wrote.
    """
    gone = part.embedded.new_zeros(len(sets), *part.embedded.shape)
    for layer in range(-1, part.weights.n_layers):
        here = [[node for node in nodes if node.layer == layer] for nodes in sets]
        reached = [i for i, nodes in enumerate(sets) if min(node.layer for node in nodes) < layer]
        if reached:
            gone[reached] += _passed_on(part, gone[reached], layer, [here[i] for i in reached])
        for outputs in dict.fromkeys(node.outputs for nodes in here for node in nodes):
            removal = value.removal(outputs, part)
            siblings = {node for nodes in here for node in nodes if node.outputs == outputs}
            for node in sorted(siblings, key=lambda node: node.index):
                gone[[i for i, nodes in enumerate(here) if node in nodes]] += node.write(part, removal[node.index])
    return gone


def _passed_on(part: FrozenTrace, gone: Tensor, layer: int, out: Sequence[Sequence[Node]]) -> Tensor:
    """The loss that a layer's heads pass on when they read removals [P, B, T, d]; heads that are out pass on none."""
    passed = part.attend(gone, layer)
    for i, nodes in enumerate(out):
        for node in nodes:
            if isinstance(node, Head):
                values = part.read_by_values(gone[i], layer) @ part.weights.head("W_V", *node)
                z = apply_pattern(head_pattern(part.patterns[layer], node.head), values[None, :, None])[0, :, 0]
                passed[i] -= node.write(part, z)
    return passed


def rerun_removal(part: FrozenTrace, sets: Sequence[Sequence[Head]], value: AblationValue) -> Tensor:
    """The loss of the final residual stream [P, B, T, d] when all layers from each set's first one on are run again."""
    final = torch.empty(len(sets), *part.embedded.shape, dtype=part.embedded.dtype, device=part.embedded.device)
    firsts = [min(head.layer for head in heads) for heads in sets]
    for first, members in _rerun_together(part, firsts):
        stream = part.streams[first].expand(len(members), *part.embedded.shape)
        for layer in range(first, part.weights.n_layers):
            out = [[head.head for head in sets[i] if head.layer == layer] for i in members]
            change = _replaced(part, stream, layer, out, value) if any(out) else None
            stream = part.forward.block(layer, stream, change)
        final[members] = stream
    return part.final - final


def _rerun_together(part: FrozenTrace, layers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Experiments that are rerun together, by the layer where they start."""
    step = max(1, ROWS // part.tokens.numel())
    for first in sorted(set(layers)):
        members = [i for i, layer in enumerate(layers) if layer == first]
        for start in range(0, len(members), step):
            yield first, members[start : start + step]


def _replaced(
    part: FrozenTrace, stream: Tensor, layer: int, out: Sequence[Sequence[int]], value: AblationValue
) -> Tensor:
    """The change of a layer's attention output [P, B, T, d] when heads that read `stream` are replaced.

    It is the change in front of a norm after the heads.
    """
    instead = value.value(HeadOutputs(layer), part)
    change = torch.zeros_like(stream)
    for i, heads in enumerate(out):
        if heads:
            qkv = part.forward.qkv(layer, normalized(stream[i : i + 1], part.weights))
            z = part.forward.apply(layer, *qkv)[0].transpose(0, 1)
            W_O = part.weights.W_O[layer].to(z.dtype)[heads]
            change[i] = torch.einsum("hbtr,hrd->btd", (instead - z).expand_as(z)[heads], W_O)
    return change


def frozen_edge_z(part: FrozenTrace, sources: Sequence[Head], head: Head, value: AblationValue) -> Tensor:
    """The part of a head's z that comes by the edges from each source to its values: [P, B, T, r]; pattern frozen."""
    weights, W_V = part.weights, part.weights.head("W_V", *head)
    values = []
    for source in sources:
        virtual_weights = centered(weights.head("W_O", *source), weights) @ W_V
        z = part.apply_post_norm(removed_z(part, source.layer, value)[source.head], source.layer)
        values.append(z @ virtual_weights)
    read = torch.stack(values) * part.value_scale(head.layer)[..., None]
    z = apply_pattern(head_pattern(part.patterns[head.layer], head.head), read[:, :, None])[:, :, 0]
    return part.apply_post_norm(z, head.layer)


def destination_z_change(part: FrozenTrace, added: Tensor, layer: int, inputs: Inputs) -> Tensor:
    """The change of z [N, B, H, T, r] of a layer's heads when `added` [N, B, T, d] joins what their inputs are made of.

    Patterns and the norm in front are computed anew; queries, keys and values that are not among the inputs stay.
    """
    forward, stream = part.forward, part.streams[layer]
    clean = forward.qkv(layer, part.normed(stream, layer)[None])
    (batch, length), heads = part.tokens.shape, part.weights.n_heads
    step = max(1, SCORES // (batch * heads * length**2 * stream.element_size()))
    base, out = forward.apply(layer, *clean), []
    for some in added.split(step):
        changed = forward.qkv(layer, normalized(stream + some, part.weights))
        mixture = (new if name in inputs else old for name, new, old in zip("QKV", changed, clean, strict=True))
        out.append(forward.apply(layer, *mixture) - base)
    return torch.cat(out)


Cut = Sequence[Edge]  # edges that are cut together; their receivers read the same inputs in one layer


def _sources_of(cut: Cut) -> dict[Head, tuple[Head, ...]]:
    """The sources that each destination of a cut does without."""
    return {
        to: tuple(sorted({e.source for e in cut if e.receiver.head == to})) for to in (e.receiver.head for e in cut)
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class _Receiving:
    """One layer of destinations from which cuts take sources away; computed once for a part of a run."""

    layer: int
    inputs: Inputs
    value: AblationValue
    choices: list[tuple[Head, ...]]  # every choice of sources that some destination of the layer does without
    kept: dict[tuple[FrozenTrace, int], Tensor]  # by part and layer: the last one of all layers that share it

    def z_changes(self, part: FrozenTrace) -> Tensor:
        """The change of z [choices, B, H, T, r] of the layer's heads."""
        if (part, self.layer) not in self.kept:
            self.kept.clear()
            heads = dict.fromkeys(head for sources in self.choices for head in sources)
            gone = {head: head.write(part, removed_z(part, head.layer, self.value)[head.head]) for head in heads}
            nothing = torch.zeros_like(part.embedded)
            added = [-sum((gone[head] for head in sources), nothing) for sources in self.choices]
            self.kept[part, self.layer] = destination_z_change(part, torch.stack(added), self.layer, self.inputs)
        return self.kept[part, self.layer]


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeRemoval(Intervention):
    """Destinations in one layer read their inputs without what sources wrote; patterns are computed anew."""

    cuts: Sequence[Cut]
    receiving: _Receiving

    def removal(self, part: FrozenTrace, members: Sequence[int]) -> Tensor:
        """See Intervention: z of the write head, or what is lost through everything behind, computed anew."""
        changes, layer, choices = self.receiving.z_changes(part), self.receiving.layer, self.receiving.choices
        cuts = [self.cuts[i] for i in members]
        if self.write_heads:
            chosen = [choices.index((edge.source,)) for (edge,) in cuts]
            return -part.apply_post_norm(changes[chosen, :, self.write_heads[0].head], layer)
        W_O = part.weights.W_O[layer].to(changes.dtype)  # before a norm after the heads
        final = changes.new_zeros(len(cuts), *part.embedded.shape)
        for i, cut in enumerate(cuts):
            for to, sources in _sources_of(cut).items():
                final[i] += changes[choices.index(sources), :, to.head] @ W_O[to.head]
        for _, some in _rerun_together(part, [layer] * len(cuts)):
            stream = part.forward.block(layer, part.streams[layer].expand_as(final[some]), final[some])
            for behind in range(layer + 1, part.weights.n_layers):
                stream = part.forward.block(behind, stream)
            final[some] = stream
        return part.final - final


def edge_removals(
    weights: CircuitWeights, cuts: Sequence[Cut], value: AblationValue, effect: Effect
) -> list[EdgeRemoval]:
    """Interventions that cut edges: one to a layer of destinations, or, for direct effects, to a destination.

    What destinations then write goes straight to the logits ("direct", cuts of one edge each), or through everything
    behind them, computed anew ("total").
    """
    out: list[EdgeRemoval] = []
    kept: dict[tuple[FrozenTrace, int], Tensor] = {}
    for layer, places in sorted(grouped(cut[0].receiver.head.layer for cut in cuts).items()):
        choices = sorted({sources for i in places for sources in _sources_of(cuts[i]).values()})
        inputs = cuts[places[0]][0].receiver.inputs
        receiving = _Receiving(layer=layer, inputs=inputs, value=value, choices=choices, kept=kept)
        through = grouped((cuts[i][0].receiver.head,) if effect == "direct" else () for i in places)
        out += [
            EdgeRemoval(
                places=[places[i] for i in members],
                write_heads=write_heads,
                extra_floats_per_position=len(choices) * weights.n_heads * weights.d_value,
                cuts=[cuts[places[i]] for i in members],
                receiving=receiving,
            )
            for write_heads, members in sorted(through.items())
        ]
    return out
