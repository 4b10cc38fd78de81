"""The main job: term importance and the ablation of everything of a kind, of one model over many sequences."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation import Attention, head_ablation, layer_ablation, pair_ablation
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import Metric
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, Precision
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.paths import LayerMarginals, layer_marginals, order_losses
from pyfastcircuits.run.trace import FrozenTrace, trace

__all__ = ["Example", "Sweep", "SweepScope", "limit_seconds", "sweep"]

SweepScope = Literal["path", "direct", "edge", "joint", "head", "layer"]


@dataclass(frozen=True)
class Plan:
    """What a sweep ablates and what it measures: all heads, all layers, or all pairs of heads of a scope."""

    scope: SweepScope = "path"
    mode: Mode = "zero"
    attention: Attention = "frozen"
    metric: Metric = "nll"
    against: int | None = None
    low_memory: bool = False
    precision: Precision = "ieee"
    backend: Backend = "auto"

    def __call__(self, run: FrozenTrace, only: list[Label] | None = None, **more: Any) -> Result:
        """Ablate everything, or only what these labels of the whole sweep's result say.

        Raises:
            ValueError, RuntimeError: as pair_ablation and head_ablation.
        """
        how: dict[str, Any] = {
            "metric": self.metric, "against": self.against, "low_memory": self.low_memory,
            "precision": self.precision, "backend": self.backend, **more,
        }  # fmt: skip
        if self.scope == "layer" and only is None:
            return layer_ablation(run, self.mode, self.attention, **how)
        if self.scope in ("head", "layer"):
            heads: Any = only
            if self.scope == "layer":
                heads = [[(layer, head) for head in range(run.weights.n_heads)] for layer in heads]
            return head_ablation(run, self.mode, self.attention, heads=heads, **how)
        chosen: Any = only
        scope: Any = self.scope
        return pair_ablation(run, scope, self.mode, self.attention, pairs=chosen, **how)

    def count(self, weights: CircuitWeights) -> int:
        """How many ablations that is."""
        layers, heads = weights.n_layers, weights.n_heads
        pairs = layers * (layers - 1) // 2 * heads**2
        within = layers * heads * (heads - 1) // 2
        return {"layer": layers, "head": layers * heads, "joint": pairs + within}.get(self.scope, pairs)


@dataclass(frozen=True)
class Example:
    """The position where an ablation does most: tokens up to it, the token predicted there, the metric with and
    without the ablation.
    """

    context: list[int]
    target: int
    clean: float
    ablated: float


@dataclass(frozen=True)
class Sweep:
    """What one sweep found. Losses in nats."""

    trace: FrozenTrace
    orders: Tensor  # [L + 1]
    marginals: LayerMarginals
    result: Result
    seconds: float  # for the ablations alone
    plan: Plan

    def examples(self, n: int, context: int = 12) -> list[Example]:
        """For each of the n ablations that harm most, the predicted token that it harms most."""
        labels = [label for label, _ in self.result.top(n)]
        return _worst_tokens(self.trace, self.plan, labels, context)


def sweep(
    model: Any,
    tokens: Tensor,
    scope: SweepScope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Sweep:
    """Orders, layer marginals and every ablation of a scope; `model` is as for trace.

    Raises:
        ValueError, IndexError, TypeError, RuntimeError: as trace, order_losses and pair_ablation.
    """
    plan = Plan(scope, mode, attention, **options)
    run = trace(model, tokens)
    orders = order_losses(run, backend=plan.backend)
    marginals = layer_marginals(run, backend=plan.backend)
    start = time.perf_counter()
    result = plan(run, kl=True, progress=progress)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
    return Sweep(run, orders, marginals, result, time.perf_counter() - start, plan)


def limit_seconds(sweep: Sweep) -> float | None:
    """The least time this CPU could take, at rates measured now; None where none is measured.

    FLOPs: 2 * pairs * rows * V * r; exps: pairs * rows * V.
    """
    weights, plan, pairs = sweep.trace.weights, sweep.plan, len(sweep.result.labels)
    plain = Plan(low_memory=plan.low_memory, precision=plan.precision, backend=plan.backend)
    if not pairs or plan != plain or plan.precision == "tf32":
        return None
    if weights.device.type != "cpu" or weights.compute_dtype != torch.float32:
        return None
    kind = "fma" if plan.precision == "ieee" else "bf16"
    flops, exps = (float(torch.ops.pyfastcircuits.cpu_rate(k, 0.2)) for k in (kind, "exp"))
    tokens = sweep.trace.tokens
    logits = float(pairs * len(tokens) * (tokens.shape[1] - 1) * weights.d_vocab)
    return logits * 2 * weights.d_head / flops + logits / exps


def _worst_tokens(run: FrozenTrace, plan: Plan, what: list[Label], context: int) -> list[Example]:
    """For each of some ablations of a plan, the predicted token whose metric it moves most, the way that hurts."""
    result = plan(run, what, per_token=True)
    length = run.tokens.shape[1] - 1
    harm = -result.delta if result.harm == "fall" else result.delta
    out = []
    for i in range(len(what)):
        sequence, position = divmod(int(harm[i].nan_to_num(-torch.inf).argmax()), length)
        tokens = run.tokens[sequence].tolist()
        out.append(
            Example(
                tokens[max(0, position + 1 - context) : position + 1],
                tokens[position + 1],
                float(result.baseline[sequence, position]),
                float(result.values[i, sequence, position]),
            )
        )
    return out
