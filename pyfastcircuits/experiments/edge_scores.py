"""First-order scores of all edges of a model: edge attribution patching, with and without integrated gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation_value import AverageOver, Mode
from pyfastcircuits.experiments.edge_gradients import receiver_gradients, streams_from
from pyfastcircuits.experiments.edges import Effect
from pyfastcircuits.experiments.edited import edited
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import KL
from pyfastcircuits.experiments.options import Measurement, MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.outside import Changes, Outside
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.graph import EMBED, MLP, Graph, NodeLabel
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import MLP as MLPNode
from pyfastcircuits.run.nodes import Bias, heads_written, written
from pyfastcircuits.run.trace import FrozenTrace

Method = Literal["eap", "eap-ig", "eap-ig-activations"]
ROWS = 256  # positions worked on at a time, at least one sequence's: what a layer makes of them is held for every head


class WrongScore(NamedTuple):
    """An edge whose score was checked: its score, what patching it exactly does, and the difference."""

    edge: Label
    score: float
    exact: float
    error: float


@dataclass(frozen=True, eq=False)
class EdgeScores(Result):
    """Scores of all edges, see `edge_scores`. `setup` says of which metric they are the first-order change."""

    def wrong(self) -> list[WrongScore]:
        """The edges that were patched exactly, by the size of their score's error: what it costs to trust the score.

        Raises:
            ValueError: none was; see `exact` of edge_scores.
        """
        if "exact" not in self.extra:
            raise ValueError("exact: no edge was patched exactly, see edge_scores(..., exact=N)")
        known = self.extra["exact"].isfinite().nonzero().flatten()
        by_error = self.extra["error"][known].abs().argsort(descending=True, stable=True)
        columns = (self.values, self.extra["exact"], self.extra["error"])
        return [WrongScore(self.labels[i], *(float(x[i]) for x in columns)) for i in known[by_error].tolist()]


@public
@measured
@torch.no_grad()
def edge_scores(
    clean: FrozenTrace,
    corrupted: FrozenTrace | None = None,
    method: Method = "eap",
    *,
    steps: int = 5,
    mode: Mode = "resample",
    over: AverageOver = "all",
    exact: int = 0,
    **options: "Unpack[MeasureOptions]",
) -> EdgeScores:
    """Score every edge: the first-order change of the metric when that edge alone carries the corrupted run.

    An edge leads from a node ("embed", (layer, head), ("mlp", layer)) to a receiver ((layer, head), "Q" | "K" | "V";
    ("mlp", layer); "logits"). Its score is what the node writes in the corrupted run, less what it writes in the clean
    one, times the gradient of the metric by what the receiver reads. The receiver's norm, and all that follows, is
    computed anew. Memory holds the residual stream in front of each layer and what one layer makes of a few sequences.

    Args:
        clean, corrupted: runs of one model over tokens of one shape.
        method: "eap", edge attribution patching (Syed et al. 2023; Nanda 2023): the gradient at the clean run.
            "eap-ig" (Hanna et al. 2024, "Have Faith in Faithfulness"): the mean of the gradients of `steps` runs, whose
            embeddings lead from the corrupted ones towards the clean ones, corrupted + k / steps (clean - corrupted)
            with k = 0 to steps - 1, as the authors' package has it; its time is that of `steps` passes.
            "eap-ig-activations" (Marks et al. 2024): the mean over the embedding, all heads of each layer and each MLP
            in turn: its output goes from near the corrupted one to the clean one in `steps` steps; (2 L + 1) steps
            passes.
        steps: see method.
        mode: what an edge carries instead: "resample", the write of the corrupted run; "zero"; "mean", the node's mean
            output in `corrupted`, or else in `clean`.
        over: of means, see head_ablation.
        exact: the number of edges with the largest scores that are patched exactly too, by running the model again.

    Returns:
        values [E] are the scores, by the edges in `labels`; the baseline is 0. setup["metric"] names the metric, and
        setup["clean"] and setup["corrupted"] are its values in the runs. With `exact`, extra["exact"] is the change of
        the metric when the edge is patched, and extra["error"] score less exact, NaN for the others; `wrong()` lists
        them by error.

    Raises:
        TypeError: something else than runs.
        ValueError: runs of different models or shapes; steps below 1; exact below 0; a metric without a gradient ("kl"
            has none at the clean run, so "eap" cannot take it); per_token or kl=True.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if exact < 0:
        raise ValueError(f"exact is {exact}, expected a number of edges")
    outside = Outside(clean, corrupted, mode, over)
    how = measurement(clean, options, "recomputed")
    _check_metric(how, method)
    graph, total = outside.graph, first_order(clean, outside, how, method, steps)
    values = torch.cat([total[:count, i] for i, count in enumerate(graph.before)])
    plain = replace(how, progress=None, learns=False)
    ends = measure(clean, edited(clean, outside, [[]]), plain, ["empty"])
    setup: dict[str, str | int | float] = {"metric": how.metrics[0].name, "method": method, "mode": mode}
    setup |= {} if method == "eap" else {"steps": steps}
    setup |= {"clean": float(ends.baseline), "empty": float(ends.values[0])}
    found = EdgeScores(graph.edges, values, values.new_zeros(()), "score", {}, setup, "size")
    return _checked(found, clean, outside, plain, exact) if exact else found


def first_order(
    clean: FrozenTrace,
    outside: Outside,
    how: Measurement,
    method: Method = "eap",
    steps: int = 1,
    effect: Effect = "total",
) -> Tensor:
    """The scores of all edges, [nodes, receivers], see edge_scores; 0 where there is no edge."""
    graph = outside.graph
    total = torch.zeros(len(graph.nodes), len(graph.receivers), dtype=torch.float64, device=clean.tokens.device)
    for sequences in slices(len(clean.tokens), max(1, ROWS // clean.tokens.shape[1])):
        asked = how.asked[sequences]
        if asked.count:
            of_part = replace(how, asked=asked)
            _add_scores(total, clean[sequences], outside, of_part, method, steps, effect, how.asked.count)
    return total.to(clean.weights.compute_dtype)


def _check_metric(how: Measurement, method: Method) -> None:
    """Raise ValueError unless the metric has a gradient where the method takes it."""
    metric = how.metrics[0]
    has_gradient = metric.has_gradient or (isinstance(metric, KL) and method != "eap")
    if not has_gradient or len(how.metrics) > 1 or how.per_token or how.per_sequence:
        raise ValueError(
            f"metric is {metric.name!r}, kl {len(how.metrics) > 1}, per_token {how.per_token}, "
            f"per_sequence {how.per_sequence}, method {method!r}: "
            "expected the mean of a metric with a gradient there: nll, logit_difference or probability; kl, which has "
            "none at the clean run, by 'eap-ig' or 'eap-ig-activations'"
        )


def _add_scores(
    total: Tensor,
    part: FrozenTrace,
    outside: Outside,
    how: Measurement,
    method: Method,
    steps: int,
    effect: Effect,
    count: int,
) -> None:
    """Add the share of some sequences, of `count` positions in all, to the scores [nodes, receivers]."""
    graph, changes = outside.graph, Changes(part, outside)
    runs = list(_runs(graph, method, steps))
    share = how.asked.count / (count * len(runs))
    for run in runs:
        streams, held = run.streams(part, graph, changes)

        def add(receivers: slice, reads: int, places: slice, gradients: Tensor) -> None:
            by_receiver = gradients.flatten(1).mT
            for nodes, change in changes.blocks(reads, places):
                total[nodes, receivers] += share * (change.flatten(1) @ by_receiver).double()

        receiver_gradients(part, graph, streams, how.asked, how, add, held, effect)
        if how.progress is not None:
            how.progress(len(graph.edges) * share)


class _Run(NamedTuple):
    """A run that gradients are taken of: a node's output lies between those of the clean and of the corrupted run.

    Attributes:
        node: "embed", ("mlp", layer), or a layer, for all of its heads; None: the clean run.
        corrupted: the share of the corrupted output.
    """

    node: NodeLabel | int | None
    corrupted: float

    def streams(
        self, part: FrozenTrace, graph: Graph, changes: Changes
    ) -> tuple[list[Tensor], tuple[NodeLabel | int, Tensor] | None]:
        """Its residual streams, and what is a constant in it; see receiver_gradients."""
        if self.node is None:
            return list(part.streams), None
        if self.node == EMBED:
            embedded = part.embedded + self.corrupted * changes.of(slice(0, 1))[0]
            return streams_from(part, graph, 0, embedded), None
        if isinstance(self.node, int):
            layer = self.node
            clean, first = heads_written(part, layer) + written(part, Bias(layer)), graph.heads_at[layer]
        else:
            layer = self.node[1]
            clean, first = written(part, MLPNode(layer)), graph.heads_at[layer + 1] - 1
        held = (self.node, clean + self.corrupted * changes.summed(changes.number(first)))
        return [*part.streams[:layer], *streams_from(part, graph, layer, part.streams[layer], held)], held


def _runs(graph: Graph, method: Method, steps: int) -> Iterator[_Run]:
    """The runs whose gradients a method averages."""
    if method == "eap":
        yield _Run(None, 0.0)
    elif method == "eap-ig":
        yield from (_Run(EMBED, 1 - k / steps) for k in range(steps))
    else:
        groups: list[NodeLabel | int] = [EMBED]
        for layer, mlp in enumerate(graph.mlps):
            groups += [layer] if mlp is None else [layer, (MLP, layer)]
        yield from (_Run(group, 1 - k / steps) for group in groups for k in range(1, steps + 1))


def _checked(found: EdgeScores, clean: FrozenTrace, outside: Outside, how: Measurement, count: int) -> EdgeScores:
    """With the edges of the largest scores patched exactly."""
    best = found.values.abs().sort(descending=True, stable=True).indices[:count]
    edges = [outside.graph.place(found.labels[i]) for i in best.tolist()]
    patched = measure(clean, edited(clean, outside, [[edge] for edge in edges], without=True), how, edges)
    exact = torch.full_like(found.values, torch.nan)
    exact[best] = patched.delta
    return replace(found, extra={"exact": exact, "error": found.values - exact})
