"""Composition: how much of what one head writes another head reads ("Composition Scores", Elhage et al. 2021).

With OV = W_V @ W_O of the source and, of the destination, QK = W_Q @ W_K.T read by queries (Q), its transpose read by
keys (K), or OV read by values (V), the score of a pair is ||OV1 @ M2|| / (||OV1|| ||M2||), Frobenius norms. (The
article's first library reordered the factors by the cyclic identity of traces, which does not hold for norms.)

Nothing of size d x d or (H r)^2 is formed: a norm does not change when an outer factor W is replaced by the r x r
triangle R with R.T @ R = W.T @ W, so every pair is r x d times d x r, and `ops.pair_norms` does all pairs at once.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights, Weight
from pyfastcircuits.ops import Backend, Precision, factored_pair_norms
from pyfastcircuits.ops.pair_norms import multiplied

__all__ = [
    "ComponentScores",
    "CompositionBaseline",
    "Head",
    "Kind",
    "checked_head",
    "component_scores",
    "composition_baseline",
    "composition_scores",
    "composition_z_scores",
    "triangle",
]

Kind = Literal["Q", "K", "V"]
KINDS = ("Q", "K", "V")
Head = tuple[int, int]  # layer, head
BLOCK = 512 << 20  # bytes of one side's factors held at a time


def checked_head(weights: CircuitWeights, head: Sequence[int], name: str = "head") -> Head:
    """(layer, head) as ints.

    Raises:
        ValueError: not a pair of integers.
        IndexError: a head that the model does not have.
    """
    try:
        layer, index = (int(x) for x in head)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {head!r}, expected (layer, head)") from None
    if not (0 <= layer < weights.n_layers and 0 <= index < weights.n_heads):
        raise IndexError(
            f"{name} is {layer}.{index}; the model has layers 0 to {weights.n_layers - 1} "
            f"and heads 0 to {weights.n_heads - 1}"
        )
    return layer, index


class _Side:
    """One side of all pairs: its heads, sorted, and their matrices with the outer orthogonal part taken out.

    A source is triangle(W_V) @ W_O, [r, d]: `outer` and `inner`. A destination, transposed, likewise: `inner` is what
    it reads with (one for all query heads of a key/value head where that is W_K or W_V), `outer` what is left of it.
    """

    def __init__(self, weights: CircuitWeights, outer: Weight, inner: Weight, heads: Sequence[Head] | None) -> None:
        self.weights, self.outer, self.inner = weights, outer, inner
        self.shape = (weights.n_layers, weights.n_heads) if heads is None else (len(heads),)
        if heads is None:
            heads = [(layer, head) for layer in range(weights.n_layers) for head in range(weights.n_heads)]
        order = torch.tensor(sorted(range(len(heads)), key=heads.__getitem__), dtype=torch.long)
        self.place = order.argsort().to(weights.device)  # of the heads, in the order they were asked for
        self.heads = [heads[i] for i in order.tolist()]
        self.triangles: dict[int, Tensor] = {}
        self.norms = torch.ones(len(self.heads), dtype=weights.compute_dtype, device=weights.device)

    def _tall(self, name: Weight, layer: int) -> Tensor:
        """A layer's weight as [heads, d, r], in the computing dtype."""
        weight = self.weights.layer(name, layer)
        return weight.mT if name == "W_O" else weight

    def _of(self, heads: Sequence[int], matrices: Tensor) -> Tensor:
        """Those of a layer's matrices, one for each head or for each key/value head, that some heads have."""
        shared = self.weights.n_heads // len(matrices)
        return matrices[torch.tensor(heads, device=self.weights.device) // shared]

    def _view(self, name: Weight, layers: Sequence[int]) -> Tensor | None:
        """Layers of a weight as they lie in memory, [layers, heads, d, r], if they do so one after the other."""
        weight = getattr(self.weights, name)
        plain = isinstance(weight, Tensor) and self.weights.gain(name, layers[0]) is None
        if not plain or list(layers) != list(range(layers[0], layers[-1] + 1)):
            return None
        some: Tensor = weight[layers[0] : layers[-1] + 1].to(self.norms.dtype)
        return some.mT if name == "W_O" else some

    def _triangles(self, layers: Sequence[int]) -> Tensor:
        """Triangles of layers' `outer`, [layers, heads, r, r]."""
        missing = [layer for layer in layers if layer not in self.triangles]
        together = self._view(self.outer, missing) if missing else None
        made = [triangle(self._tall(self.outer, x)) for x in missing] if together is None else triangle(together)
        self.triangles.update(zip(missing, made, strict=True))
        if isinstance(made, Tensor) and len(missing) == len(layers):
            return made
        return torch.stack([self.triangles[layer] for layer in layers])

    def given(self, part: slice) -> tuple[Tensor, Tensor]:
        """`outer` [N, r, r] and `inner` [N, r, d] of some of the heads; of whole layers a view, [kv heads, r, d]."""
        heads = self.heads[part]
        layers = [(layer, [head for _, head in group]) for layer, group in groupby(heads, key=itemgetter(0))]
        numbers, everything = [layer for layer, _ in layers], list(range(self.weights.n_heads))
        triangles = self._triangles(numbers)
        whole = all(mine == everything for _, mine in layers)
        if whole and triangles.shape[1] == len(everything):
            outer = triangles.flatten(0, 1)
        else:
            outer = torch.cat([self._of(mine, x) for (_, mine), x in zip(layers, triangles, strict=True)])
        together = self._view(self.inner, numbers) if whole else None
        if together is not None:
            return outer, together.mT.flatten(0, 1)
        inner = [(mine, self._tall(self.inner, layer).mT) for layer, mine in layers]
        return outer, torch.cat([x if whole else self._of(mine, x) for mine, x in inner])

    def factors(self, part: slice) -> Tensor:
        """outer @ inner of some of the heads, [N, r, d]."""
        outer, inner = self.given(part)
        return multiplied(inner, outer)

    def parts(self, sides: int = 1) -> Iterator[slice]:
        """Slices of the heads whose factors, of so many sides, stay within a BLOCK."""
        weights = self.weights
        step = max(1, BLOCK // (weights.compute_dtype.itemsize * weights.d_model * weights.d_head * sides))
        return (slice(i, min(i + step, len(self.heads))) for i in range(0, len(self.heads), step))


def triangle(W: Tensor) -> Tensor:
    """R [..., r, r] with R.T @ R = W.T @ W for W [..., d, r]: stands for W where only norms matter.

    By Cholesky in fp64, which for fp32 weights is many times faster than QR and no less accurate; by QR for fp64
    weights and where a Gram matrix is singular.
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


def _sides(
    weights: CircuitWeights,
    kinds: Sequence[str],
    sources: Sequence[Sequence[int]] | None,
    destinations: Sequence[Sequence[int]] | None,
) -> tuple[_Side, list[_Side]]:
    """The sources, which are the same for all kinds, and the destinations of each."""
    if not isinstance(weights, CircuitWeights):
        raise TypeError(f"weights is a {type(weights).__name__}, expected CircuitWeights")
    ends: dict[str, tuple[Weight, Weight]] = {"Q": ("W_K", "W_Q"), "K": ("W_Q", "W_K"), "V": ("W_O", "W_V")}
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    first, second = (
        None if heads is None else [checked_head(weights, head, f"{name}[{i}]") for i, head in enumerate(heads)]
        for name, heads in (("sources", sources), ("destinations", destinations))
    )
    return _Side(weights, "W_V", "W_O", first), [_Side(weights, *ends[kind], second) for kind in kinds]


def _before(source: _Side, destination: _Side) -> Tensor:
    """How many of the sorted sources lie in layers before each destination's, [D]."""
    layers = [torch.tensor([layer for layer, _ in side.heads], dtype=torch.long) for side in (source, destination)]
    return torch.searchsorted(*layers).to(source.place.device)


def _product_norms(
    source: _Side,
    destinations: Sequence[_Side],
    precision: Precision,
    backend: Backend,
    progress: Callable[[float], None] | None,
) -> Tensor:
    """Norms of the products of all pairs with layer1 < layer2, 0 elsewhere: [K, S, D]; leaves the factors' norms."""
    kinds, heads = len(destinations), len(destinations[0].heads)
    out = torch.zeros(kinds, len(source.heads), heads, dtype=source.norms.dtype, device=source.norms.device)
    before = _before(source, destinations[0])
    for rows in source.parts():
        rows = slice(rows.start, min(rows.stop, int(before[-1:].sum())))  # sorted: the last bound is the largest
        if rows.start >= rows.stop:
            break
        outer, inner = source.given(rows)
        for columns in destinations[0].parts(kinds):
            columns = slice(columns.start + int((before[columns] <= rows.start).sum()), columns.stop)
            if columns.start >= columns.stop:
                continue
            bound = (before[columns] - rows.start).clamp(0, rows.stop - rows.start).repeat(kinds)
            given = [side.given(columns) for side in destinations]
            norms, left, right = factored_pair_norms(
                inner,
                [factors.mT for _, factors in given],
                left_outer=outer,
                right_outer=[outer.mT for outer, _ in given],
                before=bound,
                precision=precision,
                backend=backend,
            )
            out[:, rows, columns], source.norms[rows] = norms.unflatten(1, (kinds, -1)).transpose(0, 1), left
            for side, sizes in zip(destinations, right.chunk(kinds), strict=True):
                side.norms[columns] = sizes
            if progress is not None:
                progress(int(bound.sum()))
    return out


def composition_scores(
    weights: CircuitWeights,
    kind: Kind | Sequence[Kind],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    destinations: Sequence[Sequence[int]] | None = None,
    precision: Precision = "ieee",
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Composition scores of all pairs of heads: ||OV1 @ M2|| / (||OV1|| ||M2||), exact zeros where layer1 >= layer2.

    Args:
        weights: the model. Grouped key/value heads are not expanded, but where bfloat16 or Triton multiplies.
        kind: "Q" (M2 = QK, what queries read), "K" (QK transposed, what keys read) or "V" (OV); or several, which
            costs less than one by one: what is made of the sources serves all.
        sources, destinations: only these heads, (layer, head) each; None for all.
        precision, backend: of ops.pair_norms.
        progress: called with the number of pairs finished since the last call.

    Returns:
        [L, H, L, H], source first, in the computing dtype; [S] instead of the source's [L, H] if `sources` is given,
        and likewise [D]; of several kinds, stacked in front. A head whose matrix is zero scores 0, with a warning.
        Differentiable.

    Raises:
        TypeError: weights of another type.
        ValueError: an unknown kind or none; heads that are no pairs of integers.
        IndexError: heads that the model does not have.
        RuntimeError: a backend or precision that is not there.

    Source: "Composition Scores" in "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021), with its
    erratum.
    """
    kinds = [kind] if isinstance(kind, str) else list(kind)
    if not kinds:
        raise ValueError(f"kind is {kind!r}, expected at least one of {', '.join(KINDS)}")
    source, sides = _sides(weights, kinds, sources, destinations)
    norms = _product_norms(source, sides, precision, backend, progress)
    scores = []
    _warn_of_zeros(source, "OV")
    for name, side, products in zip(kinds, sides, norms, strict=True):
        _warn_of_zeros(side, "OV" if name == "V" else "QK")
        sizes = source.norms[:, None] * side.norms
        quotient = torch.where(sizes > 0, products / sizes.where(sizes > 0, 1), 0)
        scores.append(_as_asked(quotient, source, side))
    return scores[0] if isinstance(kind, str) else torch.stack(scores)


def _warn_of_zeros(side: _Side, name: str) -> None:
    zero = (side.norms == 0).nonzero()[:, 0].tolist()
    if zero:
        heads = ", ".join("{}.{}".format(*side.heads[i]) for i in zero[:8]) + (", ..." if len(zero) > 8 else "")
        warnings.warn(f"the {name} matrix of head {heads} is zero: its composition scores are set to 0", stacklevel=3)


def _as_asked(values: Tensor, source: _Side, destination: _Side) -> Tensor:
    """From sorted heads to the order and the shape they were asked for."""
    asked: Tensor = values[source.place][:, destination.place].unflatten(1, destination.shape)
    shaped: Tensor = asked.unflatten(0, source.shape)
    return shaped


class CompositionBaseline(NamedTuple):
    """Composition score of each pair if the source wrote in a uniformly random rotation of the residual stream.

    Zero where layer1 >= layer2 or a head is zero. mean**2 + std**2, the mean of score**2, is 1 / d exactly.
    """

    mean: Tensor  # of the score
    std: Tensor
    square_std: Tensor  # of score**2


@torch.no_grad()
def composition_baseline(
    weights: CircuitWeights,
    kind: Kind,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    destinations: Sequence[Sequence[int]] | None = None,
) -> CompositionBaseline:
    """Mean and standard deviation of every composition score under a random rotation between the two heads.

    Under the Haar measure the mean of score**2 is 1 / d whatever the matrices, and its variance is exactly
    2 (d tr P^2 - tr^2 P)(d tr N^2 - tr^2 N) / (d^2 (d-1)(d+2) tr^2 P tr^2 N) with the Gram matrices P = OV1.T @ OV1
    and N = M2 @ M2.T. The mean and the deviation of the score itself are those of the square root of the Beta
    distribution with these two moments: exact for pairs of rank-one matrices and, like the delta method, in the limit
    of flat spectra; for steep ones within 3% and 10% of sampling.

    Args, shapes, errors: as composition_scores.
    """
    source, (destination,) = _sides(weights, [kind], sources, destinations)
    d = weights.d_model
    left, right = (_spread(side, d) for side in (source, destination))
    variance = 2 * left[:, None] * right / (d**2 * max(d - 1, 1) * (d + 2))
    a = torch.where(variance > 0, ((1 - 1 / d) / d / variance - 1) / d, torch.inf)
    log_ratio = _log_half_step(a) - _log_half_step(a * d)
    std = (-torch.expm1(2 * log_ratio) / d).sqrt()
    earlier = torch.arange(len(left), device=left.device)[:, None] < _before(source, destination)
    moments = (
        torch.where(earlier & variance.isfinite(), x, 0) for x in (log_ratio.exp() / d**0.5, std, variance.sqrt())
    )
    return CompositionBaseline(*(_as_asked(x.to(weights.compute_dtype), source, destination) for x in moments))


def _spread(side: _Side, d: int) -> Tensor:
    """d tr P^2 / tr^2 P - 1 of each head's Gram matrix, in fp64: 0 for a rotation, d - 1 for rank one, NaN for zero."""
    out = []
    for part in side.parts():
        factors = side.factors(part)
        gram = (factors @ factors.mT).double()
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        out.append((d * gram.square().sum((-2, -1)) / trace.square() - 1).clamp_min(0))
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64, device=side.place.device)


def _log_half_step(x: Tensor) -> Tensor:
    """log(Gamma(x + 1/2) / (Gamma(x) sqrt(x))), by its series where the difference of the two would cancel."""
    series = -1 / (8 * x) + 1 / (192 * x**3) - 1 / (640 * x**5)
    return torch.where(x > 20, series, torch.lgamma(x + 0.5) - torch.lgamma(x) - x.log() / 2)


def composition_z_scores(
    weights: CircuitWeights,
    kind: Kind,
    scores: Tensor | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    destinations: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """(score**2 - 1 / d) in standard deviations under a random rotation, both exact; 0 where there is no baseline.

    Args:
        weights, kind, sources, destinations: as composition_scores.
        scores: what composition_scores returned for the same arguments, to save computing it again.

    Raises:
        ValueError: scores of another shape; else as composition_scores.
    """
    if scores is None:
        scores = composition_scores(weights, kind, sources=sources, destinations=destinations)
    std = composition_baseline(weights, kind, sources=sources, destinations=destinations).square_std
    if scores.shape != std.shape:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected {list(std.shape)}")
    return torch.where(std > 0, (scores.square() - 1 / weights.d_model) / std, 0)


class ComponentScores(NamedTuple):
    """Composition of two heads, singular component by singular component (Merullo et al. 2024, "Talking Heads").

    A component of a head is s_k u_k v_k.T of its singular value decomposition. With weights p = s^2 / sum(s^2) of
    the source's components and q of the destination's, score^2 = sum p * source^2 = sum q * destination^2
    = sum p q pairs^2.
    """

    source: Tensor  # [r]: scores of the source's components with the whole destination
    destination: Tensor  # [r]: of the whole source with the destination's components
    pairs: Tensor  # [r, r]: of component with component, the cosines of their directions
    source_singular_values: Tensor  # [r]
    destination_singular_values: Tensor  # [r]


@torch.no_grad()
def component_scores(
    weights: CircuitWeights, kind: Kind, source: Sequence[int], destination: Sequence[int]
) -> ComponentScores:
    """The composition score of a pair of heads taken apart by singular components, largest first.

    Args:
        weights, kind: as composition_scores.
        source, destination: (layer, head); the source's layer must come first.

    Raises:
        ValueError: a source that is not in an earlier layer; else as composition_scores.
    """
    left, (right,) = _sides(weights, [kind], [source], [destination])
    if left.heads[0][0] >= right.heads[0][0]:
        raise ValueError(f"source {left.heads[0]} is not in a layer before destination {right.heads[0]}")
    (_, s, written), (_, t, read) = (
        torch.linalg.svd(x.factors(slice(0, 1))[0], full_matrices=False) for x in (left, right)
    )
    cosines = (written @ read.mT).abs()
    p, q = (x.square() / x.square().sum() for x in (s, t))
    return ComponentScores((cosines.square() @ q).sqrt(), (p @ cosines.square()).sqrt(), cosines, s, t)
