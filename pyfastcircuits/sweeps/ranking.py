"""Whether the experiments that matter most are known, and their order: a test that stays valid however often one looks.

It holds asymptotic confidence sequences of differences between experiments: Waudby-Smith, Arbour, Sinha, Kennedy and
Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (Annals of Statistics, 2024; 2021 on
arXiv), Theorem 2.2. After t sequences an interval is the mean plus or minus

    sigma * sqrt(2 (t rho^2 + 1) / (t rho)^2 * log(sqrt(t rho^2 + 1) / alpha)).

They need no bound on the effects, but a variance, and sequences that are drawn independently from one population. They
are asymptotic: their confidence is approached as sequences come, and so there is a least number of them.
"""

from math import log, sqrt

import torch
from torch import Tensor

FIRST = 32  # sequences from which the candidates are chosen, and which the test then leaves alone
LEAST = 32  # sequences after them before anything is decided
_TUNED = 128  # the number of sequences at which intervals are tightest, by the choice of rho


class Ranking:
    """The order of the n experiments that matter most, as far as it is known.

    The first sequences choose candidates, twice n of them at least. The later ones compare each candidate with every
    experiment by their differences in each sequence, so that what moves both does not count. All comparisons hold
    together with the confidence asked for (Bonferroni).

    Args:
        n: how many.
        confidence: of the whole ranking, in (0, 1).
        experiments: P, how many there are.
        sign: 1 if larger effects matter more, -1 if smaller ones do.
    """

    def __init__(self, n: int, confidence: float, experiments: int, sign: int = 1) -> None:
        self.n, self.sign = min(n, experiments), sign
        self.candidates = min(experiments, max(2 * n, n + 16))
        self.alpha = (1 - confidence) / max(1, self.candidates * (experiments - 1))
        self.first: list[Tensor] = []
        self.chosen: Tensor | None = None
        self.count = 0

    def add(self, effects: Tensor) -> None:
        """Take the mean effects of some more sequences, [S, P]; those without a position measured do not count."""
        effects = self.sign * effects.double()
        effects = effects[effects.isfinite().all(1)]
        if self.chosen is None:
            taken = effects[: FIRST - len(self.first)]
            self.first += taken
            effects = effects[len(taken) :]
            if len(self.first) == FIRST:
                self.center = torch.stack(self.first).mean(0)
                self.chosen = self.center.sort(descending=True, stable=True).indices[: self.candidates]
                self.sums = torch.zeros_like(self.center)
                self.squares = torch.zeros_like(self.center)
                self.products = self.center.new_zeros(self.candidates, len(self.center))
        if self.chosen is not None and len(effects):
            left = effects - self.center
            self.count += len(left)
            self.sums += left.sum(0)
            self.squares += left.square().sum(0)
            self.products += left[:, self.chosen].mT @ left

    @property
    def settled(self) -> bool:
        """Whether the n that matter most, and their order, are known with the confidence asked for."""
        if self.chosen is None or self.count < LEAST:
            return False
        t, mean = self.count, self.sums / self.count
        ahead = (self.center + mean)[self.chosen, None] - (self.center + mean)
        square = self.squares[self.chosen, None] + self.squares - 2 * self.products
        variance = (square / t - (mean[self.chosen, None] - mean).square()).clamp_min(0) * t / (t - 1)
        known = ahead > variance.sqrt() * half_width(t, self.alpha)  # [candidates, P]: surely before
        order = (self.center + mean)[self.chosen].sort(descending=True, stable=True).indices[: self.n]
        before = torch.zeros_like(known[0])
        for place in order.tolist():  # each is surely before all that do not come before it
            before[self.chosen[place]] = True
            if not bool((known[place] | before).all()):
                return False
        return True


def half_width(t: int, alpha: float) -> float:
    """Half the width of the interval after t sequences of variance 1, if alpha is the error at all t together."""
    rho = sqrt((-2 * log(alpha) + log(1 - 2 * log(alpha))) / _TUNED)
    spread = t * rho**2 + 1
    return sqrt(2 * spread / (t * rho) ** 2 * log(sqrt(spread) / alpha))
