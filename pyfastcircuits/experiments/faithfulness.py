"""How much of a model a circuit explains: everything outside of it is patched or ablated, and the metric measured."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation_value import AverageOver, Mode
from pyfastcircuits.experiments.circuit import Circuit
from pyfastcircuits.experiments.edited import Place, edited
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import LogitDifference
from pyfastcircuits.experiments.options import MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.outside import Outside
from pyfastcircuits.run.graph import EdgeLabel, Graph
from pyfastcircuits.run.trace import FrozenTrace


class Curve(NamedTuple):
    """Faithfulness by the size of the circuit.

    Attributes:
        sizes: [K], numbers of edges.
        proportions: [K], their shares of the model's edges.
        faithfulness: [K].
    """

    sizes: Tensor
    proportions: Tensor
    faithfulness: Tensor

    @property
    def cpr(self) -> float:
        """The integrated circuit performance ratio of the MIB benchmark (Mueller et al. 2025): the curve's area.

        By the trapezoid rule, over the proportions from the smallest to the largest one measured, as its authors have
        it.
        """
        return float(torch.trapezoid(self.faithfulness, self.proportions))

    @property
    def cmd(self) -> float:
        """The integrated circuit-model distance of the MIB benchmark: the area between the curve and 1; 0 is best."""
        return float(torch.trapezoid((1 - self.faithfulness).abs(), self.proportions))

    @public
    def table(self) -> Any:
        """A pyarrow.Table with a row for each size: edges, proportion, faithfulness.

        Raises:
            ImportError: pyarrow is missing.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError("tables need pyarrow: pip install 'pyfastcircuits[cli]'") from error
        return pa.table(
            {name: x.tolist() for name, x in zip(("edges", "proportion", "faithfulness"), self, strict=True)}
        )

    @public
    def plot(self) -> Any:
        """Faithfulness over the number of edges: a matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from pyfastcircuits.drawing.marks import curve
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'pyfastcircuits[plot]'") from error
        title, y = "Faithfulness of the best edges", "faithfulness"
        levels = {"the whole model": 1.0}
        return curve(self.sizes.tolist(), {y: self.faithfulness}, title=title, x="edges", y=y, levels=levels, zero=True)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the model's performance a circuit keeps.

    Attributes:
        circuit: the circuit.
        metric: the name of the metric.
        full, empty: the metric of the whole model, and of the model with every edge outside.
        right: of a logit difference, the share of positions where it is above 0, so that the right token is chosen of
            the two: in the whole model, the empty one, and the circuit. None for other metrics.
        value: the metric of the circuit.
        without: the metric of all edges but the circuit's.
        curve: of the circuit's best edges; None: no sizes were asked for.
        random: [R], the faithfulness of random circuits of the same size.
        falls: by how much faithfulness falls without each edge, in the order of the circuit's edges, [E]; None: not
            asked for.
    """

    circuit: Circuit
    metric: str
    full: float
    empty: float
    right: tuple[float, float, float] | None
    value: float
    without: float
    curve: Curve | None
    random: Tensor
    falls: Tensor | None

    def share(self, value: float) -> float:
        """The share of the model's performance, over the empty circuit's, that a value of the metric is."""
        return (value - self.empty) / (self.full - self.empty) if self.full != self.empty else float("nan")

    @property
    def faithfulness(self) -> float:
        """1: the circuit does what the model does; 0: it does what the empty circuit does; NaN if they do the same."""
        return self.share(self.value)

    @property
    def completeness(self) -> float:
        """The share of the performance that is lost without the circuit's edges: 1 if all is (Marks et al. 2024)."""
        return 1 - self.share(self.without)

    @property
    def minimality(self) -> float:
        """The least by which faithfulness falls without one of the edges: 0 or less if one is not needed.

        Raises:
            ValueError: `minimality` was not asked for.
        """
        if self.falls is None:
            raise ValueError("minimality: not measured, see faithfulness(..., minimality=True)")
        return float(self.falls.min()) if len(self.falls) else float("nan")

    def __repr__(self) -> str:
        """What was found."""
        shown = f"{self.faithfulness:.4g} of {self.metric} by {len(self.circuit)} edges"
        area = "" if self.curve is None else f"; CPR {self.curve.cpr:.4g}, CMD {self.curve.cmd:.4g}"
        beside = "" if not len(self.random) else f"; random circuits {float(self.random.mean()):.4g}"
        return f"Faithfulness({shown}; completeness {self.completeness:.4g}{area}{beside})"


@public
@measured
@torch.no_grad()
def faithfulness(
    circuit: Circuit,
    clean: FrozenTrace,
    corrupted: FrozenTrace | None = None,
    *,
    sizes: int | Sequence[int] | None = None,
    random: int = 0,
    seed: int = 0,
    minimality: bool = False,
    mode: Mode = "resample",
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Faithfulness:
    """Measure the model with every edge outside of the circuit patched or ablated: one edited forward pass.

    It is exact: each receiver reads what nodes now write by the edges inside, and what they write outside by all
    others; norms, patterns and MLPs are computed anew. Faithfulness is (m(circuit) - m(empty)) / (m(model) - m(empty)),
    for the metric m (Hanna et al. 2024; Mueller et al. 2025).

    Args:
        circuit: a Circuit; see `fc.circuit`.
        clean, corrupted: runs of one model over tokens of one shape.
        sizes: numbers of edges, of which a curve is measured with the circuit's best edges; an integer K: that many
            sizes, from 1 to all, evenly spaced in their logarithm.
        random: the number of random circuits of the same size that are measured beside it, of all edges of the model.
        seed: of the random circuits.
        minimality: measure the circuit without each of its edges too, one pass each.
        mode, over: what edges outside carry, see edge_scores.

    Returns:
        A Faithfulness.

    Raises:
        TypeError: something else than a Circuit and runs.
        ValueError: an edge that the model does not have; sizes below 0 or beyond the circuit's; random below 0;
            per_token; else as edge_scores.
    """
    outside = Outside(clean, corrupted, mode, over)
    graph, how = outside.graph, measurement(clean, options, "recomputed")
    if how.per_token or how.per_sequence:
        raise ValueError(
            f"per_token is {how.per_token} and per_sequence {how.per_sequence}, expected means: faithfulness is a ratio"
        )
    if random < 0:
        raise ValueError(f"random is {random}, expected at least 0")
    inside = [graph.place(edge) for edge in circuit.edges]
    steps = _sizes(sizes, len(inside))
    wanted: list[list[Place]] = [
        [],
        inside,
        *(inside[:size] for size in steps),
        *_random(graph, len(inside), random, seed),
    ]
    if minimality:
        wanted += [inside[:i] + inside[i + 1 :] for i in range(len(inside))]
    experiments = edited(clean, outside, wanted)
    (rest,) = edited(clean, outside, [inside], without=True)
    experiments.append(replace(rest, places=[len(wanted)]))
    chooses = isinstance(how.metrics[0], LogitDifference)
    found = measure(clean, experiments, replace(how, per_token=chooses), range(len(wanted) + 1), mode=mode)
    clean_values, values, right = found.baseline.double(), found.values.double(), None
    if chooses:  # by position; NaN where nothing is measured
        where = clean_values.isfinite()
        clean_values, values = clean_values[where], values[:, where]
        shares_right = [float((x > 0).double().mean()) for x in (clean_values, values[0], values[1])]
        right = (shares_right[0], shares_right[1], shares_right[2])
        clean_values, values = clean_values.mean(), values.mean(-1)
    full = float(clean_values)
    empty, value = values[:2].tolist()
    shares = (values - empty) / (full - empty) if full != empty else torch.full_like(values, torch.nan)
    ends = [2, 2 + len(steps), 2 + len(steps) + random, len(wanted)]
    by_size, by_chance, by_edge = (shares[a:b] for a, b in pairwise(ends))
    curve = None
    if sizes is not None:
        curve = Curve(torch.tensor(steps), torch.tensor(steps).double() / len(graph.edges), by_size)
    falls = shares[1] - by_edge if minimality else None
    return Faithfulness(circuit, found.metric, full, empty, right, value, float(values[-1]), curve, by_chance, falls)


def _sizes(sizes: Any, most: int) -> list[int]:
    """Numbers of edges; errors as faithfulness."""
    if sizes is None:
        return []
    if isinstance(sizes, int):
        if sizes < 0:
            raise ValueError(f"sizes is {sizes}, expected at least 0")
        spaced = torch.logspace(0, torch.tensor(float(max(most, 1))).log10().item(), sizes, dtype=torch.float64)
        return sorted({min(most, round(x)) for x in spaced.tolist()})
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= most:
            raise ValueError(f"sizes holds {size!r}, expected integers of 0 to {most}, the circuit's edges")
    return list(sizes)


def _random(graph: Graph, size: int, count: int, seed: int) -> Iterator[list[Place]]:
    """Circuits of so many edges each, drawn from all edges of the model."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.randperm(len(graph.edges), generator=generator)[:size].tolist()
        yield [graph.place(graph.edges[i]) for i in chosen]


@public
@measured
@torch.no_grad()
def prune_circuit(
    circuit: Circuit,
    clean: FrozenTrace,
    corrupted: FrozenTrace | None = None,
    *,
    threshold: float | None = None,
    top: int | None = None,
    mode: Mode = "resample",
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Circuit:
    """Take out of a circuit the edges without which the metric gets least worse, by running the edited model.

    With a `threshold` this is automatic circuit discovery (ACDC, Conmy et al. 2023): from the logits down, of each
    receiver the edge with the smallest score first, the model is run without the edge, which stays if the metric gets
    worse by at least so much. With `top` the model is run without each of the edges in turn and of those that are too
    many a quarter, the least needed ones, is taken out, again and again; then, as long as it helps, the edge that helps
    most is taken back, for the one that is then needed least. Begin with a circuit that scores have made small: there
    is one edited pass for each edge.

    Args:
        circuit: where to start.
        clean, corrupted, mode, over: as in faithfulness.
        threshold: in units of the metric, usually "kl" in nats.
        top: the number of edges to leave.

    Returns:
        A Circuit without those edges and without dead ends.

    Raises:
        TypeError, ValueError: as faithfulness; a threshold or top below 0, or not one of the two; kl=True.
    """
    if (threshold is None) == (top is None):
        raise ValueError(f"threshold is {threshold} and top is {top}, expected one of them")
    for name, least in (("threshold", threshold), ("top", top)):
        if least is not None and least < 0:
            raise ValueError(f"{name} is {least}, expected at least 0")
    outside, how = Outside(clean, corrupted, mode, over), measurement(clean, options, "recomputed")
    if how.per_token or how.per_sequence or len(how.metrics) > 1:
        raise ValueError(
            f"per_token is {how.per_token}, per_sequence {how.per_sequence}, kl {len(how.metrics) > 1}: expected a mean"
        )
    places = {edge: outside.graph.place(edge) for edge in circuit.edges}
    worse = -1 if how.metrics[0].harm == "fall" else 1

    def values(*circuits: Sequence[EdgeLabel]) -> list[float]:
        experiments = edited(clean, outside, [[places[edge] for edge in edges] for edges in circuits])
        found: list[float] = (measure(clean, experiments, how, range(len(circuits))).values * worse).tolist()
        return found

    start = list(circuit.pruned().edges)
    if top is None:
        kept, now = start, values(start)[0]
        for edge in sorted(kept, key=lambda edge: (-places[edge][1], abs(circuit.scores[edge]))):
            others = [other for other in kept if other != edge]
            without = values(others)[0]
            if threshold is not None and without - now < threshold:
                kept, now = others, without
    else:
        kept = _best(start, top, values)
    left = set(kept)
    return replace(circuit, scores={edge: x for edge, x in circuit.scores.items() if edge in left}).pruned()


def _at_once(edges: int, top: int) -> int:
    """The number of edges that are taken out together, of those that are too many."""
    return max(1, (edges - top) // 4)


def pruning_runs(edges: int, top: int) -> int:
    """How many edited passes prune_circuit(top=...) makes of a circuit with so many edges, if no exchange helps.

    Each exchange that helps makes edges + 1 more.
    """
    runs = edges + 2
    while edges > top:
        runs += edges
        edges -= _at_once(edges, top)
    return runs


def _best(start: Sequence[EdgeLabel], top: int, values: Callable[..., list[float]]) -> list[EdgeLabel]:
    """At most `top` edges of those to start with, by the values of circuits, of which the least is the best."""

    def without_each(edges: list[EdgeLabel]) -> list[float]:
        return values(*(edges[:i] + edges[i + 1 :] for i in range(len(edges))))

    kept = list(start)
    while len(kept) > top:
        found = without_each(kept)
        gone = sorted(range(len(kept)), key=found.__getitem__)[: _at_once(len(kept), top)]
        kept = list(Circuit({edge: 0.0 for i, edge in enumerate(kept) if i not in set(gone)}, 0).pruned().edges)
    if not kept:
        return kept
    (now,) = values(kept)
    while others := [edge for edge in start if edge not in set(kept)]:
        found = values(*([*kept, edge] for edge in others))
        tried = [*kept, others[found.index(min(found))]]
        if len(tried) > top:
            found = without_each(tried)
            del tried[found.index(min(found))]
        if not min(found) < now:  # NaN is no better
            break
        kept, now = tried, min(found)
    return kept
