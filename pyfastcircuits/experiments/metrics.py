"""What an experiment is measured by, and at which positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pyfastcircuits.ops import check_range
from pyfastcircuits.run.trace import FrozenTrace

__all__ = ["METRICS", "WORSE", "Metric", "Positions", "Scoring", "next_tokens", "scoring"]

Metric = Literal["nll", "kl", "logit_difference", "probability", "rank", "top1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
WORSE: dict[str, Literal["rise", "fall"]] = {  # which way a metric goes when a model gets worse
    **dict.fromkeys(("nll", "kl", "rank"), "rise"),
    **dict.fromkeys(("logit_difference", "probability", "top1"), "fall"),
}
Positions = int | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Scoring:
    """A metric, the positions it is taken at, and the tokens it asks about.

    Attributes:
        metric: see METRICS.
        kl: whether KL(clean || changed) is measured besides.
        where: [B, T], the positions measured.
        targets: [B, T]; not read where nothing is measured.
        against: [B, T], the second token of a logit difference.
        width: T' of results by position: T, or T-1 where no last position is measured.
    """

    metric: Metric
    kl: bool
    where: Tensor
    targets: Tensor
    against: Tensor | None
    width: int

    @property
    def names(self) -> tuple[Metric, ...]:
        """All that is measured."""
        return (self.metric, "kl") if self.kl and self.metric != "kl" else (self.metric,)

    @property
    def count(self) -> int:
        """Positions measured."""
        return int(self.where.sum())

    def __getitem__(self, sequences: slice) -> "Scoring":
        """Of some of the sequences."""
        against = None if self.against is None else self.against[sequences]
        return replace(self, where=self.where[sequences], targets=self.targets[sequences], against=against)

    def rows(self, stream: Tensor) -> Tensor:
        """[..., B, T, x] -> [..., N, x] of the N positions measured."""
        return stream[..., self.where, :]

    def tokens(self) -> Tensor:
        """The tokens asked about, [N, 1 or 2]."""
        asked = [self.targets] if self.against is None else [self.targets, self.against]
        return torch.stack([tokens[self.where] for tokens in asked], -1)

    def placed(self, values: Tensor) -> Tensor:
        """[..., N] -> [..., B, T'], NaN where nothing is measured."""
        out = values.new_full((*values.shape[:-1], *self.where.shape), torch.nan)
        out[..., self.where] = values
        return out[..., : self.width]


def scoring(
    trace: FrozenTrace,
    metric: Metric = "nll",
    *,
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    kl: bool = False,
) -> Scoring:
    """Check what is to be measured.

    Args:
        trace: the run.
        metric: "nll" of the target, "kl" (clean || changed), both in nats; "logit_difference", logit(target) -
            logit(against); "probability" of the target; "rank", how many tokens have a larger logit than the target;
            "top1", the share of positions where none has.
        targets: the token asked about: an integer, [B], or [B, T]; None: the next token.
        against: likewise, of a logit difference.
        positions: an integer, several, or a mask [T] or [B, T]; negative ones count from the end. None: every real
            position whose next token is real. The last position has no next token: it takes targets, or "kl".
        kl: measure KL(clean || changed) too.

    Raises:
        ValueError: an unknown metric; against missing or too much; shapes that do not fit; positions that leave nothing
            or have no target.
        IndexError: positions or tokens that are out of range.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if (against is not None) != (metric == "logit_difference"):
        state = "missing" if against is None else "given"
        raise ValueError(
            f"against is {state}, but metric is {metric!r}: a logit difference needs it, nothing else does"
        )
    where = _where(trace, positions, targets is None and metric != "kl")
    if not where.any():
        raise ValueError(f"positions is {positions!r}: nothing is left to measure")
    return Scoring(
        metric,
        kl,
        where,
        _following(trace) if targets is None else _tokens("targets", targets, trace),
        None if against is None else _tokens("against", against, trace),
        trace.tokens.shape[1] - (not bool(where[:, -1].any())),
    )


def next_tokens(trace: FrozenTrace) -> Scoring:
    """NLL of the next token, wherever there is one."""
    return Scoring("nll", False, _where(trace, None, True), _following(trace), None, trace.tokens.shape[1] - 1)


def _following(trace: FrozenTrace) -> Tensor:
    """The next token of each position [B, T]; after the last comes any."""
    return torch.cat((trace.tokens[:, 1:], trace.tokens[:, :1]), 1)


def _tokens(name: str, tokens: Tensor | int, trace: FrozenTrace) -> Tensor:
    """[B, T]."""
    shape = trace.tokens.shape
    given = torch.as_tensor(tokens, device=trace.tokens.device)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {given.dtype}, expected integers")
    check_range(name, given, trace.weights.d_vocab)
    if given.dim() == 1 and len(given) == shape[0]:
        given = given[:, None]
    elif given.dim() and given.shape != shape:
        raise ValueError(f"{name} has shape {list(given.shape)}, expected [{shape[0]}] or {list(shape)}")
    return given.long().expand(shape)


def _where(trace: FrozenTrace, positions: Positions | None, own: bool) -> Tensor:
    shape = trace.tokens.shape
    real = torch.ones(shape, dtype=torch.bool, device=trace.tokens.device) if trace.mask is None else trace.mask
    asked = real.clone()
    if positions is not None:
        given = torch.as_tensor(positions, device=real.device)
        if given.dtype == torch.bool:
            if given.shape not in (shape, shape[1:]):
                raise ValueError(
                    f"positions has shape {list(given.shape)}, expected {list(shape[1:])} or {list(shape)}"
                )
            asked &= given
        elif given.is_floating_point() or given.dim() > 1:
            raise ValueError(f"positions is {positions!r}, expected integers or a mask")
        else:
            for position in given.flatten().tolist():
                if not -shape[1] <= position < shape[1]:
                    raise IndexError(f"positions holds {position}, but sequences have {shape[1]} tokens")
            chosen = torch.zeros(shape[1], dtype=torch.bool, device=real.device)
            chosen[given.flatten().long()] = True
            asked &= chosen
    if own or positions is None:
        if own and positions is not None and given.dtype != torch.bool and bool(asked[:, -1].any()):
            raise ValueError(f"positions holds the last one, {shape[1] - 1}, which has no next token: give targets")
        followed = torch.cat((real[:, 1:], torch.zeros_like(real[:, :1])), 1)
        asked = asked & followed
    return asked
