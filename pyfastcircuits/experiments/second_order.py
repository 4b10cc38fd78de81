"""What changes of the logits do to the loss, without the vocabulary for each of them: the first order exactly, bounds
for the rest.

A change delta of what a head has mixed moves the logit of token v by delta . m[v], m being the head's basis W_O @ W_U.
With p the clean probabilities of a position and c[v] = delta . (m[v] - E_p m), the loss of the target rises by

    delta . (E_p m - m[target])  +  log E_p exp(c)

The first term is linear. The second is KL(clean || changed), and E_p exp(c) - 1 = E_p[c^2 phi(c)] with the increasing
function phi(x) = (exp(x) - 1 - x) / x^2, so bounds on E_p c^2 and on the range of c enclose it. The range is bounded by
Cauchy-Schwarz in the metric of the columns' covariance over the vocabulary, and E_p c^2 = delta S delta' by the
covariance S of the columns under p, or, without S, by Cauchy-Schwarz again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.experiments.metrics import Asked
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import final_norm_gain
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import CleanLogits, LogitBasis, Unembedding, slices
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.trace import FrozenTrace

RIDGE = 1e-6  # of the mean variance, added to the metric: any positive definite one gives a true bound
SUMMED = 16  # units in the last place by which sums over the vocabulary are off, at most
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the changes: kernels', moments', and those of the deltas
LEAST_ROUNDING = 2e-10  # nats
FAR = 500.0  # nats: a change whose exponential is not taken
ROWS_AT_ONCE = 8  # of a basis, whose products with all later rows are made together
COLUMNS_AT_ONCE = 4096  # of these products


def check_uncapped(trace: FrozenTrace) -> None:
    """Raise ValueError where a cap makes logits no linear function of what paths write."""
    cap = trace.weights.logit_cap
    if cap is not None:
        raise ValueError(f"trace is of a model whose logits are capped at {cap}: their changes have no such bounds")


class Rows:
    """The positions measured of some sequences, and the clean predictions there; N of them."""

    def __init__(self, part: FrozenTrace, asked: Asked, unembedding: Unembedding, how: Measurement) -> None:
        self.part, self.asked, self.unembedding = part, asked, unembedding
        self.scale = asked.rows(part.scales[-1][..., None])  # [N, 1]
        self.targets = asked.tokens()[:, 0]
        clean = CleanLogits(asked.rows(part.read_by_unembedding(part.final)), unembedding, held=True)
        assert clean.held is not None
        self.logits = clean.held  # [N, V]
        self.lse, picked = clean.sums(self.targets[:, None], how.backend)  # [N], fp64
        self.nll = self.lse - picked[:, 0]
        kind = torch.finfo(self.logits.dtype)
        self.rounding = ROUNDING[self.logits.dtype] + 4 * kind.eps * self.logits.abs().amax(1).double()
        self.lost = kind.tiny * self.logits.shape[1]  # the most that all probabilities are which underflow

    @cached_property
    def probabilities(self) -> Tensor:
        """The clean probabilities p, [N, V]."""
        return (self.logits - self.lse[:, None].to(self.logits.dtype)).exp_()

    def deltas(self, z: Tensor) -> Tensor:
        """What taking z [P, B, T, r] away changes, [P, N, r]: it goes through the final norm's scale."""
        return self.asked.rows(z) * -self.scale

    @cached_property
    def uphill(self) -> Tensor:
        """The gradient of each position's loss by the final residual stream there, [N, d]."""
        uphill = -self.unembedding.centered(self.targets).mT
        for columns in self.unembedding.slices(0, multiplied=True):
            uphill = uphill + self.probabilities[:, columns] @ self.unembedding.centered(columns).mT
        return final_norm_gain(uphill, self.unembedding.weights) * self.scale


def parts(trace: FrozenTrace, how: Measurement, unembedding: Unembedding, *, more: int = 0) -> Iterator[Rows]:
    """The rows of a run, as many sequences at a time as keep logits and probabilities in their bounds of memory.

    `more`: numbers that are kept at each position beside them.
    """
    weights = trace.weights
    bytes_a_row = (2 * weights.d_vocab_out + more) * weights.compute_dtype.itemsize
    most = memory.clean_logits_bytes(weights.device) // bytes_a_row
    at_once = max(1, min(most, memory.ROWS) // max(trace.tokens.shape[1] - 1, 1))
    for sequences in slices(len(trace.tokens), at_once):
        asked = how.asked[sequences]
        if asked.count:
            yield Rows(trace[sequences], asked, unembedding, how)


class Basis:
    """A head's basis W_O @ W_U, less its mean column, and the metric in which its columns are measured.

    Attributes:
        columns: [r, V].
    """

    def __init__(self, unembedding: Unembedding, head: Head) -> None:
        W_O = unembedding.weights.head("W_O", *head)
        whole = LogitBasis(unembedding, W_O[None], len(W_O))(slice(None))[0]
        self.columns = whole - whole.mean(1, keepdim=True)

    @cached_property
    def root(self) -> Tensor:
        """[r, r], fp64: |delta @ root| is the length of a change, and the lengths of columns are in the dual metric."""
        wide = self.columns.double()
        covariance = wide @ wide.mT / wide.shape[1]
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-30)
        root: Tensor = torch.linalg.cholesky(covariance)
        return root

    @cached_property
    def lengths(self) -> Tensor:
        """The lengths of the columns, [V], fp64."""
        lengths: Tensor = torch.linalg.vector_norm(self.dual(self.columns.mT), dim=1)
        return lengths

    def dual(self, rows: Tensor) -> Tensor:
        """Vectors [..., r] among the columns in coordinates in which their length is the plain one; fp64."""
        solved: Tensor = torch.linalg.solve_triangular(self.root, rows.double().mT, upper=False)
        return solved.mT

    @property
    def longest(self) -> float:
        """The length of the longest column."""
        return float(self.lengths.max()) * (1 + 1e-9)


class Interval(NamedTuple):
    """Bounds of the rise of the loss, fp64."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """What the bounds of every change through one head share at N positions.

    Attributes:
        root, longest: see Basis.
        mean: [N, r], E_p of the columns.
        slope: [N, r], E_p of the columns less the target's column.
        spread: [N], fp64: E_p of the squared lengths of the columns about their mean, or more.
        blur: [N], fp64: the length by which sums over the vocabulary may put the mean off.
        rounding: [N], fp64: the most by which changes are off, as a share.
        lost: the most probability of tokens that count as 0.
        covariance: [N, r, r], S; None: E_p c^2 is bounded by length and spread.
    """

    root: Tensor
    longest: float
    mean: Tensor
    slope: Tensor
    spread: Tensor
    blur: Tensor
    rounding: Tensor
    lost: float
    covariance: Tensor | None = None

    @staticmethod
    def of(rows: Rows, basis: Basis, *, squares: bool) -> "Moments":
        """The moments of a basis; `squares`: with S, which costs as much as (r + 1) / 2 changes at every position."""
        p = rows.probabilities
        mean = p @ basis.columns.mT
        power = (p @ basis.lengths.square().to(p.dtype)).double()
        eps = SUMMED * torch.finfo(p.dtype).eps
        spread = (power - basis.dual(mean).square().sum(-1)).clamp_min(0) + eps * power
        covariance = _second_moments(p, basis.columns) - mean[:, :, None] * mean[:, None, :] if squares else None
        slope = mean - basis.columns[:, rows.targets].mT
        blur = eps * power.sqrt()
        return Moments(basis.root, basis.longest, mean, slope, spread, blur, rows.rounding, rows.lost, covariance)

    @staticmethod
    def joined(several: list["Moments"]) -> "Moments":
        """The same basis at the positions of several parts."""
        first, names = several[0], ("mean", "slope", "spread", "blur", "rounding")
        joined: dict[str, Any] = {name: torch.cat([getattr(x, name) for x in several]) for name in names}
        return replace(first, **joined)

    def interval(self, delta: Tensor) -> Interval:
        """Bounds of the rises that changes [P, N, r] make, [P, N]; rounding, the kernels' own included, is in them."""
        first = torch.einsum("pnr,nr->pn", delta.double(), self.slope.double())
        shift = torch.einsum("pnr,nr->pn", delta, self.mean).double()
        length = torch.linalg.vector_norm(delta @ self.root.to(delta.dtype), dim=-1).double()
        most, bound = length * self.longest, length.square() * self.spread
        square, least = bound, torch.zeros_like(bound)
        slack = self.rounding * (bound.sqrt() + first.abs()) + length * self.blur + LEAST_ROUNDING
        if self.covariance is not None:
            eps = SUMMED * torch.finfo(delta.dtype).eps  # of E_p of the columns' squared lengths, blur^2 / eps^2
            through = torch.bmm(delta.transpose(0, 1), self.covariance).transpose(0, 1)
            exact = (through * delta).sum(-1).double()
            error = self.rounding * bound + length.square() * self.blur.square() / eps
            square, least = torch.minimum(exact + error, bound).clamp_min(0), (exact - error).clamp_min(0)
        up, down = most - shift, most + shift
        low, high = second_order(least, square + self.lost * torch.maximum(up, down).square(), up, down)
        return Interval(first + low - slack, first + high + slack)


def second_order(least: Tensor, most: Tensor, up: Tensor, down: Tensor) -> Interval:
    """Bounds of log E exp(c), where E c = 0, E c^2 is from `least` to `most`, and -down <= c <= up; fp64."""
    up, down = up.clamp_min(0), down.clamp_min(0)
    far = up > FAR
    by_square = torch.where(far, torch.inf, (most * _phi(torch.where(far, 0.0, up))).log1p())
    high = torch.minimum(by_square, torch.minimum(up, (up + down).square() / 8))
    return Interval(torch.minimum((least * _phi(-down)).log1p(), high), high)


def _phi(x: Tensor) -> Tensor:
    """(exp(x) - 1 - x) / x^2, which increases."""
    small = x.abs() < 1e-2
    away = torch.where(small, 1.0, x)
    return torch.where(small, 0.5 + x / 6 + x.square() / 24 + x**3 / 120, (away.expm1() - away) / away.square())


def _second_moments(p: Tensor, columns: Tensor) -> Tensor:
    """E_p of the columns' products with themselves, [N, r, r]: p times the products of every two rows of the basis.

    These are made a few rows and a slice of the vocabulary at a time, and shared by all positions.
    """
    rank, vocabulary = columns.shape
    out = p.new_empty(len(p), rank, rank)
    for few in slices(rank, ROWS_AT_ONCE):
        sums = p.new_zeros(len(p), (few.stop - few.start) * (rank - few.start))
        for part in slices(vocabulary, COLUMNS_AT_ONCE):
            some = columns[:, part]
            products = (some[few, None] * some[None, few.start :]).flatten(0, 1)
            sums += p[:, part] @ products.mT
        block = sums.view(len(p), few.stop - few.start, rank - few.start)
        out[:, few, few.start :] = block
        out[:, few.start :, few] = block.mT
    return out
