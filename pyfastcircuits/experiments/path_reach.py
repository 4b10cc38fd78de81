"""How much what a path carries can still do: bounds for all paths that begin alike, from norms alone."""

from collections.abc import Sequence
from functools import cached_property
from math import comb

import torch
from torch import Tensor

from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.experiments.second_order import Basis, Moments, parts, second_order
from pyfastcircuits.model.norms import centered
from pyfastcircuits.run.losses import Unembedding
from pyfastcircuits.run.nodes import Head, Path, grouped
from pyfastcircuits.run.patterns import apply_pattern, head_pattern, stored
from pyfastcircuits.run.trace import FrozenTrace

EXACT_TAILS = 4096  # tails of two heads whose gradients are made one by one; where there are more, norms are multiplied


class Reach:
    """Bounds of the rise of the loss (its mean over the positions measured) that taking paths away brings.

    The gradient of the loss by the final residual stream goes back through the heads that can follow a path, its tail;
    for tails of a length and a first layer only the largest norm at each position is kept. What a path has written,
    times that, bounds the first order of every path that begins with it; norms carried forward bound the rest.
    """

    def __init__(self, trace: FrozenTrace, how: Measurement) -> None:
        self.trace, self.how, self.weights = trace, how, trace.weights
        layers, heads = range(self.weights.n_layers), range(self.weights.n_heads)
        self.heads = [[Head(layer, head) for head in heads] for layer in layers]
        self.count = how.asked.count
        self.scale = how.asked.rows(trace.scales[-1][..., None])
        unembedding = Unembedding(self.weights)
        found: dict[Head, list[Moments]] = {head: [] for layer in self.heads for head in layer}
        uphill = []
        bases = {}
        for rows in parts(trace, how, unembedding):
            uphill.append(rows.uphill)
            for head in found:
                basis = bases[head] = Basis(unembedding, head)
                found[head].append(Moments.of(rows, basis, squares=False))
        self.moments = {head: Moments.joined(several) for head, several in found.items()}
        self.uphill = torch.zeros_like(trace.embedded)
        self.uphill[how.asked.where] = torch.cat(uphill) / self.count

    # Whole paths

    def sizes(self, paths: Sequence[Path], z: Tensor) -> list[float]:
        """For paths with their z [P, B, T, r], bounds of the size of what taking each away does to the loss."""
        out = torch.empty(len(paths), dtype=torch.float64, device=z.device)
        for head, members in grouped(path[-1] for path in paths).items():
            delta = self.how.asked.rows(z[members]) * -self.scale
            low, high = self.moments[head].interval(delta)
            out[members] = torch.maximum(-low.mean(-1), high.mean(-1))
        return out.tolist()

    # Paths that go on

    def sizes_beyond(self, paths: Sequence[Path], z: Tensor, orders: range) -> list[float]:
        """The same for every path of these orders that begins with one of the paths, and is longer; -inf for none."""
        out = torch.full((len(paths),), -torch.inf, dtype=torch.float64, device=z.device)
        for head, members in grouped(path[-1] for path in paths).items():
            for length, some in grouped(len(paths[i]) for i in members).items():
                chosen = [members[i] for i in some]
                longest = min(max(orders) - length, self.weights.n_layers - 1 - head.layer)
                wanted = range(max(min(orders) - length, 1), longest + 1)
                if wanted:
                    out[chosen] = self._beyond(head, z[chosen], wanted)
        return out.tolist()

    def _beyond(self, head: Head, z: Tensor, more: range) -> Tensor:
        """Bounds [P] for all tails of `more` heads behind one head."""
        written = torch.linalg.vector_norm(z @ self._gram_root(head), dim=-1)  # [P, B, T]
        first = [torch.einsum("pbt,bt->p", written.double(), self.tails[k][head.layer + 1]) for k in more]
        carried, rest = written, []
        for k in range(1, more[-1] + 1):  # with k - 1 heads behind it
            if k in more:
                rest.append(self._rest(carried, head.layer + k))
            carried = self._forward(carried, head.layer + k)
        return torch.stack([(1 + 1e-4) * a + b for a, b in zip(first, rest, strict=True)]).amax(0)

    def _gram_root(self, head: Head) -> Tensor:
        """[r, r]: z times it is as long as z @ W_O."""
        root: Tensor = torch.linalg.qr(self.weights.head("W_O", *head).mT).R
        return root.mT

    def _rest(self, carried: Tensor, layer: int) -> Tensor:
        """The most that all beyond the first order can be, [P], where at most `carried` is read from `layer` on."""
        most = carried.new_zeros(len(carried), dtype=torch.float64)
        for heads in self.heads[layer:]:
            for head in heads:
                moments = self.moments[head]
                z = self._mixed(carried, head) * self._read_norm(head)
                length = (self.how.asked.rows(z[..., None]) * self.scale)[..., 0].double()
                square, bound = length.square() * moments.spread, length * moments.longest
                square = square + moments.lost * (2 * bound).square()
                high = second_order(torch.zeros_like(square), square, 2 * bound, 2 * bound).high
                most = torch.maximum(most, high.mean(-1))
        return most

    def _forward(self, carried: Tensor, layer: int) -> Tensor:
        """The most that one head from `layer` on can write of what carries at most this, [P, B, T]."""
        most = torch.zeros_like(carried)
        for heads in self.heads[layer:]:
            for head in heads:
                most = torch.maximum(most, self._mixed(carried, head) * self._head_norm(head))
        return most

    def _mixed(self, carried: Tensor, head: Head) -> Tensor:
        """Norms [P, B, T] through a head's pattern, with the norms' scales before and after it."""
        trace, layer = self.trace, head.layer
        values = (carried * trace.value_scale(layer)).movedim(0, -1)[None, :, None]  # [1, B, 1, T, P]
        mixed = apply_pattern(head_pattern(trace.patterns[layer], head.head), values)[0, :, 0].movedim(-1, 0)
        return mixed if trace.post_scales is None else mixed * trace.post_scales[layer].abs()

    def _read_norm(self, head: Head) -> float:
        """How much longer z can be, in the metric of the head's basis, than what is read."""
        return self._norms[head][0]

    def _head_norm(self, head: Head) -> float:
        """How much longer what the head writes can be than what is read."""
        return self._norms[head][1]

    @cached_property
    def _norms(self) -> dict[Head, tuple[float, float]]:
        out = {}
        for layer in self.heads:
            for head in layer:
                W_V = torch.linalg.qr(self.weights.head("W_V", *head)).R.double()
                through = (W_V @ self.moments[head].root, W_V @ self._gram_root(head).double())
                read, written = (float(torch.linalg.matrix_norm(x, 2)) * (1 + 1e-5) for x in through)
                out[head] = read, written
        return out

    # Gradients that go back

    @cached_property
    def tails(self) -> list[list[Tensor]]:
        """tails[k][layer]: [B, T], fp64, the largest norm of the gradient through any k heads from `layer` on."""
        layers = self.weights.n_layers
        none = self.uphill.new_zeros(self.uphill.shape[:-1], dtype=torch.float64)
        out = [[_lengths(self.uphill)] * (layers + 1)]
        for k in range(1, layers + 1):
            behind = [none] * (layers + 1)
            for layer in reversed(range(layers)):
                behind[layer] = torch.maximum(behind[layer + 1], self._tails_from(layer, k, out))
            out.append(behind)
        return out

    def _tails_from(self, layer: int, k: int, shorter: list[list[Tensor]]) -> Tensor:
        """The same for tails whose first head is in this layer."""
        layers, heads = self.weights.n_layers, self.weights.n_heads
        found = []
        for head in self.heads[layer]:
            if k == 1:
                found.append(_lengths(self._back(self.uphill[None], head)[0]))
            elif k == 2 and comb(layers, 2) * heads**2 <= EXACT_TAILS:
                singles = [x for later in self.heads[layer + 1 :] for x in later]
                found += [_lengths(self._back(self._singles[x][None], head)[0]) for x in singles]
            else:
                found.append(self._back_norms(shorter[k - 1][layer + 1], head))
        return torch.stack(found).amax(0) if found else torch.zeros_like(shorter[0][0])

    @cached_property
    def _singles(self) -> dict[Head, Tensor]:
        return {head: self._back(self.uphill[None], head)[0] for layer in self.heads for head in layer}

    def _back(self, gradients: Tensor, head: Head) -> Tensor:
        """Gradients [S, B, T, d] by what a head writes, as gradients by what it reads."""
        trace, weights, layer = self.trace, self.weights, head.layer
        z = trace.apply_post_norm(gradients, layer) @ weights.head("W_O", *head).mT
        values = stored(head_pattern(trace.patterns[layer], head.head))[:, 0].mT @ z
        return centered(values @ weights.head("W_V", *head).mT, weights) * trace.value_scale(layer)[..., None]

    def _back_norms(self, norms: Tensor, head: Head) -> Tensor:
        trace, layer = self.trace, head.layer
        norms = norms if trace.post_scales is None else norms * trace.post_scales[layer].abs()
        pattern = stored(head_pattern(trace.patterns[layer], head.head))[:, 0].double()
        mixed: Tensor = (pattern.mT @ norms[..., None])[..., 0]
        return mixed * trace.value_scale(layer) * self._head_norm(head)


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths.double()
