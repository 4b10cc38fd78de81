"""The options of every measurement, declared once: `measured` puts them into each experiment's signature and help."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from pyfastcircuits.experiments.metrics import KL, NLL, Asked, Metric, MetricSpec, Positions, asked, metric_spec
from pyfastcircuits.ops import Backend, Precision
from pyfastcircuits.run.trace import FrozenTrace

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    Unpack = None  # annotations with it are strings, and the core needs torch alone

Attention = Literal["frozen", "recomputed"]
FinalNorm = Literal["frozen", "recomputed"]
Function = TypeVar("Function", bound=Callable[..., Any])


class MeasureOptions(TypedDict, total=False):
    """The options of a measurement, which `measured` shows in the help of each experiment.

    Attributes:
        metric: "nll" of the target, "kl" (clean || changed), both in nats; "logit_difference", logit(target) -
            logit(against); "probability" of the target; "rank", how many tokens have a larger logit than the target;
            "top1", the share of positions where none has. Or an object, such as `fc.LogitDifference(targets, against)`.
        targets: the token asked about: an integer, [B], or [B, T]; None: the next token, if the model predicts those it
            reads.
        against: likewise, the second token of a logit difference.
        positions: the positions measured: an integer, several, or a mask [T] or [B, T]; negative ones count from the
            end. None: every real position whose next token is real. The last has no next token: it takes targets, or
            "kl".
        kl: measure KL(clean || changed) too.
        per_token: each position's values instead of means over them.
        per_sequence: each sequence's means over its positions instead of means over all.
        final_norm: whether the final norm's scale is the clean run's ("frozen") or that of the changed stream
            ("recomputed"); None: as the attention patterns, frozen with frozen ones.
        low_memory: recompute the clean logits for each slice of the vocabulary, so that nothing of size [T, V] exists.
        precision, backend: of the kernels, see `pyfastcircuits.ops`.
        progress: called with the number of experiments finished since the last call, times the share of the positions
            they cover, so that a whole sweep adds up to the number of experiments.
    """

    metric: Metric
    targets: Tensor | int | None
    against: Tensor | int | None
    positions: Positions | None
    kl: bool
    per_token: bool
    per_sequence: bool
    final_norm: FinalNorm | None
    low_memory: bool
    precision: Precision
    backend: Backend
    progress: Callable[[float], None] | None


DEFAULTS = MeasureOptions(
    metric="nll", targets=None, against=None, positions=None, kl=False, per_token=False, per_sequence=False,
    final_norm=None, low_memory=False, precision="ieee", backend="auto", progress=None,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Measurement:
    """MeasureOptions that have been checked against a run."""

    metrics: tuple[MetricSpec, ...]  # the metric asked for, then KL if that is asked for beside it
    asked: Asked
    final_norm: FinalNorm
    per_token: bool
    per_sequence: bool
    low_memory: bool
    precision: Precision
    backend: Backend
    progress: Callable[[float], None] | None
    learns: bool  # whether the first metric's values are differentiable functions of the weights

    @property
    def from_sums(self) -> bool:
        """Whether sums over the vocabulary are all that the metrics need; see MetricSpec."""
        return all(metric.from_sums for metric in self.metrics)

    @property
    def apart(self) -> bool:
        """Whether sequences stay apart: values have a dimension of them."""
        return self.per_token or self.per_sequence

    def placed(self, asked: Asked, values: Tensor) -> Tensor:
        """Values [..., N] of a part's positions as [..., B, T'], or their means in each sequence [..., B]."""
        return asked.placed(values) if self.per_token else asked.sequence_means(values)


def measurement(trace: FrozenTrace, options: Mapping[str, Any], attention: Attention = "frozen") -> Measurement:
    """Check the options of an experiment on a run whose `attention` is frozen or recomputed.

    Raises:
        ValueError, IndexError, TypeError: as metrics.metric_spec and metrics.asked.
    """
    chosen: dict[str, Any] = {**DEFAULTS, **options}
    final_norm = chosen["final_norm"] or attention
    if chosen["per_token"] and chosen["per_sequence"]:
        raise ValueError("per_sequence is True, but per_token is too: values are of positions or of sequences")
    metric = metric_spec(chosen["metric"], chosen["targets"], chosen["against"])
    beside = (KL(),) if chosen["kl"] and not isinstance(metric, KL) else ()
    where = asked(
        trace,
        chosen["positions"],
        targets=metric.targets,
        against=metric.against,
        of_tokens=not isinstance(metric, KL),
    )
    how = {
        name: chosen[name] for name in ("per_token", "per_sequence", "low_memory", "precision", "backend", "progress")
    }
    exact = attention == "frozen" and isinstance(metric, NLL) and chosen["precision"] == "ieee"
    learns = exact and trace.learns and torch.is_grad_enabled()
    return Measurement((metric, *beside), where, final_norm, **how, learns=learns)


def measured(function: Function) -> Function:
    """Show MeasureOptions in an experiment's signature and help, and refuse other keywords in the experiment's name."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = MeasureOptions.__annotations__
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
    ]
    known = {p.name for p in own} | DEFAULTS.keys()

    @wraps(function)
    def experiment(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
        return function(*args, **keywords)

    experiment.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    own_help, shared = (inspect.cleandoc(documented.__doc__ or "") for documented in (function, MeasureOptions))
    _, _, listed = shared.partition("Attributes:\n")
    experiment.__doc__ = own_help.replace("\n\nReturns:", f"\n{listed}\n\nReturns:", 1)
    return cast("Function", experiment)
