"""Both sides of a composition score as pairs of small factors, so that no [d, d] matrix is formed.

A source head writes OV1 = W_V @ W_O. A destination head reads M2: QK = W_Q @ W_K.T by its queries ("Q"), QK transposed
by its keys ("K"), or OV by its values ("V"). Composition scores want only the norms of OV1, M2 and OV1 @ M2, and a norm
does not change when the factor W [d, r] on the outside is replaced by the triangle R [r, r] with R.T @ R = W.T @ W. So
each head is kept as a triangle, `outer` [r, r], and the factor that faces the other head, `inner` [r, d].
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from operator import itemgetter

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights, Weight
from pyfastcircuits.ops.pair_norms import multiplied
from pyfastcircuits.run.nodes import KINDS, Head, parse_head

BLOCK = 512 << 20  # bytes of one side's factors held at a time
_DESTINATIONS: dict[str, tuple[Weight, Weight]] = {"Q": ("W_K", "W_Q"), "K": ("W_Q", "W_K"), "V": ("W_O", "W_V")}


def triangle(W: Tensor) -> Tensor:
    """R [..., r, r] with R.T @ R = W.T @ W: it stands for W [..., d, r] where only norms matter.

    A Cholesky factorisation in fp64 makes it, which for fp32 weights is many times faster than QR and no less accurate;
    QR makes it for fp64 weights and where a Gram matrix is singular.
    """
    if W.shape[-2] <= W.shape[-1]:
        return W
    tracked = W.requires_grad and torch.is_grad_enabled()
    mode = "reduced" if tracked else "r"  # the derivative needs Q
    if W.dtype == torch.float64:
        exact: Tensor = torch.linalg.qr(W, mode=mode).R
        return exact
    flat = W.flatten(0, -3)
    if W.device.type == "cpu" and not tracked:
        upper, regular = torch.ops.pyfastcircuits.triangles(flat)
    else:
        wide = flat.double()
        upper, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        regular = failed == 0
    R: Tensor = upper.to(W.dtype)
    if not regular.all():
        R = R.clone()
        R[~regular] = torch.linalg.qr(flat[~regular], mode=mode).R
    return R.view(*W.shape[:-2], *R.shape[-2:])


class HeadFactors:
    """The factors of the heads on one side of all pairs, the heads sorted by layer.

    A source is triangle(W_V) @ W_O. A destination is transposed, so that its `inner` is the weight that reads the
    residual stream too; where that is W_K or W_V, all query heads of a key/value head share it.
    """

    def __init__(self, weights: CircuitWeights, outer: Weight, inner: Weight, heads: Sequence[Head] | None) -> None:
        self.weights, self.outer, self.inner = weights, outer, inner
        self.shape = (weights.n_layers, weights.n_heads) if heads is None else (len(heads),)
        if heads is None:
            heads = [Head(*pair) for pair in product(range(weights.n_layers), range(weights.n_heads))]
        order = torch.tensor(sorted(range(len(heads)), key=heads.__getitem__), dtype=torch.long)
        self.place = order.argsort().to(weights.device)  # of each head that was asked for, among the sorted ones
        self.heads = [heads[i] for i in order.tolist()]
        self.norms = torch.ones(len(self.heads), dtype=weights.compute_dtype, device=weights.device)
        self._triangles: dict[int, Tensor] = {}
        self._every_head = list(range(weights.n_heads))

    def parts(self, sides: int = 1) -> Iterator[slice]:
        """Slices of the heads, such that the factors of so many sides stay within a BLOCK."""
        weights = self.weights
        step = max(1, BLOCK // (weights.compute_dtype.itemsize * weights.d_model * weights.d_head * sides))
        return (slice(i, min(i + step, len(self.heads))) for i in range(0, len(self.heads), step))

    def factors(self, part: slice) -> Tensor:
        """outer @ inner of some of the heads, [N, r, d]."""
        outer, inner = self.pair(part)
        return multiplied(inner, outer)

    def pair(self, part: slice) -> tuple[Tensor, Tensor]:
        """`outer` [N, r, r] and `inner` [N, r, d] of some of the heads; `inner` of whole layers is [kv heads, r, d]."""
        layers = {layer: [head for _, head in own] for layer, own in groupby(self.heads[part], key=itemgetter(0))}
        self._make_triangles([layer for layer in layers if layer not in self._triangles])
        outer = [self._triangles[layer] for layer in layers]
        inner = self._tall(self.inner, list(layers))
        whole = all(heads == self._every_head for heads in layers.values())
        if not whole or outer[0].shape[0] < self.weights.n_heads:
            outer = [self._of_heads(x, heads) for x, heads in zip(outer, layers.values(), strict=True)]
        if whole and isinstance(inner, Tensor):
            return torch.cat(outer), inner.mT.flatten(0, 1)
        if not whole:
            inner = [self._of_heads(x.mT, heads).mT for x, heads in zip(inner, layers.values(), strict=True)]
        return torch.cat(outer), torch.cat([x.mT for x in inner])

    def _make_triangles(self, layers: Sequence[int]) -> None:
        """Keep the triangles of some layers' `outer`, [H or Hkv, r, r] each; one call makes those that lie together."""
        tall = self._tall(self.outer, layers)
        made = triangle(tall) if isinstance(tall, Tensor) else map(triangle, tall)
        self._triangles.update(zip(layers, made, strict=True))

    def _tall(self, name: Weight, layers: Sequence[int]) -> Tensor | list[Tensor]:
        """A weight of some layers as [H or Hkv, d, r] each: one view of them all where they lie together in memory."""
        stored = getattr(self.weights, name)
        in_a_row = layers and layers[-1] - layers[0] == len(layers) - 1
        if isinstance(stored, Tensor) and in_a_row and self.weights.gain(name, layers[0]) is None:
            together = stored[layers[0] : layers[-1] + 1].to(self.norms.dtype)
            return together.mT if name == "W_O" else together
        each = [self.weights.layer(name, layer) for layer in layers]
        return [x.mT for x in each] if name == "W_O" else each

    def _of_heads(self, matrices: Tensor, heads: Sequence[int]) -> Tensor:
        """The matrices of some heads, out of a layer's, of which there is one for each head or key/value head."""
        shared = self.weights.n_heads // len(matrices)
        return matrices[torch.tensor(heads, device=self.weights.device) // shared]


def both_sides(
    weights: CircuitWeights,
    kinds: Sequence[str],
    sources: Sequence[Sequence[int]] | None,
    destinations: Sequence[Sequence[int]] | None,
) -> tuple[HeadFactors, list[HeadFactors]]:
    """The sources, which are the same for all kinds, and the destinations of each kind.

    Raises:
        TypeError, ValueError, IndexError: as composition_scores.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    first, second = (
        None if heads is None else [parse_head(weights, head, f"{name}[{i}]") for i, head in enumerate(heads)]
        for name, heads in (("sources", sources), ("destinations", destinations))
    )
    return HeadFactors(weights, "W_V", "W_O", first), [
        HeadFactors(weights, *_DESTINATIONS[kind], second) for kind in kinds
    ]


def earlier_sources(source: HeadFactors, destination: HeadFactors) -> Tensor:
    """How many of the sorted sources lie in layers before each destination's, [D]."""
    layers = [torch.tensor([head.layer for head in side.heads], dtype=torch.long) for side in (source, destination)]
    return torch.searchsorted(*layers).to(source.place.device)


def in_asked_order(values: Tensor, source: HeadFactors, destination: HeadFactors) -> Tensor:
    """Values [S, D] of sorted heads in the order and the shape that the heads were asked for."""
    asked: Tensor = values[source.place][:, destination.place].unflatten(1, destination.shape)
    shaped: Tensor = asked.unflatten(0, source.shape)
    return shaped
