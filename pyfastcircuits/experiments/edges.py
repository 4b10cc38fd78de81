"""The ways of a removed output: through frozen layers, through layers that are computed anew, or by one edge alone.

A node's output is taken out of the residual stream; here its loss is carried to the final residual stream.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.model.norms import centered, normalized
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import Edge, Head, HeadOutputs, Inputs, Node, grouped
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

Effect = Literal["total", "direct"]
SCORES = 64 << 20  # bytes of attention scores made at a time, at least one experiment's
ROWS = 1024  # positions rerun at a time, at least one experiment's: what a layer makes of more leaves the caches


def removed_z(part: FrozenTrace, layer: int, value: AblationValue) -> Tensor:
    """z of every head of a layer, less the value that takes its place: [H, B, T, r]."""
    return value.removal(HeadOutputs(layer), part)


def removed_writes(part: FrozenTrace, heads: Iterable[Head], value: AblationValue) -> dict[Head, Tensor]:
    """What each head writes [B, T, d], less what it would write by the value that takes its place."""
    z = {layer: removed_z(part, layer, value) for layer in {head.layer for head in heads}}
    return {head: head.write(part, z[head.layer][head.head]) for head in heads}


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

    def change(members: Sequence[int], layer: int, stream: Tensor) -> Tensor | None:
        out = [[head.head for head in sets[i] if head.layer == layer] for i in members]
        return _replaced(part, stream, layer, out, value) if any(out) else None

    return _rerun(part, [min(head.layer for head in heads) for heads in sets], change)


def _rerun(
    part: FrozenTrace, firsts: Sequence[int], change: Callable[[Sequence[int], int, Tensor], Tensor | None]
) -> Tensor:
    """The loss of the final residual stream [P, B, T, d] when all layers from each experiment's first one on run again.

    `change(members, layer, stream)` joins what the heads of a layer write in some experiments when they read `stream`.
    """
    final = torch.empty(len(firsts), *part.embedded.shape, dtype=part.embedded.dtype, device=part.embedded.device)
    for first, together in grouped(firsts).items():
        for some in slices(len(together), max(1, ROWS // part.tokens.numel())):
            members = together[some]
            stream = part.streams[first].expand(len(members), *part.embedded.shape)
            for layer in range(first, part.weights.n_layers):
                stream = part.forward.block(layer, stream, change(members, layer, stream))
            final[members] = stream
    return part.final - final


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


def mixed_z(part: FrozenTrace, layer: int, stream: Tensor, inputs: Inputs, clean: Sequence[Tensor]) -> Tensor:
    """z [N, B, H, T, r] of a layer whose heads make `inputs` of a stream [N, B, T, d]; the others stay clean."""
    changed = part.forward.qkv(layer, normalized(stream, part.weights))
    mixture = (new if name in inputs else old for name, new, old in zip("QKV", changed, clean, strict=True))
    return part.forward.apply(layer, *mixture)


Cut = Sequence[Edge]  # edges that are cut together; their receivers read the same inputs in one layer


def _sources_of(cut: Cut) -> dict[Head, tuple[Head, ...]]:
    """The sources that each destination of a cut does without."""
    return {
        to: tuple(sorted({e.source for e in cut if e.receiver.head == to})) for to in (e.receiver.head for e in cut)
    }


Choices = tuple[tuple[Head, ...], ...]  # every choice of sources that some destination of a layer does without


def _z_changes(part: FrozenTrace, layer: int, inputs: Inputs, choices: Choices, value: AblationValue) -> Tensor:
    """The change of z [choices, B, H, T, r] of a layer's heads that read their inputs without what sources wrote.

    Patterns and the norm in front are computed anew; queries, keys and values that are not among the inputs stay.
    """
    heads = dict.fromkeys(head for sources in choices for head in sources)
    gone = removed_writes(part, heads, value)
    nothing, stream = torch.zeros_like(part.embedded), part.streams[layer]
    streams = torch.stack([stream - sum((gone[head] for head in sources), nothing) for sources in choices])
    clean = part.forward.qkv(layer, part.normed(stream, layer)[None])
    base = part.forward.apply(layer, *clean)
    scores = part.tokens.numel() * part.tokens.shape[1] * part.weights.n_heads  # of one experiment
    step = max(1, SCORES // (scores * stream.element_size()))
    return torch.cat([mixed_z(part, layer, some, inputs, clean) - base for some in streams.split(step)])


def _direct_removal(
    part: FrozenTrace, cuts: Sequence[Cut], choices: Choices, z_changes: Callable[..., Tensor]
) -> Tensor:
    """What one destination's z [P, B, T, r] loses by cuts of one edge each."""
    head, inputs = cuts[0][0].receiver
    chosen = [choices.index((edge.source,)) for (edge,) in cuts]
    return -part.apply_post_norm(z_changes(part, head.layer, inputs, choices)[chosen, :, head.head], head.layer)


def _total_removal(
    part: FrozenTrace, cuts: Sequence[Cut], choices: Choices, z_changes: Callable[..., Tensor]
) -> Tensor:
    """What the final residual stream [P, B, T, d] loses by cuts, through everything behind, computed anew."""
    (layer, _), inputs = cuts[0][0].receiver
    changes = z_changes(part, layer, inputs, choices)
    W_O = part.weights.W_O[layer].to(changes.dtype)  # before a norm after the heads
    written = changes.new_zeros(len(cuts), *part.embedded.shape)
    for i, cut in enumerate(cuts):
        for to, sources in _sources_of(cut).items():
            written[i] += changes[choices.index(sources), :, to.head] @ W_O[to.head]
    return _rerun(part, [layer] * len(cuts), lambda members, at, _: written[members] if at == layer else None)


def edge_removals(
    weights: CircuitWeights, cuts: Sequence[Cut], value: AblationValue, effect: Effect
) -> list[Intervention]:
    """Interventions that cut edges: one to a layer of destinations, or, for direct effects, to a destination.

    What destinations then write goes straight to the logits ("direct", cuts of one edge each), or through everything
    behind them, computed anew ("total").
    """
    out: list[Intervention] = []
    kept: dict[tuple[FrozenTrace, int], Tensor] = {}  # of the last part and layer

    def z_changes(part: FrozenTrace, layer: int, inputs: Inputs, choices: Choices) -> Tensor:
        if (part, layer) not in kept:
            kept.clear()
            kept[part, layer] = _z_changes(part, layer, inputs, choices, value)
        return kept[part, layer]

    for _, places in sorted(grouped(cut[0].receiver.head.layer for cut in cuts).items()):
        choices = tuple(sorted({sources for i in places for sources in _sources_of(cuts[i]).values()}))
        remove = _direct_removal if effect == "direct" else _total_removal
        through = grouped((cuts[i][0].receiver.head,) if effect == "direct" else () for i in places)
        out += [
            Intervention(
                places=[places[i] for i in members],
                items=[cuts[places[i]] for i in members],
                remove=partial(remove, choices=choices, z_changes=z_changes),
                write_heads=write_heads,
                extra_floats_per_position=len(choices) * weights.n_heads * weights.d_value,
            )
            for write_heads, members in sorted(through.items())
        ]
    return out
