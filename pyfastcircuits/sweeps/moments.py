"""Running means and standard errors of a sweep's effects over sequences, in fp64 and in the sequences' order.

Sums are added up one sequence after the other, so that they are the same bits whatever the chunks were that brought
them, if each brought the same values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.sweeps.work import Findings, Work


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over sequences for every experiment, of which any others may be added: they merge by `+`.

    With n the positions measured in a sequence and s the sum of an effect over them, so that means are sum(s) / sum(n):

    Attributes:
        sums, squares, crosses: by metric, [P] each: of s, s^2 and s n.
        sequences, positions, squared_positions: [P] each: of 1, n and n^2.
        clean: of the clean run's metric times n, and of n.
        losses: [3 L + 2], of Findings.losses times n.
    """

    sums: dict[str, Tensor]
    squares: dict[str, Tensor]
    crosses: dict[str, Tensor]
    sequences: Tensor
    positions: Tensor
    squared_positions: Tensor
    clean: Tensor
    losses: Tensor

    @staticmethod
    def of(work: Work) -> "Moments":
        """Of no sequence yet."""

        def zeros(size: int = len(work.labels)) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        sums, squares, crosses = ({name: zeros() for name in work.metrics} for _ in range(3))
        losses = zeros(3 * work.weights.n_layers + 2)
        return Moments(sums, squares, crosses, zeros(), zeros(), zeros(), zeros(2), losses)

    def add(self, found: Findings) -> None:
        """Add the sequences of a chunk, which come after those that are there."""
        some, count = found.chunk.experiments, found.positions.double()
        measured = count > 0
        n = count[measured, None]
        for name, effects in found.effects.items():
            sums = effects[measured].double() * n
            _add(self.sums[name][some], sums)
            _add(self.squares[name][some], sums.square())
            _add(self.crosses[name][some], sums * n)
        many = n.expand(-1, found.chunk.shape[1])
        _add(self.sequences[some], torch.ones_like(many))
        _add(self.positions[some], many)
        _add(self.squared_positions[some], many.square())
        if some.start == 0:
            _add(self.clean, torch.cat((found.clean[measured, None] * n, n), 1))
            _add(self.losses, found.losses[measured] * n)

    def __add__(self, other: "Moments") -> "Moments":
        """Both together."""
        mine, theirs = vars(self).values(), vars(other).values()
        return Moments(*(_both(a, b) for a, b in zip(mine, theirs, strict=True)))

    def mean(self, metric: str) -> Tensor:
        """The mean effect over all positions, [P]; NaN where there are none."""
        return self.sums[metric] / self.positions

    def standard_error(self, metric: str) -> Tensor:
        """The standard error of the mean effect, [P], where sequences are drawn independently; NaN of less than two.

        It is that of a ratio of sums (Cochran, Sampling Techniques, 1977, 2.11): with as many positions in each
        sequence, the standard deviation of the sequences' means over the square root of their number.
        """
        mean, count = self.mean(metric), self.sequences
        left = self.squares[metric] - 2 * mean * self.crosses[metric] + mean.square() * self.squared_positions
        share = torch.where(count > 1, count / (count - 1).clamp_min(1), torch.nan)
        return (left.clamp_min(0) * share).sqrt() / self.positions

    @property
    def baseline(self) -> Tensor:
        """The clean run's metric, its mean over all positions."""
        return self.clean[0] / self.clean[1]

    @property
    def mean_losses(self) -> Tensor:
        """The means of Findings.losses over all positions."""
        return self.losses / self.clean[1]


def _add(total: Tensor, terms: Tensor) -> None:
    """Add the rows of `terms` [S, P] to `total` [P] in their order, one after the other."""
    if len(terms):
        total.copy_(torch.cat((total[None], terms)).cumsum(0)[-1])


def _both(one: Any, other: Any) -> Any:
    return {name: one[name] + other[name] for name in one} if isinstance(one, dict) else one + other
