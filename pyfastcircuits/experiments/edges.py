"""The ways of a removed output: through frozen layers, through layers that are computed anew, or by one edge alone.

A node's output is taken out of the residual stream; here its loss is carried to the final residual stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.rerun import Site, Start, clean_z, removed_rows
from pyfastcircuits.model.norms import centered, normalized
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import layer_after
from pyfastcircuits.run.nodes import MLP, Edge, Head, HeadInput, HeadOutputs, Inputs, Logits, Node, Receiver, grouped
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

Effect = Literal["total", "direct"]
SCORES = 64 << 20  # bytes of attention scores made at a time, at least one experiment's


def removed_z(part: FrozenTrace, layer: int, value: AblationValue) -> Tensor:
    """z of every head of a layer, less the value that takes its place: [H, B, T, r]."""
    return value.removal(HeadOutputs(layer), part)


def removed_writes(part: FrozenTrace, nodes: Iterable[Node], value: AblationValue) -> dict[Node, Tensor]:
    """What each node writes [B, T, d], less what it would write by the value that takes its place."""
    nodes = list(nodes)
    gone = {outputs: value.removal(outputs, part) for outputs in dict.fromkeys(node.outputs for node in nodes)}
    return {node: node.write(part, gone[node.outputs][node.index]) for node in nodes}


def frozen_removal(part: FrozenTrace, sites: Sequence[Site], value: AblationValue) -> Tensor:
    """The loss of the final residual stream [P, B, T, d] when each site's nodes are out: directly and by later heads.

    Later heads read the stream without it under their frozen patterns; all else writes what it wrote.
    """
    gone = part.embedded.new_zeros(len(sites), *part.embedded.shape)
    for layer in range(-1, part.weights.n_layers):
        here = [[node for node in site.nodes if node.layer == layer] for site in sites]
        reached = [i for i, site in enumerate(sites) if min(node.layer for node in site.nodes) < layer]
        if reached:
            out = [(sites[i], here[i]) for i in reached]
            gone[reached] += _passed_on(part, gone[reached], layer, out, value.mask(part))
        written = removed_writes(part, dict.fromkeys(node for nodes in here for node in nodes), value)
        for i, nodes in enumerate(here):
            for node in nodes:
                gone[i] += sites[i].only_here(written[node])
    return gone


def _passed_on(
    part: FrozenTrace, gone: Tensor, layer: int, out: Sequence[tuple[Site, Sequence[Node]]], mask: Tensor | None
) -> Tensor:
    """The loss that a layer's heads pass on when they read removals [P, B, T, d]; none where they are out."""
    passed = part.attend(gone, layer)
    for i, (site, nodes) in enumerate(out):
        for node in nodes:
            if isinstance(node, Head):
                values = part.read_by_values(gone[i], layer) @ part.weights.head("W_V", *node)
                z = apply_pattern(head_pattern(part.patterns[layer], node.head), values[None, :, None])[0, :, 0]
                z = z if mask is None else z.masked_fill(~mask[..., None], 0)
                passed[i] -= node.write(part, site.only_here(z))
    return passed


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


Choices = tuple[tuple[Node, ...], ...]  # every choice of sources that some receiver of a layer does without
Cut = Sequence[Edge]  # edges that are cut together; their receivers are one MLP, or read the same inputs in one layer


def place(receiver: Receiver) -> tuple[int, str]:
    """What receivers share whose edges can be cut together: their layer, and what they make of the stream."""
    if isinstance(receiver, Logits):
        return -1, "logits"
    return receiver.layer, "mlp" if isinstance(receiver, MLP) else receiver.inputs


def _sources_of(cut: Cut) -> dict[HeadInput | MLP, tuple[Node, ...]]:
    """The sources that each receiver of a cut does without."""
    return {to: tuple(dict.fromkeys(e.source for e in cut if e.receiver == to)) for to in _receivers(cut)}


def _receivers(cut: Cut) -> dict[HeadInput | MLP, None]:
    return dict.fromkeys(e.receiver for e in cut if not isinstance(e.receiver, Logits))


def _without(part: FrozenTrace, stream: Tensor, choices: Choices, value: AblationValue) -> Tensor:
    """A stream [B, T, d] without what each choice of sources wrote, [choices, B, T, d]."""
    gone = removed_writes(part, dict.fromkeys(node for sources in choices for node in sources), value)
    return torch.stack(
        [stream - sum((gone[node] for node in sources), torch.zeros_like(stream)) for sources in choices]
    )


def _z_changes(part: FrozenTrace, layer: int, inputs: Inputs, choices: Choices, value: AblationValue) -> Tensor:
    """The change of z [choices, B, H, T, r] of a layer's heads that read their inputs without what sources wrote.

    Patterns and the norm in front are computed anew; queries, keys and values that are not among the inputs stay.
    """
    streams = _without(part, part.streams[layer], choices, value)
    clean = part.forward.qkv(layer, part.normed(part.streams[layer], layer)[None])
    base = part.forward.apply(layer, *clean)
    scores = part.tokens.numel() * part.tokens.shape[1] * part.weights.n_heads  # of one experiment
    step = max(1, SCORES // (scores * streams.element_size()))
    return torch.cat([mixed_z(part, layer, some, inputs, clean) - base for some in streams.split(step)])


def _mlp_changes(part: FrozenTrace, layer: int, choices: Choices, value: AblationValue) -> Tensor:
    """The change of an MLP's write [choices, B, T, d] when it reads the stream without what sources wrote."""
    read = part.streams[layer]
    if part.forward.mlp_reads(layer) == "after heads":
        read = read + part.forward.write(layer, clean_z(part, layer))[0]
    clean = part.forward.mlp(layer, read[None])
    return torch.cat([part.forward.mlp(layer, some[None]) - clean for some in _without(part, read, choices, value)])


@dataclass(frozen=True, eq=False)
class _Cuts:
    """The Changes of experiments that cut edges to the heads, or the MLP, of one layer."""

    part: FrozenTrace
    changes: Tensor  # [P, B, T, d], of what the heads write in front of a norm after them, or of what the MLP writes
    mlp: bool

    def enter(self, layer: int, members: Sequence[int], position: int) -> Tensor:
        """See Changes."""
        if self.mlp:
            return self.part.streams[layer + 1] + self.changes[members]
        stream, forward = self.part.streams[layer][None], self.part.forward
        written = forward.write(layer, clean_z(self.part, layer), self.changes[members])
        return layer_after(forward, layer, stream, written)

    def again(self, layer: int, members: Sequence[int], position: int, stream: Tensor) -> Tensor | None:
        """See Changes."""
        return None


def _logits_removal(part: FrozenTrace, cuts: Sequence[Cut], value: AblationValue) -> Tensor:
    """What the logits do not read [P, B, T, d] of sources whose edges to them are cut."""
    gone = removed_writes(part, dict.fromkeys(edge.source for cut in cuts for edge in cut), value)
    return torch.stack([torch.stack([gone[edge.source] for edge in cut]).sum(0) for cut in cuts])


def edge_removals(
    weights: CircuitWeights, cuts: Sequence[Cut], value: AblationValue, effect: Effect
) -> list[Intervention]:
    """Interventions that cut edges: one to a layer of destinations, or, for direct effects, to a destination.

    What destinations then write goes straight to the logits ("direct", cuts of one edge each), or through everything
    behind them, computed anew ("total").
    """
    out: list[Intervention] = []
    kept: dict[tuple[FrozenTrace, tuple[int, str]], Tensor] = {}  # of the last part and place

    def changes(part: FrozenTrace, receiver: HeadInput | MLP, choices: Choices) -> Tensor:
        key = part, place(receiver)
        if key not in kept:
            kept.clear()
            if isinstance(receiver, MLP):
                kept[key] = _mlp_changes(part, receiver.layer, choices, value)
            else:
                kept[key] = _z_changes(part, receiver.layer, receiver.inputs, choices, value)
        return kept[key]

    def direct(choices: Choices, part: FrozenTrace, some: Sequence[Cut]) -> Tensor:
        (receiver,) = _receivers(some[0])
        chosen = [choices.index((edge.source,)) for (edge,) in some]
        change = changes(part, receiver, choices)[chosen]
        if isinstance(receiver, MLP):
            return -change
        return -part.apply_post_norm(change[:, :, receiver.head.head], receiver.layer)

    def total(choices: Choices, part: FrozenTrace, some: Sequence[Cut], where: Tensor) -> Tensor:
        first = next(iter(_receivers(some[0])))
        change = changes(part, first, choices)
        written = part.embedded.new_zeros(len(some), *part.embedded.shape)
        for i, cut in enumerate(some):
            for to, sources in _sources_of(cut).items():
                here = change[choices.index(sources)]
                if isinstance(to, HeadInput):  # before a norm after the heads
                    here = here[:, to.head.head] @ part.weights.W_O[to.layer, to.head.head].to(change.dtype)
                written[i] += here
        starts = [Start(first.layer, 0)] * len(some)
        return removed_rows(part, starts, _Cuts(part, written, isinstance(first, MLP)), where)

    for (_, inputs), places in sorted(grouped(place(cut[0].receiver) for cut in cuts).items()):
        if inputs == "logits":
            remove = partial(_logits_removal, value=value)
            out.append(Intervention(places=places, items=[cuts[i] for i in places], remove=remove))
            continue
        choices = tuple(dict.fromkeys(sources for i in places for sources in _sources_of(cuts[i]).values()))
        heads = [tuple(to.head for to in _receivers(cuts[i]) if isinstance(to, HeadInput)) for i in places]
        through = grouped(heads if effect == "direct" else [() for _ in places])
        kept_floats = weights.d_model if inputs == "mlp" else weights.n_heads * weights.d_value
        out += [
            Intervention(
                places=[places[i] for i in members],
                items=[cuts[places[i]] for i in members],
                remove=partial(direct if effect == "direct" else total, choices),
                of_rows=effect == "total",
                write_heads=write_heads,
                extra_floats_per_position=len(choices) * kept_floats,
            )
            for write_heads, members in sorted(through.items())
        ]
    return out
