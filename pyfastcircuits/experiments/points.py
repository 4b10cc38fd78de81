"""The points of a layer where one run's activations are put into another: the maps of activation patching.

Each point is what all nodes, heads or patterns of a layer give there; a patch replaces it everywhere, at some positions
or at one, and all behind it is computed anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.rerun import Start, again, clean_qkv, clean_z, first_of, removed_rows
from pyfastcircuits.result import Label
from pyfastcircuits.run.forward import layer_after
from pyfastcircuits.run.nodes import MLP, Bias, heads_written, written
from pyfastcircuits.run.trace import FrozenTrace

What = Literal["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
OF_HEADS = ("z", "q", "k", "v", "pattern")


@dataclass(frozen=True)
class PointOutputs:
    """What a run has at a point of a layer, by heads where the point is theirs: [n, B, T, x], see nodes.Outputs."""

    what: What
    layer: int

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See nodes.Outputs."""
        layer, stream = self.layer, run.streams[self.layer]
        if self.what == "resid_pre":
            return stream[None]
        if self.what in ("attn_out", "resid_mid"):
            added = heads_written(run, layer) + written(run, Bias(layer))
            return (added if self.what == "attn_out" else stream + added)[None]
        if self.what == "mlp_out":
            return MLP(layer)(run)
        if self.what == "z":
            return run.z(layer)
        if self.what == "pattern":
            return run.pattern(layer).transpose(0, 1)
        return clean_qkv(run, layer)["qkv".index(self.what)][0].transpose(0, 1)


class Point(NamedTuple):
    """What one experiment replaces: a point of a layer, of one of its heads, everywhere or at one position.

    Of a pattern, also one entry: the attention from a position to a source.
    """

    layer: int
    head: int | None
    position: int | None
    source: int | None = None


class Patched:
    """The Changes of experiments that each replace one point of a run.

    Heads do not hear of each other within a layer: what all of them make of changed queries, keys, values or patterns
    is computed at once, and each experiment takes its own head's part.
    """

    def __init__(self, part: FrozenTrace, what: What, points: Sequence[Point], value: AblationValue) -> None:
        self.part, self.what, self.points, self.value = part, what, points, value
        self.mask = value.mask(part)
        self._layer, self._gone = -1, torch.empty(0)

    @property
    def starts(self) -> list[Start]:
        """Where each experiment starts."""
        common = 0 if self.mask is None else first_of(self.mask)
        return [Start(x.layer, common if x.position is None else x.position) for x in self.points]

    def again(self, layer: int, members: Sequence[int], position: int, stream: Tensor) -> Tensor | None:
        """See Changes."""
        return None

    def enter(self, layer: int, members: Sequence[int], position: int) -> Tensor:
        """See Changes: of some experiments that have one position, or none, in common."""
        if layer != self._layer:
            self._layer, self._gone = layer, self.value.removal(PointOutputs(self.what, layer), self.part)
        gone = self._gone
        if self.points[members[0]].position is not None:
            gone = torch.zeros_like(self._gone)
            gone[:, :, position] = self._gone[:, :, position]
        part, forward, count = self.part, self.part.forward, len(members)
        stream, z = part.streams[layer][None, :, position:], clean_z(part, layer, position)
        if self.what in OF_HEADS:
            written = forward.write(layer, z, self._added(layer, members, gone, z[0], position))
            return layer_after(forward, layer, stream, written)
        here = gone[:, :, position:].expand(count, -1, -1, -1)
        if self.what == "resid_pre":
            return again(part, layer, position, stream - here)
        if self.what == "mlp_out":
            return part.streams[layer + 1][None, :, position:] - here
        written = forward.write(layer, z) - here
        if self.what == "attn_out":
            return layer_after(forward, layer, stream, written)
        return stream + written + forward.mlp(layer, stream + written)

    def _added(self, layer: int, members: Sequence[int], gone: Tensor, z: Tensor, position: int) -> Tensor:
        """What each experiment's head adds to the heads' write, before a norm after them: [n, B, T - position, d].

        `gone` [n, B, T, x] is what all heads lose, z [B, H, T - position, r] what they mix in the clean run.
        """
        part, weights = self.part, self.part.weights
        if self.what == "z":
            change = -gone[:, :, position:]
        else:
            qkv = list(clean_qkv(part, layer))
            if self.what == "pattern":
                v = qkv[2][0].repeat_interleave(weights.n_heads // qkv[2].shape[2], 1).transpose(0, 1)
                if self.points[members[0]].source is not None:
                    return self._added_by_entries(layer, members, gone[:, :, position], v, z.shape[2])
                change = -gone[:, :, position:] @ v
            else:
                at = "qkv".index(self.what)
                qkv[at] = qkv[at] - gone.transpose(0, 1)
                change = (part.forward.apply(layer, *qkv)[0, ..., position:, :] - z).transpose(0, 1)
        group = weights.n_heads // len(gone)  # of the heads that share keys and values
        added = []
        for member in members:
            first = (self.points[member].head or 0) * group
            heads = slice(first, first + group)
            added.append(torch.einsum("hbtr,hrd->btd", change[heads], weights.W_O[layer][heads].to(z.dtype)))
        return torch.stack(added)

    def _added_by_entries(self, layer: int, members: Sequence[int], gone: Tensor, v: Tensor, length: int) -> Tensor:
        """Likewise, of one entry each of a row [H, B, T] of the patterns."""
        out = v.new_zeros(len(members), v.shape[1], length, self.part.weights.d_model)
        for i, member in enumerate(members):
            _, head, _, source = self.points[member]
            assert head is not None
            change = -gone[head, :, source, None] * v[head, :, source]
            out[i, :, 0] = change @ self.part.weights.W_O[layer, head].to(v.dtype)
        return out


def patches(
    trace: FrozenTrace, what: What, value: AblationValue, *, each: bool
) -> tuple[list[Intervention], list[Label], tuple[int, ...]]:
    """The patch of every layer, or every head, at a point, at each position on its own if asked: labels and shape too.

    Raises:
        ValueError: a model that has no such point.
    """
    weights, layers = trace.weights, range(trace.weights.n_layers)
    _check_point(trace, what)
    shape: tuple[int, ...] = (len(layers),)
    heads: Sequence[int | None] = [None]
    if what in OF_HEADS:
        heads = range(weights.W_K.shape[1] if what in "kv" else weights.n_heads)
        shape = (*shape, len(heads))
    positions: Sequence[int | None] = range(trace.tokens.shape[1]) if each else [None]
    points = [Point(layer, head, position) for layer in layers for head in heads for position in positions]
    order = sorted(range(len(points)), key=lambda i: points[i].position or 0)  # those of a position run together

    def remove(part: FrozenTrace, some: Sequence[Point], where: Tensor) -> Tensor:
        changes = Patched(part, what, some, value)
        return removed_rows(part, changes.starts, changes, where)

    patched = Intervention(places=order, items=[points[i] for i in order], remove=remove, of_rows=True)
    labels = [_label(what, point) for point in points]
    return [patched], labels, (*shape, len(positions)) if each else shape


def _label(what: What, point: Point) -> Label:
    """(what, layer) or ((layer, head), what), and with a position (that, position)."""
    label: Label = (what, point.layer) if point.head is None else ((point.layer, point.head), what.upper())
    if what == "z":
        label = ((point.layer, point.head),)
    elif what == "pattern":
        label = ((point.layer, point.head), what)
    return label if point.position is None else (label, point.position)


def _check_point(trace: FrozenTrace, what: What) -> None:
    reads = {trace.forward.mlp_reads(layer) for layer in range(trace.weights.n_layers)}
    if what == "mlp_out" and None in reads:
        raise ValueError("what is 'mlp_out', but the model has layers without an MLP")
    if what == "resid_mid" and reads != {"after heads"}:
        raise ValueError("what is 'resid_mid', but the model has layers whose MLP does not read what heads write")
