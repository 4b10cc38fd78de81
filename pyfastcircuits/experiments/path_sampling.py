"""Sums over the paths of an order from a few of them: drawn by importance, unbiased, with an interval of confidence."""

from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation import path_ablation
from pyfastcircuits.experiments.attribution import direct_logit_attribution
from pyfastcircuits.experiments.metrics import Positions
from pyfastcircuits.model.norms import centered, final_norm_gain
from pyfastcircuits.ops import Backend, pair_norms
from pyfastcircuits.run.nodes import Head, Path, grouped
from pyfastcircuits.run.paths import count_paths, path_z
from pyfastcircuits.run.trace import FrozenTrace

Quantity = Literal["rise", "size", "logit"]
COLUMNS = 4096  # of W_U that the norms to the logits are taken over, at most
LEAST = 1e-6  # of the largest norm: no path has the probability 0
UNIFORM = 0.1  # the share of draws that know of no norm: no path is so unlikely that its value weighs without bound


@dataclass(frozen=True, eq=False, repr=False)
class PathSample:
    """Paths that were drawn, and the sum over all paths that they estimate; see `sample_paths`.

    Attributes:
        paths: the n paths, as drawn; some may come more than once.
        values: [n], what was measured of each, fp64: nats, or logits.
        probabilities: [n], the probability of each in one draw, fp64. The mean of f(path) / probability is an unbiased
            estimate of the sum of f over all paths, whatever f is.
        total: how many paths there are.
        of: the quantity that is summed.
    """

    paths: list[Path]
    values: Tensor
    probabilities: Tensor
    total: int
    of: Quantity

    @property
    def estimate(self) -> float:
        """The estimate of the sum over all paths; unbiased."""
        return float(self._weighed.mean())

    @property
    def variance(self) -> float:
        """The variance of the estimate, itself estimated without bias from the draws; NaN for a single one."""
        return float(self._weighed.var() / len(self._weighed)) if len(self._weighed) > 1 else float("nan")

    @public
    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """An interval around the estimate that covers the sum with this probability, by the normal approximation.

        It holds for large n. It is too short where a few rare paths carry the sum and none of them was drawn.

        Raises:
            ValueError: a confidence that is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}, expected more than 0 and less than 1")
        half = NormalDist().inv_cdf((1 + confidence) / 2) * self.variance**0.5
        return self.estimate - half, self.estimate + half

    @property
    def _weighed(self) -> Tensor:
        return self.values / self.probabilities

    def __repr__(self) -> str:
        """The estimate and its standard error."""
        error = f"{self.variance**0.5:.2g}"
        return f"PathSample({self.of} of {self.total} paths: {self.estimate:.4g} +- {error}, {len(self.paths)} drawn)"


@public
@torch.no_grad()
def sample_paths(
    trace: FrozenTrace,
    n: int,
    *,
    order: int,
    of: Quantity = "rise",
    seed: int = 0,
    targets: Tensor | int | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
) -> PathSample:
    """Draw n paths of an order by importance, measure them, and estimate the sum over all of the order's paths.

    A path is drawn in proportion to a product of norms: of what its first head carries on its path of order 1, of what
    each next head would read of the head before it on its path of order 1, and of what the logits would read of the
    last. One draw in ten is uniform instead. The probability of every path is known exactly, so that the estimate is
    unbiased whatever these norms miss (how one pattern follows another, above all); what they hit makes its variance
    small. The budget is n.

    Args:
        trace: a frozen run.
        n: how many draws, with replacement; a path that comes again is not measured again.
        order: of the paths, at least 1.
        of: what is summed: "rise" of the loss when a path is taken out, as path_ablation; "size", that without its
            sign; "logit", what the path adds to the target's logit, as direct_logit_attribution, which sums to what all
            paths of the order add.
        seed: of the draws.
        targets, positions, backend: as in head_ablation.

    Returns:
        The draws, and `estimate`, `variance`, `interval()`. All are means over the positions measured.

    Raises:
        ValueError: n below 1; an order that the model does not have; targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend that is not there.

    Source: importance sampling with a defensive mixture, Hesterberg 1995.
    """
    weights = trace.weights
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    if not 1 <= order <= weights.n_layers:
        raise ValueError(f"order is {order}, expected 1 to {weights.n_layers} (the number of layers)")
    total = count_paths(weights.n_layers, weights.n_heads)[order]
    generator = torch.Generator().manual_seed(seed)
    heads, first, between, last = _norms(trace)
    by_norms = _Chain(heads, first, between, last, order)
    uniform = _Chain(heads, torch.ones_like(first), torch.ones_like(between), torch.ones_like(last), order)
    paths = [
        (uniform if float(torch.rand((), generator=generator)) < UNIFORM else by_norms).draw(generator)
        for _ in range(n)
    ]
    chances = [UNIFORM * uniform.probability(path) + (1 - UNIFORM) * by_norms.probability(path) for path in paths]
    places = grouped(paths)
    if of == "logit":
        measured = direct_logit_attribution(
            trace, "path", paths=list(places), targets=targets, positions=positions
        ).means()
    else:
        measured = path_ablation(trace, list(places), targets=targets, positions=positions, backend=backend).means()
    values = torch.zeros(n, dtype=torch.float64)
    for value, mine in zip(measured.tolist(), places.values(), strict=True):
        values[mine] = abs(value) if of == "size" else value
    return PathSample(paths, values, torch.tensor(chances, dtype=torch.float64), total, of)


class _Chain:
    """Paths of an order, with probabilities in proportion to a product of weights: of heads, and of every two in a row.

    Args:
        first, last: [L H], of the first and the last head.
        between: [L H, L H], from row to column; only those to a later layer count.
        order: the number of heads.
    """

    def __init__(self, heads: list[Head], first: Tensor, between: Tensor, last: Tensor, order: int) -> None:
        layers = torch.tensor([head.layer for head in heads])
        between = torch.where(layers[:, None] < layers, between, 0.0)
        self.heads, self.place = heads, {head: i for i, head in enumerate(heads)}
        ahead = last  # the sum over all that can follow each head, up to a factor
        steps: list[Tensor] = []  # from the last step to the first: the chances of each next head, by the one before
        for _ in range(order - 1):
            steps.append(_shares(between * ahead))
            ahead = (between * ahead).sum(1)
            ahead = ahead / ahead.max()
        self.first, self.steps = _shares(first * ahead), steps[::-1]

    def draw(self, generator: torch.Generator) -> Path:
        """One path."""
        at = int(torch.multinomial(self.first, 1, generator=generator))
        path = [self.heads[at]]
        for step in self.steps:
            at = int(torch.multinomial(step[at], 1, generator=generator))
            path.append(self.heads[at])
        return tuple(path)

    def probability(self, path: Path) -> float:
        """The probability that a path is drawn."""
        places = [self.place[head] for head in path]
        chance = float(self.first[places[0]])
        for step, at in zip(self.steps, pairwise(places), strict=True):
            chance *= float(step[at])
        return chance


def _shares(weights: Tensor) -> Tensor:
    """The weights over their sum along the last dimension; zeros stay zeros."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)


def _norms(trace: FrozenTrace) -> tuple[list[Head], Tensor, Tensor, Tensor]:
    """All heads, and what paths are weighed by: how much each head carries, is read of by each, and adds to the logits.

    A head is represented by its path of order 1: `carried` is a root of the second moment of that path's z, and what
    later heads and the logits read of it is in proportion. fp64, on the CPU.
    """
    weights, layers = trace.weights, range(trace.weights.n_layers)
    heads = [Head(layer, head) for layer in layers for head in range(weights.n_heads)]
    some = weights.W_U[:, :: max(1, weights.d_vocab_out // COLUMNS)].to(weights.compute_dtype)
    read_by_logits = some - some.mean(1, keepdim=True)
    read_by_heads = [weights.heads("W_V", layer) * trace.value_scale(layer).square().mean().sqrt() for layer in layers]
    first, between, last = [], [], []
    for layer in layers:
        z = path_z(trace, [(head,) for head in heads if head.layer == layer]).flatten(1, 2)
        moments = z.mT @ z / z.shape[1]
        values, vectors = torch.linalg.eigh(moments.double())
        size = values.clamp_min(0).sum(-1).clamp_min(1e-30).sqrt()
        carried = (vectors * (values.clamp_min(0).sqrt() / size[:, None])[:, None]).mT.to(z.dtype)
        written = centered(carried @ weights.heads("W_O", layer), weights)
        first.append(size)
        between.append(torch.cat([pair_norms(written, read) for read in read_by_heads], 1))
        last.append(torch.linalg.matrix_norm(final_norm_gain(written, weights) @ read_by_logits))
    return heads, _above_zero(first), _above_zero(between), _above_zero(last)


def _above_zero(norms: list[Tensor]) -> Tensor:
    """The norms one after another, each a little larger; fp64, on the CPU."""
    whole = torch.cat(norms).double().cpu()
    return whole + LEAST * whole.max() + 1e-30
