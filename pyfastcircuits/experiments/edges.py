"""How an ablated or patched head's output reaches the rest of the model: frozen, computed anew, or by one hop alone."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import Replacement
from pyfastcircuits.experiments.measure import Change
from pyfastcircuits.run.forward import Rerun, centered, norm_scale
from pyfastcircuits.run.patterns import mixed, of_head
from pyfastcircuits.run.trace import FrozenTrace

__all__ = [
    "Effect",
    "Head",
    "Hop",
    "Input",
    "frozen_hop",
    "frozen_removed",
    "hop_changes",
    "removed_z",
    "renormed",
    "rerun_of",
    "rerun_removed",
    "written",
]

Head = tuple[int, int]
Hop = tuple[Head, ...]  # source, destination
Effect = Literal["total", "direct"]
Input = Literal["Q", "K", "V"]
SCORES = 64 << 20  # bytes of attention scores made at a time, at least one experiment's
ROWS = 1024  # positions rerun at a time, at least one experiment's: what a layer makes of more leaves the caches


def rerun_of(trace: FrozenTrace) -> Rerun:
    """The model's layers, to be run again.

    Raises:
        ValueError: the trace has none.
    """
    if trace.rerun is None:
        raise ValueError("this run's model cannot be run again from within: only frozen attention is possible")
    return trace.rerun


def removed_z(part: FrozenTrace, sequences: slice, layer: int, swap: Replacement) -> Tensor:
    """z of every head of a layer, less what takes its place: [H, B, T, r]."""
    return swap.removed(lambda run: run.z(layer), part, sequences, ("z", layer))


def written(part: FrozenTrace, z: Tensor, layer: int, head: int) -> Tensor:
    """What z [..., B, T, r] of a head adds to the residual stream [..., B, T, d]."""
    return part.post(z @ part.weights.head("W_O", layer, head), layer)


def frozen_removed(part: FrozenTrace, sequences: slice, sets: Sequence[tuple[Head, ...]], swap: Replacement) -> Tensor:
    """What each set of heads takes out of the final residual stream, directly and through later heads: [P, B, T, d]."""
    gone = part.embedded.new_zeros(len(sets), *part.embedded.shape)
    for layer in range(part.weights.n_layers):
        own = [[head for at, head in heads if at == layer] for heads in sets]
        behind = [i for i, heads in enumerate(sets) if heads[0][0] < layer]
        if behind:
            gone[behind] += _passed(part, gone[behind], layer, [own[i] for i in behind])
        if any(own):
            z = removed_z(part, sequences, layer, swap)
            for head in sorted({head for heads in own for head in heads}):
                gone[[i for i, heads in enumerate(own) if head in heads]] += written(part, z[head], layer, head)
    return gone


def _passed(part: FrozenTrace, gone: Tensor, layer: int, out: Sequence[Sequence[int]]) -> Tensor:
    """What a layer's heads make of what is gone [P, B, T, d], but for those that are out themselves."""
    passed = part.attend(gone, layer)
    for i, heads in enumerate(out):
        for head in heads:
            read = part.normed(gone[i], layer) @ part.weights.head("W_V", layer, head)
            z = mixed(of_head(part.patterns[layer], head), read[None, :, None])[0, :, 0]
            passed[i] -= written(part, z, layer, head)
    return passed


def rerun_removed(part: FrozenTrace, sequences: slice, sets: Sequence[tuple[Head, ...]], swap: Replacement) -> Tensor:
    """The same with everything behind each set's first layer computed anew."""
    final = torch.empty(len(sets), *part.embedded.shape, dtype=part.embedded.dtype, device=part.embedded.device)
    layers = [heads[0][0] for heads in sets]
    for first, members in at_once(part, layers):
        stream = part.streams[first].expand(len(members), *part.embedded.shape)
        for layer in range(first, part.weights.n_layers):
            own = [[head for at, head in sets[i] if at == layer] for i in members]
            change = _replaced(part, sequences, stream, layer, own, swap) if any(own) else None
            stream = rerun_of(part).after(layer, stream, change)
        final[members] = stream
    return part.final - final


def at_once(part: FrozenTrace, layers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Experiments that are rerun together, by the layer where they start."""
    step = max(1, ROWS // part.tokens.numel())
    for first in sorted(set(layers)):
        members = [i for i, layer in enumerate(layers) if layer == first]
        for start in range(0, len(members), step):
            yield first, members[start : start + step]


def _replaced(
    part: FrozenTrace, sequences: slice, stream: Tensor, layer: int, out: Sequence[Sequence[int]], swap: Replacement
) -> Tensor:
    """What the output of a layer's attention changes by when heads that read `stream` are replaced: [P, B, T, d]."""
    instead = swap(lambda run: run.z(layer), sequences, ("z", layer))
    change = torch.zeros_like(stream)
    for i, heads in enumerate(out):
        if heads:
            z = z_of(part, stream[i : i + 1], layer)[0].transpose(0, 1)
            W_O = part.weights.W_O[layer].to(z.dtype)[heads]  # before a norm after the heads
            change[i] = torch.einsum("hbtr,hrd->btd", (instead - z).expand_as(z)[heads], W_O)
    return change


def renormed(part: FrozenTrace, stream: Tensor) -> Tensor:
    """A residual stream through a layer's norm computed anew, before its gain."""
    return centered(stream, part.weights) * norm_scale(stream, part.weights)[..., None]


def z_of(part: FrozenTrace, stream: Tensor, layer: int) -> Tensor:
    """z [N, B, H, T, r] of a layer that reads `stream` [N, B, T, d], computed anew."""
    rerun = rerun_of(part)
    return rerun.mix(layer, *rerun.project(layer, renormed(part, stream)))


def frozen_hop(part: FrozenTrace, sequences: slice, sources: Sequence[Head], head: Head, swap: Replacement) -> Tensor:
    """What a head no longer mixes when it does not read what each source wrote, its pattern frozen: [P, B, T, r]."""
    weights = part.weights
    W_V = weights.head("W_V", *head)
    values = [
        part.post(removed_z(part, sequences, layer, swap)[h], layer)
        @ (centered(weights.head("W_O", layer, h), weights) @ W_V)
        for layer, h in sources
    ]
    read = torch.stack(values) * part.scales[head[0]][..., None]
    z = mixed(of_head(part.patterns[head[0]], head[1]), read[:, :, None])[:, :, 0]
    return part.post(z, head[0])


def received(part: FrozenTrace, added: Tensor, layer: int, inputs: str) -> Tensor:
    """What z [N, B, H, T, r] of a layer's heads changes by when `added` [N, B, T, d] joins what makes their `inputs`.

    Patterns and the norm in front are computed anew; queries, keys and values that are not among the inputs stay.
    """
    rerun, stream = rerun_of(part), part.streams[layer]
    clean = rerun.project(layer, part.normed(stream, layer)[None])
    out = []
    (batch, length), heads = part.tokens.shape, part.weights.n_heads
    step = max(1, SCORES // (batch * heads * length**2 * stream.element_size()))
    base = rerun.mix(layer, *clean)
    for some in added.split(step):
        changed = rerun.project(layer, renormed(part, stream + some))
        mixture = (new if name in inputs else old for name, new, old in zip("QKV", changed, clean, strict=True))
        out.append(rerun.mix(layer, *mixture) - base)
    return torch.cat(out)


def _read(cut: Sequence[Hop]) -> dict[Head, tuple[Head, ...]]:
    """The sources that each destination of a cut does without."""
    return {to: tuple(sorted({source for source, at in cut if at == to})) for _, to in cut}


def hop_changes(
    trace: FrozenTrace, cuts: Sequence[Sequence[Hop]], inputs: str, swap: Replacement, effect: Effect
) -> list[Change]:
    """Destinations read `inputs` without what sources wrote, one hop or, in a layer, several to a cut: their new output
    goes straight to the logits ("direct", single hops), or through everything behind it, computed anew ("total").
    """
    weights = trace.weights
    rerun_of(trace)
    groups: dict[tuple[int, int | None], list[int]] = {}
    for i, cut in enumerate(cuts):
        (_, to), *others = cut
        groups.setdefault((to[0], None if others or effect == "total" else to[1]), []).append(i)
    reads = {
        layer: sorted({sources for cut in cuts if cut[0][1][0] == layer for sources in _read(cut).values()})
        for layer, _ in groups
    }
    kept: dict[tuple[int, int], Tensor] = {}

    def z_changes(part: FrozenTrace, sequences: slice, layer: int) -> Tensor:
        """Of every choice of sources: kept for the destinations of one layer."""
        key = layer, sequences.start
        if key not in kept:
            kept.clear()
            heads = {head for sources in reads[layer] for head in sources}
            gone = {(at, h): written(part, removed_z(part, sequences, at, swap)[h], at, h) for at, h in heads}
            added = [
                -sum((gone[head] for head in sources), torch.zeros_like(part.embedded)) for sources in reads[layer]
            ]
            kept[key] = received(part, torch.stack(added), layer, inputs)
        return kept[key]

    def into(layer: int, head: int | None, indices: list[int]) -> Change:
        def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
            changes = z_changes(part, sequences, layer)
            chosen = [cuts[indices[i]] for i in members]
            if head is not None:
                members = [reads[layer].index((source,)) for ((source, _),) in chosen]
                return -part.post(changes[members, :, head], layer)
            W_O = weights.W_O[layer].to(changes.dtype)  # before a norm after the heads
            final = changes.new_zeros(len(chosen), *part.embedded.shape)
            for i, cut in enumerate(chosen):
                for to, sources in _read(cut).items():
                    final[i] += changes[reads[layer].index(sources), :, to[1]] @ W_O[to[1]]
            for _, some in at_once(part, [layer] * len(chosen)):
                stream = rerun_of(part).after(layer, part.streams[layer].expand_as(final[some]), final[some])
                for behind in range(layer + 1, weights.n_layers):
                    stream = rerun_of(part).after(behind, stream)
                final[some] = stream
            return part.final - final

        scratch = len(reads[layer]) * weights.n_heads * weights.d_head
        return Change(indices, removed, [] if head is None else [(layer, head)], scratch=scratch)

    return [into(*key, indices) for key, indices in sorted(groups.items(), key=lambda x: (x[0][0], x[0][1] or 0))]
