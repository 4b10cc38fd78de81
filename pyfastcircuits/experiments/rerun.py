"""Layers run again from where experiments change something: many experiments at a time.

Attention is causal, so that nothing changes in front of the first position that an experiment changes: a layer then
makes queries, keys and values of the whole stream, and all else of the positions from there on.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.model.norms import normalized
from pyfastcircuits.run import memory
from pyfastcircuits.run.dictionary import Feature
from pyfastcircuits.run.forward import layer_after
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import MLP, Bias, Embedding, Head, Node, grouped
from pyfastcircuits.run.trace import FrozenTrace

ROWS = 1024  # positions rerun at a time, at least one experiment's: what a layer makes of more leaves the caches


class Start(NamedTuple):
    """Where an experiment changes something first."""

    layer: int  # -1: the embedding
    position: int


class Changes(Protocol):
    """What experiments change; they are given by number, and streams from a position on: [n, B, T - position, d]."""

    def enter(self, layer: int, members: Sequence[int], position: int) -> Tensor:
        """The stream after the layer in which these experiments start, which reads the clean one."""

    def again(self, layer: int, members: Sequence[int], position: int, stream: Tensor) -> Tensor | None:
        """The stream after a layer that reads `stream`; None where these experiments change nothing in it."""


def rerun(part: FrozenTrace, starts: Sequence[Start], changes: Changes) -> Iterator[tuple[list[int], int, Tensor]]:
    """The final residual stream of every experiment, a few at a time: their numbers, and it from a position on."""
    for position, together in grouped(start.position for start in starts).items():
        together.sort(key=lambda i: starts[i].layer)
        rows = len(part.tokens) * (part.tokens.shape[1] - position)
        at_once = min(ROWS // rows, 8 * ROWS // part.tokens.numel())  # queries, keys and values are of all positions
        for some in slices(len(together), max(1, at_once)):
            yield together[some], position, _rerun(part, starts, together[some], position, changes)


def removed_rows(part: FrozenTrace, starts: Sequence[Start], changes: Changes, where: Tensor) -> Tensor:
    """What the final residual stream loses at the positions `where` [B, T] of each experiment, [P, N, d]."""
    out = part.final.new_zeros(len(starts), int(where.sum()), part.final.shape[-1])
    positions = where.nonzero()[:, 1]
    last = int(positions.max())
    wanted = [i for i, start in enumerate(starts) if start.position <= last]
    for members, position, stream in rerun(part, [starts[i] for i in wanted], _Some(changes, wanted)):
        places = [wanted[i] for i in members]
        later = (positions >= position).nonzero()[:, 0]
        gone = (part.final[:, position:] - stream)[:, where[:, position:]]
        out[torch.tensor(places, device=out.device)[:, None], later] = gone
    return out


class _Some(NamedTuple):
    """Changes of some of the experiments."""

    changes: Changes
    members: Sequence[int]

    def enter(self, layer: int, members: Sequence[int], position: int) -> Tensor:
        """See Changes."""
        return self.changes.enter(layer, [self.members[i] for i in members], position)

    def again(self, layer: int, members: Sequence[int], position: int, stream: Tensor) -> Tensor | None:
        """See Changes."""
        return self.changes.again(layer, [self.members[i] for i in members], position, stream)


def _rerun(
    part: FrozenTrace, starts: Sequence[Start], members: Sequence[int], position: int, changes: Changes
) -> Tensor:
    """The final stream of experiments that are sorted by the layers in which they start."""
    running: list[int] = []
    stream = part.embedded[None, :0]
    for layer in range(starts[members[0]].layer, part.weights.n_layers):
        entering = [i for i in members if starts[i].layer == layer]
        if running:
            changed = changes.again(layer, running, position, stream)
            stream = again(part, layer, position, stream) if changed is None else changed
        if entering:
            entered = changes.enter(layer, entering, position)
            stream = torch.cat((stream, entered)) if running else entered
            running += entering
    return stream


def again(part: FrozenTrace, layer: int, position: int, stream: Tensor) -> Tensor:
    """The stream after a layer in which nothing is changed."""
    if position == 0:
        return part.forward.block(layer, stream)
    z = mixed_again(part, layer, position, stream)
    return layer_after(part.forward, layer, stream, part.forward.write(layer, z))


def mixed_again(part: FrozenTrace, layer: int, position: int, stream: Tensor) -> Tensor:
    """z [n, B, H, T - position, r] of a layer that reads a stream that is the clean one in front of a position."""
    forward, count = part.forward, len(stream)
    if position and not forward.places_alike:
        before = part.streams[layer][:, :position].expand(count, -1, -1, -1)
        stream, position, skipped = torch.cat((before, stream), 2), 0, position
    else:
        skipped = position
    made = forward.qkv(layer, normalized(stream, part.weights))
    if position:
        in_front = [x[..., :position, :].expand(count, *x.shape[1:3], -1, -1) for x in clean_qkv(part, layer)]
        q, k, v = (torch.cat(both, 3) for both in zip(in_front, made, strict=True))
    else:
        q, k, v = made
    return forward.apply(layer, q, k, v)[..., skipped:, :]


def clean_qkv(part: FrozenTrace, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, B, H or Hkv, T, r] of a layer in the clean run; a part keeps a few."""
    kept = part.clean_qkv.get(layer)
    if kept is None:
        kept = part.forward.qkv(layer, part.normed(part.streams[layer], layer)[None])
        floats = sum(x.numel() for x in kept) * part.weights.n_layers
        if 2 * floats * part.final.itemsize <= memory.clean_logits_bytes(part.final.device):
            part.clean_qkv[layer] = kept
    return kept


def clean_z(part: FrozenTrace, layer: int, position: int = 0) -> Tensor:
    """z [1, B, H, T - position, r] of a layer in the clean run."""
    return part.z(layer).transpose(0, 1)[None, ..., position:, :]


def first_of(mask: Tensor) -> int:
    """The first position of a mask [B, T] in any sequence; T where there is none."""
    return int(mask.any(0).long().cummax(0).values.eq(0).sum())


class Site(NamedTuple):
    """Nodes that an experiment takes out together: everywhere, or at one position."""

    nodes: tuple[Node, ...]
    position: int | None = None

    def only_here(self, gone: Tensor, first: int = 0) -> Tensor:
        """A removal [B, T - first, x], at the positions of this site alone."""
        if self.position is None:
            return gone
        out = torch.zeros_like(gone)
        out[:, self.position - first] = gone[:, self.position - first]
        return out


class NodesOut:
    """The Changes of experiments that take nodes out of a run and put a value in their place."""

    def __init__(self, part: FrozenTrace, sites: Sequence[Site], value: AblationValue) -> None:
        self.part, self.sites, self.value = part, sites, value
        self.mask = value.mask(part)
        self._values: dict[Node, Tensor | float] = {}

    @property
    def starts(self) -> list[Start]:
        """Where each experiment starts."""
        common = 0 if self.mask is None else first_of(self.mask)
        return [
            Start(min(node.layer for node in site.nodes), common if site.position is None else site.position)
            for site in self.sites
        ]

    def enter(self, layer: int, members: Sequence[int], position: int) -> Tensor:
        """See Changes."""
        if layer < 0:
            own = self.part.embedded[:, position:]
            return torch.stack([self._without_embedding(i, own, position) for i in members])
        stream, z = self.part.streams[layer][None, :, position:], clean_z(self.part, layer, position)
        return self._after(layer, members, position, stream, z, entering=True)

    def again(self, layer: int, members: Sequence[int], position: int, stream: Tensor) -> Tensor | None:
        """See Changes."""
        if not any(self._nodes(i, layer) for i in members):
            return None
        z = mixed_again(self.part, layer, position, stream)
        return self._after(layer, members, position, stream, z, entering=False)

    def _without_embedding(self, member: int, own: Tensor, position: int) -> Tensor:
        nodes = self._nodes(member, -1)
        out = own - self._gone(member, Embedding(), own, position) if Embedding() in nodes else own
        return self._without_features(member, -1, out, own, position)

    def _without_features(self, member: int, layer: int, after: Tensor, middle: Tensor, position: int) -> Tensor:
        """The stream after a layer without its features, which read that stream or, as an MLP, one before its end."""
        left = after
        for node in self._nodes(member, layer):
            if isinstance(node, Feature):
                read = after if node.dictionary.reads == "stream" else middle
                gone = self._gone(member, node, node.activation(self.part, read), position)
                left = left - node.write(self.part, gone)
        return left

    def _nodes(self, member: int, layer: int) -> list[Node]:
        return [node for node in self.sites[member].nodes if node.layer == layer]

    def _after(
        self, layer: int, members: Sequence[int], position: int, stream: Tensor, z: Tensor, *, entering: bool
    ) -> Tensor:
        after, middle = self._with_heads_and_mlps(layer, members, position, stream, z, entering=entering)
        if not any(isinstance(node, Feature) for member in members for node in self._nodes(member, layer)):
            return after
        places = enumerate(members)
        return torch.stack([self._without_features(x, layer, after[i], middle[i], position) for i, x in places])

    def _with_heads_and_mlps(
        self, layer: int, members: Sequence[int], position: int, stream: Tensor, z: Tensor, *, entering: bool
    ) -> tuple[Tensor, Tensor]:
        """The stream after a layer whose heads, bias and MLP are replaced where they are out; what its MLP reads."""
        forward, weights, site = self.part.forward, self.part.weights, self.sites
        added = stream.new_zeros(len(members), *stream.shape[1:])
        for i, member in enumerate(members):
            for node in self._nodes(member, layer):
                if isinstance(node, Head):
                    gone = self._gone(member, node, z[i % len(z), :, node.head], position)
                    added[i] -= gone @ weights.W_O[layer, node.head].to(gone.dtype)
                elif isinstance(node, Bias):
                    added[i] -= self._gone(member, node, node(self.part)[0, :, position:], position)
        written = forward.write(layer, z, added)
        out = [i for i, member in enumerate(members) if MLP(layer) in site[member].nodes]
        middle = stream + written
        read = stream.expand_as(middle) if forward.mlp_reads(layer) == "before heads" else middle
        if not out:
            return layer_after(forward, layer, stream, written), read
        whole = {i for i in out if self.mask is None and site[members[i]].position is None}
        alone = {i for i in out if entering and len(self._nodes(members[i], layer)) == 1}
        computed = [i for i in range(len(members)) if i not in whole and i not in alone]
        mlp = MLP(layer)(self.part)[:, :, position:].repeat(len(members), 1, 1, 1)
        if computed:
            mlp[computed] = forward.mlp(layer, read[computed])
        for i in out:
            mlp[i] -= self._gone(members[i], MLP(layer), mlp[i], position)
        return middle + mlp, read

    def _gone(self, member: int, node: Node, own: Tensor, position: int) -> Tensor:
        """What a node loses that would give `own` [B, T - position, x], at the positions where it is out."""
        if node not in self._values:
            value = self.value.value(node.outputs, self.part)
            self._values[node] = value[node.index] if isinstance(value, Tensor) else value
        value = self._values[node]
        if isinstance(value, Tensor) and value.shape[-2] > 1:
            value = value[..., position:, :]
        gone = own - value
        if self.mask is not None:
            gone = gone.masked_fill(~self.mask[:, position:, None], 0)
        return self.sites[member].only_here(gone, position)


def rerun_removal(part: FrozenTrace, sites: Sequence[Site], where: Tensor, value: AblationValue) -> Tensor:
    """What the final residual stream loses at `where`, [P, N, d], when all behind each site is computed anew."""
    changes = NodesOut(part, sites, value)
    return removed_rows(part, changes.starts, changes, where)
