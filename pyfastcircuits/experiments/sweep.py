"""`fc.sweep`, the main job: term importance, and the ablation of everything of a kind, over many sequences."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation import head_ablation, layer_ablation, pair_ablation
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import metric_spec
from pyfastcircuits.experiments.options import Attention, MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.orders import LayerMarginals, layer_marginals, order_losses
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Result
from pyfastcircuits.run.trace import FrozenTrace

SweepScope = Literal["path", "direct", "edge", "joint", "head", "layer"]


@dataclass(frozen=True)
class Example:
    """The position where an ablation does most: the tokens up to it, the token asked about there, and the metric with
    and without the ablation.
    """

    context: list[int]
    target: int
    clean: float
    ablated: float


@dataclass(frozen=True)
class Sweep:
    """The findings of one sweep; see `sweep`.

    Attributes:
        trace: the clean run.
        orders: [L + 1], the loss with all paths of order at most k, in nats; see order_losses.
        marginals: see layer_marginals; these are of the loss too, whatever the metric.
        result: every ablation.
        seconds: the time that the ablations took, without the run, orders and marginals.
        scope, mode, attention, options: what was ablated, and how it was measured.
    """

    trace: FrozenTrace
    orders: Tensor
    marginals: LayerMarginals
    result: Result
    seconds: float
    scope: SweepScope
    mode: Mode
    attention: Attention
    options: MeasureOptions

    @public
    @torch.no_grad()
    def examples(self, n: int, *, context: int = 12, progress: Callable[[float], None] | None = None) -> list[Example]:
        """For each of the n ablations that matter most, the token asked about whose metric it harms most.

        Args:
            n: how many ablations, as `result.top`; they are run once more, position by position.
            context: the most tokens to show, the last at the position measured.
            progress: called with the number of ablations finished since the last call.
        """
        labels = [label for label, _ in self.result.top(n)]
        options: MeasureOptions = {**self.options, "per_token": True, "kl": False, "progress": progress}
        result = _ablate(self.trace, self.scope, self.mode, self.attention, options, labels)
        targets = measurement(self.trace, options, self.attention).asked.targets
        harm = -result.delta if result.harm == "fall" else result.delta
        out = []
        for i in range(len(labels)):
            sequence, position = divmod(int(harm[i].nan_to_num(-torch.inf).argmax()), harm.shape[-1])
            before = self.trace.tokens[sequence, max(0, position + 1 - context) : position + 1]
            values = float(result.baseline[sequence, position]), float(result.values[i, sequence, position])
            out.append(Example(before.tolist(), int(targets[sequence, position].flatten()[0]), *values))
        return out


@public
@measured
@torch.no_grad()
def sweep(
    model: Any,
    tokens: Tensor,
    scope: SweepScope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    **options: "Unpack[MeasureOptions]",
) -> Sweep:
    """Term importance order by order and layer by layer, and the ablation of all heads, layers or pairs of heads.

    This is the "Term importance analysis" of Elhage et al. 2021, and the job of the command `pyfastcircuits sweep`.

    Args:
        model: CircuitWeights or a model of another library, as for trace.
        tokens: [B, T] or [T].
        scope: "head", "layer", or a scope of pair_ablation: "path", "direct", "edge", "joint".
        mode, attention: as in head_ablation.

    Returns:
        A Sweep, without gradients; its result has KL(clean || ablated) beside the metric. Orders and marginals are
        losses of the same targets at the same positions, so that "kl" needs targets where the next token is none.
        `progress` hears of the clean run and of orders and marginals too: see count_steps.

    Raises:
        ValueError, IndexError, TypeError, RuntimeError: as trace, order_losses, pair_ablation and head_ablation.
    """
    run = trace(model, tokens)
    progress = options.get("progress")
    if progress is not None:
        progress(1)
    metric = metric_spec(options.get("metric", "nll"), options.get("targets"), options.get("against"))
    asked: dict[str, Any] = {name: options[name] for name in ("positions", "backend", "progress") if name in options}
    orders = order_losses(run, targets=metric.targets, **asked)
    marginals = layer_marginals(run, targets=metric.targets, **asked)
    start = time.perf_counter()
    result = _ablate(run, scope, mode, attention, {"kl": True, **options}, None)
    if run.tokens.device.type == "cuda":
        torch.cuda.synchronize(run.tokens.device)
    seconds = time.perf_counter() - start
    return Sweep(run, orders, marginals, result, seconds, scope, mode, attention, options)


def _ablate(
    run: FrozenTrace,
    scope: SweepScope,
    mode: Mode,
    attention: Attention,
    options: MeasureOptions,
    labels: Any,
) -> Result:
    """Ablate everything of a scope, or only what some labels of its result say."""
    if scope == "layer" and labels is None:
        return layer_ablation(run, mode, attention, **options)
    if scope == "layer":
        labels = [[(layer, head) for head in range(run.weights.n_heads)] for layer in labels]
    if scope == "head" or scope == "layer":
        return head_ablation(run, mode, attention, heads=labels, **options)
    return pair_ablation(run, scope, mode, attention, pairs=labels, **options)


def count_steps(weights: CircuitWeights, scope: SweepScope) -> dict[str, int]:
    """What the progress of a sweep adds up to, by phase: each loss over all sequences is a step, and so is the run.

    Ablations are of layers, of heads, of all pairs of heads or of those in two layers.
    """
    layers, heads = weights.n_layers, weights.n_heads
    across = comb(layers, 2) * heads**2
    count = {"layer": layers, "head": layers * heads, "joint": comb(layers * heads, 2)}.get(scope, across)
    return {"clean run": 1, "orders": 3 * layers + 3, "ablations": count}
