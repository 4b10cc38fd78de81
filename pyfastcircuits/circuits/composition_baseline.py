"""Composition scores by chance: their distribution under a random rotation of the residual stream, without sampling."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.composition import composition_scores
from pyfastcircuits.circuits.head_factors import HeadFactors, both_sides, earlier_sources, in_asked_order
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.nodes import Kind


class CompositionBaseline(NamedTuple):
    """Composition score of each pair if the source wrote in a uniformly random rotation of the residual stream.

    Zero where layer1 >= layer2 or a head is zero. mean**2 + std**2, the mean of score**2, is 1 / d exactly.
    """

    mean: Tensor  # of the score
    std: Tensor
    square_std: Tensor  # of score**2


@public
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
    distribution with these two moments. They are exact for pairs of rank-one matrices and, like the delta method, in
    the limit of flat spectra; for steep spectra they lie within 3% and 10% of sampling.

    Args, shapes, errors: as composition_scores.
    """
    source, (destination,) = both_sides(weights, [kind], sources, destinations)
    d = weights.d_model
    left, right = _spread(source, d), _spread(destination, d)
    variance = 2 * left[:, None] * right / (d**2 * max(d - 1, 1) * (d + 2))
    a = torch.where(variance > 0, ((1 - 1 / d) / d / variance - 1) / d, torch.inf)
    log_ratio = _log_half_step(a) - _log_half_step(a * d)
    std = (-torch.expm1(2 * log_ratio) / d).sqrt()
    earlier = torch.arange(len(left), device=left.device)[:, None] < earlier_sources(source, destination)
    moments = (
        torch.where(earlier & variance.isfinite(), x, 0) for x in (log_ratio.exp() / d**0.5, std, variance.sqrt())
    )
    return CompositionBaseline(*(in_asked_order(x.to(weights.compute_dtype), source, destination) for x in moments))


@public
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
        scores: the result of composition_scores for the same arguments, to save computing it again.

    Raises:
        ValueError: the scores have another shape; else as composition_scores.
    """
    if scores is None:
        scores = composition_scores(weights, kind, sources=sources, destinations=destinations)
    std = composition_baseline(weights, kind, sources=sources, destinations=destinations).square_std
    if scores.shape != std.shape:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected {list(std.shape)}")
    if scores.device != std.device:
        raise ValueError(f"scores is on {scores.device}, but the weights are on {std.device}")
    return torch.where(std > 0, (scores.square() - 1 / weights.d_model) / std, 0)


def _spread(side: HeadFactors, d: int) -> Tensor:
    """d tr P^2 / tr^2 P - 1 of each head's Gram matrix, in fp64: 0 for a rotation, d - 1 for rank one, NaN for zero."""
    out = [torch.zeros(0, dtype=torch.float64, device=side.place.device)]
    for part in side.parts():
        factors = side.factors(part)
        gram = (factors @ factors.mT).double()
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        out.append((d * gram.square().sum((-2, -1)) / trace.square() - 1).clamp_min(0))
    return torch.cat(out)


def _log_half_step(x: Tensor) -> Tensor:
    """log(Gamma(x + 1/2) / (Gamma(x) sqrt(x))), by its series where the difference of the two would cancel."""
    series = -1 / (8 * x) + 1 / (192 * x**3) - 1 / (640 * x**5)
    return torch.where(x > 20, series, torch.lgamma(x + 0.5) - torch.lgamma(x) - x.log() / 2)
