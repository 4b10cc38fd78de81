"""Metrics: the numbers that experiments measure, as objects, and the positions and tokens they are asked about."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pyfastcircuits.arguments import as_integers
from pyfastcircuits.ops import check_range
from pyfastcircuits.result import Harm
from pyfastcircuits.run.trace import FrozenTrace

Positions = int | Sequence[int] | Tensor
At = Positions | Literal["each"]  # where something is taken out or put in
Tokens = Tensor | int | None  # an integer, [B], [B, T], or of sets [B, T, K]; None: the next token
MetricName = Literal["nll", "kl", "logit_difference", "probability", "rank", "top1"]


class CleanRows(Protocol):
    """What a metric may ask about the clean logits at N positions; each is made when it is asked.

    Attributes:
        nll: the loss of the targets, fp64 [N], in nats.
        token_logits: the logits of the targets, and of the tokens they are compared with, fp64 [N] each.
        rank: the number of tokens that have a larger logit than the target, fp64 [N].
        token_shares: what each of those tokens counts in a difference of logits, fp64 [N] each.
    """

    @property
    def nll(self) -> Tensor: ...  # noqa: D102
    @property
    def token_logits(self) -> tuple[Tensor, ...]: ...  # noqa: D102
    @property
    def rank(self) -> Tensor: ...  # noqa: D102
    @property
    def token_shares(self) -> tuple[Tensor, ...]: ...  # noqa: D102


class ChangedRows(Protocol):
    """What a metric may ask about the changed logits of P experiments at N positions.

    Attributes:
        clean: the same rows of the clean run.
        nll_rise: by how much the loss of the targets rises, fp64 [P, N], in nats: measured, not subtracted.
        divergence: KL(clean || changed), fp64 [P, N], in nats.
        token_changes: what is added to the logits of the targets, and of the tokens they are compared with, fp64
            [P, N] each, but for a number that both share.
        rank: the number of tokens that have a larger logit than the target, fp64 [P, N].
    """

    @property
    def clean(self) -> CleanRows: ...  # noqa: D102
    @property
    def nll_rise(self) -> Tensor: ...  # noqa: D102
    @property
    def divergence(self) -> Tensor: ...  # noqa: D102
    @property
    def token_changes(self) -> tuple[Tensor, ...]: ...  # noqa: D102
    @property
    def rank(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class MetricSpec(ABC):
    """A metric of the logits at each position. Users pass one of these, or its name.

    Attributes:
        targets: the token asked about: an integer, [B], or [B, T]; None: the next token.
        name: the metric's name in results.
        harm: the way the metric moves when a model gets worse.
        from_sums: whether sums over the vocabulary, of exponentials and of the clean run's expectation, are all that
            it needs: then products of a pair's two heads can be shared among pairs.
        has_gradient: whether it is differentiable, and not constant to first order, at the clean run.
    """

    targets: Tokens = None
    name: ClassVar[str]
    harm: ClassVar[Harm] = "rise"
    from_sums: ClassVar[bool] = True
    has_gradient: ClassVar[bool] = True

    @property
    def against(self) -> Tokens:
        """The second token asked about, if the metric compares two."""
        return None

    @abstractmethod
    def of_clean(self, rows: CleanRows) -> Tensor:
        """The metric of the clean run, fp64 [N]."""

    @abstractmethod
    def rise(self, rows: ChangedRows) -> Tensor:
        """What experiments add to it, fp64 [P, N]."""


@dataclass(frozen=True, eq=False)
class NLL(MetricSpec):
    """The loss: the negative log-likelihood of the target, in nats."""

    name = "nll"

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return rows.nll

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return rows.nll_rise


@dataclass(frozen=True, eq=False)
class Probability(MetricSpec):
    """The probability of the target."""

    name = "probability"
    harm = "fall"

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return (-rows.nll).exp()

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return self.of_clean(rows.clean) * (-rows.nll_rise).expm1()


@dataclass(frozen=True, eq=False)
class KL(MetricSpec):
    """The divergence KL(clean || changed) of the predictions, in nats; it asks about no token."""

    name = "kl"
    has_gradient = False  # 0 at the clean run, where it is least

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return torch.zeros_like(rows.nll)

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return rows.divergence


@dataclass(frozen=True, eq=False)
class LogitDifference(MetricSpec):
    """logit(targets) - logit(against), of tokens, or of the mean logits of sets of tokens.

    Sets are [B, T, K], with -1 where a set has fewer than K tokens.
    """

    against: Tokens = None  # a field where the others have none
    name = "logit_difference"
    harm = "fall"
    from_sums = False

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return weighed(rows.token_shares, rows.token_logits)

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return weighed(rows.clean.token_shares, rows.token_changes)


def weighed(shares: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The sum of values [..., N], each times its share [N]."""
    terms = [share * value for share, value in zip(shares, values, strict=True)]
    return sum(terms[1:], terms[0])


@dataclass(frozen=True, eq=False)
class Rank(MetricSpec):
    """The number of tokens whose logit is larger than the target's: 0 for the model's first choice."""

    name = "rank"
    from_sums = False
    has_gradient = False

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return rows.rank

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return rows.rank - rows.clean.rank


@dataclass(frozen=True, eq=False)
class Top1(MetricSpec):
    """The share of positions where no token has a larger logit than the target."""

    name = "top1"
    harm = "fall"
    from_sums = False
    has_gradient = False

    def of_clean(self, rows: CleanRows) -> Tensor:
        """See MetricSpec."""
        return (rows.rank == 0).double()

    def rise(self, rows: ChangedRows) -> Tensor:
        """See MetricSpec."""
        return (rows.rank == 0).double() - self.of_clean(rows.clean)


METRICS: dict[str, type[MetricSpec]] = {m.name: m for m in (NLL, KL, LogitDifference, Probability, Rank, Top1)}
Metric = MetricName | MetricSpec


def metric_spec(metric: Metric, targets: Tokens = None, against: Tokens = None) -> MetricSpec:
    """The metric as an object, with the tokens it asks about.

    Raises:
        ValueError: an unknown metric; `against` missing or too much; tokens given twice.
        TypeError: something else than a name or a metric.
    """
    if isinstance(metric, MetricSpec):
        if targets is not None or against is not None:
            raise ValueError(f"metric is {type(metric).__name__}(...), which holds its tokens: give them there alone")
        if isinstance(metric, LogitDifference) and metric.against is None:
            raise ValueError("against is missing, but metric is LogitDifference(...): it compares two tokens")
        return metric
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}, or a metric object")
    if (against is not None) != (metric == LogitDifference.name):
        state = "missing" if against is None else "given"
        raise ValueError(
            f"against is {state}, but metric is {metric!r}: a logit difference needs it, nothing else does"
        )
    return LogitDifference(targets, against) if against is not None else METRICS[metric](targets)


@dataclass(frozen=True, eq=False)
class Asked:
    """The positions that are measured, and the tokens that are asked about there.

    Attributes:
        where: [B, T], the positions measured.
        targets: [B, T], or sets [B, T, K]; not read where nothing is measured.
        against: likewise, the second token of a logit difference.
        width: T' of results by position: T, or T-1 where no last position is measured.
    """

    where: Tensor
    targets: Tensor
    against: Tensor | None
    width: int

    @property
    def count(self) -> int:
        """The number of positions measured."""
        return int(self.where.sum())

    def __getitem__(self, sequences: slice) -> "Asked":
        """The same for some of the sequences."""
        against = None if self.against is None else self.against[sequences]
        return replace(self, where=self.where[sequences], targets=self.targets[sequences], against=against)

    def rows(self, stream: Tensor) -> Tensor:
        """[..., B, T, x] -> [..., N, x]: the N positions measured."""
        return stream[..., self.where, :]

    def tokens(self) -> Tensor:
        """The tokens asked about, [N, 1 or 2]; of sets [N, K + K'], 0 where a set has fewer."""
        return torch.cat(self._sets(), -1).clamp_min(0)

    def shares(self) -> Tensor:
        """What each of the tokens counts in a difference of logits, fp64: a set's share 1, or -1 for `against`."""
        there = [(tokens >= 0).double() for tokens in self._sets()]
        return torch.cat([sign * x / x.sum(-1, keepdim=True) for sign, x in zip((1, -1), there, strict=False)], -1)

    def _sets(self) -> list[Tensor]:
        asked = [self.targets] if self.against is None else [self.targets, self.against]
        return [(tokens if tokens.dim() > 2 else tokens[..., None])[self.where] for tokens in asked]

    def placed(self, values: Tensor) -> Tensor:
        """[..., N] -> [..., B, T'], NaN where nothing is measured."""
        out = values.new_full((*values.shape[:-1], *self.where.shape), torch.nan)
        out[..., self.where] = values
        return out[..., : self.width]

    def sequence_means(self, values: Tensor) -> Tensor:
        """[..., N] -> [..., B], the mean over each sequence's positions; NaN where none is measured."""
        out = values.new_zeros((*values.shape[:-1], *self.where.shape))
        out[..., self.where] = values
        return out.sum(-1) / self.where.sum(-1)


def asked(
    trace: FrozenTrace,
    positions: Positions | None = None,
    *,
    targets: Tokens = None,
    against: Tokens = None,
    of_tokens: bool = True,
) -> Asked:
    """Check the positions and tokens that an experiment asks about.

    Args:
        trace: the run.
        positions: an integer, several, or a mask [T] or [B, T]; negative ones count from the end. None: every real
            position whose next token is real. The last position has no next token: it needs targets.
        targets, against: an integer, [B], or [B, T]; targets None: the next token. They are tokens of the vocabulary
            that is predicted; where the model reads another, no next token is one. Of a logit difference also sets
            [B, T, K].
        of_tokens: False where nothing is asked about a token (KL, say).

    Raises:
        ValueError: shapes that do not fit; positions that leave nothing or have no target; no targets, where the model
            predicts other tokens than it reads.
        IndexError: positions or tokens that are out of range.
        TypeError: tokens that are no integers.
    """
    trace.guard.check_values()
    needs_next = targets is None and of_tokens
    if needs_next:
        trace.weights.check_one_vocabulary("targets must be given, and positions, because no next token is predicted")
    where = _where(trace, positions, needs_next)
    if not where.any():
        raise ValueError(f"positions is {positions!r}: nothing is left to measure")
    following = torch.cat((trace.tokens[:, 1:], trace.tokens[:, :1]), 1)  # after the last comes any,
    following = following.clamp_max(trace.weights.d_vocab_out - 1)  # as where the next token is not predicted: not read
    return Asked(
        where,
        following if targets is None else _tokens("targets", targets, trace, where, sets=against is not None),
        None if against is None else _tokens("against", against, trace, where, sets=True),
        trace.tokens.shape[1] - (not bool(where[:, -1].any())),
    )


def _tokens(name: str, tokens: Tensor | int, trace: FrozenTrace, where: Tensor, *, sets: bool) -> Tensor:
    """[B, T], or with `sets` perhaps [B, T, K]."""
    shape = trace.tokens.shape
    given = as_integers(name, tokens, trace.tokens.device)
    if sets and given.dim() == 3:
        if given.shape[:2] != shape:
            raise ValueError(f"{name} has shape {list(given.shape)}, expected [{shape[0]}, {shape[1]}, K]")
        if not (given >= 0).any(-1)[where].all():
            raise ValueError(f"{name} holds an empty set, where something is measured")
        check_range(name, given.clamp_min(0), trace.weights.d_vocab_out)
        return given.long()
    check_range(name, given, trace.weights.d_vocab_out)
    if given.dim() == 1 and len(given) == shape[0]:
        given = given[:, None]
    elif given.dim() and given.shape != shape:
        raise ValueError(f"{name} has shape {list(given.shape)}, expected [{shape[0]}] or {list(shape)}")
    return given.long().expand(shape)


def _where(trace: FrozenTrace, positions: Positions | None, needs_next: bool) -> Tensor:
    shape = trace.tokens.shape
    real = torch.ones(shape, dtype=torch.bool, device=trace.tokens.device) if trace.mask is None else trace.mask
    chosen = real
    if positions is not None:
        mask, listed = position_mask("positions", positions, trace)
        if needs_next and listed and mask[0, -1]:
            last = shape[1] - 1
            raise ValueError(f"positions holds the last one, {last}, which has no next token: give targets")
        chosen = real & mask
    if needs_next or positions is None:
        followed = torch.cat((real[:, 1:], torch.zeros_like(real[:, :1])), 1)
        chosen = chosen & followed
    return chosen


def position_mask(name: str, positions: Positions, trace: FrozenTrace) -> tuple[Tensor, bool]:
    """Positions as a mask [B, T], and whether they were listed by number; errors as `asked`."""
    shape, device = trace.tokens.shape, trace.tokens.device
    given = as_integers(name, positions, device, masks=True)
    if given.dtype == torch.bool:
        if given.shape not in (shape, shape[1:]):
            raise ValueError(f"{name} has shape {list(given.shape)}, expected {list(shape[1:])} or {list(shape)}")
        return given.expand(shape), False
    if given.dim() > 1:
        raise ValueError(f"{name} has shape {list(given.shape)}, expected integers or a mask")
    for position in given.flatten().tolist():
        if not -shape[1] <= position < shape[1]:
            raise IndexError(f"{name} holds {position}, but sequences have {shape[1]} tokens")
    chosen = torch.zeros(shape[1], dtype=torch.bool, device=device)
    chosen[given.flatten().long()] = True
    return chosen.expand(shape), True


def at_mask(trace: FrozenTrace, at: At | None) -> Tensor | None:
    """The positions [B, T] where outputs are changed together; None: all, or each on its own; errors as `asked`."""
    return None if at is None or isinstance(at, str) else position_mask("at", at, trace)[0]
