"""Composition ablation, activation patching, path patching and its first-order screen."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation import head_ablation
from pyfastcircuits.experiments.ablation_value import AblationValue, AverageOver, Mode, check_same_model
from pyfastcircuits.experiments.edge_scores import first_order
from pyfastcircuits.experiments.edges import Effect, edge_removals, place
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import At, Positions, at_mask
from pyfastcircuits.experiments.options import MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.outside import Outside
from pyfastcircuits.experiments.points import What, patches
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.node_names import edge_label, is_pair, parse_edge
from pyfastcircuits.run.nodes import Edge, Kind, one_or_several
from pyfastcircuits.run.paths import enumerate_paths
from pyfastcircuits.run.trace import FrozenTrace

Direction = Literal["denoise", "noise"]


@public
@measured
@torch.no_grad()
def composition_ablation(
    trace: FrozenTrace,
    kind: Kind,
    mode: Mode = "zero",
    effect: Effect = "total",
    *,
    pairs: Iterable[Any] | None = None,
    at: Positions | None = None,
    reference: FrozenTrace | None = None,
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Cut every pair's composition: the destination makes its queries, keys or values without the source's output.

    All else is intact: the destination's other two inputs, and every other head's. Its pattern and the norm in front of
    it are computed anew. This is what breaks a composition and nothing else ("Three Kinds of Composition", Elhage et
    al. 2021), the same as a plain rerun with a hook on one input of one head.

    Args:
        trace: a frozen run.
        kind: "Q", "K" or "V": what the destination makes without it, queries, keys or values.
        mode, reference, over: the value that the source writes instead, for this one receiver; see head_ablation.
        effect: "total": everything behind the destination is computed anew. "direct": the destination's output goes
            straight to the logits, and all else stays.
        pairs: P entries, each (source, destination), or, for total effects, several such that are cut together and have
            destinations in one layer: all previous-token heads from all induction heads, say. None: all pairs of heads.
            A source is any node (see head_ablation). A destination is a head, whose `kind` of input is cut, or says
            which, ((layer, head), "K"); an MLP ("mlp", layer), of whose output all that follows is the effect; or
            "logits", where an edge is the source's own write to them.
        at: the positions where the source's output is taken out, as in head_ablation; not each on its own.

    Returns:
        values [P]; `pairs` is [P, 2, 2] where all are of heads; `labels` holds a frozenset for several.

    Raises:
        ValueError: an unknown kind, mode, effect or metric; pairs that are none.
        IndexError: no such head, layer or position.
        RuntimeError: a backend or precision that is not there.
    """
    weights = trace.weights
    entries = enumerate_paths(weights.n_layers, weights.n_heads, 2) if pairs is None else pairs
    labels, cuts = _parse_pairs(trace, entries, kind, effect)
    value = AblationValue(trace, mode, reference, over, at_mask(trace, at))
    how = measurement(trace, options, "recomputed")
    return measure(trace, edge_removals(weights, cuts, value, effect), how, labels, kind=kind, mode=mode, effect=effect)


def _parse_pairs(
    trace: FrozenTrace, entries: Iterable[Any], kind: Kind, effect: Effect
) -> tuple[list[Label], list[list[Edge]]]:
    """The label of each entry, and its edges; errors as composition_ablation."""
    labels, cuts = list[Label](), list[list[Edge]]()
    for entry in entries:
        given, several = one_or_several(entry, is_pair)
        cut = [parse_edge(trace, pair, kind) for pair in given]
        if len({place(edge.receiver) for edge in cut}) != 1 or (several and effect == "direct"):
            raise ValueError(
                f"pairs holds {entry}: pairs that are cut together need one layer of destinations and effect 'total'"
            )
        named = [edge_label(edge, kind) for edge in cut]
        labels.append(frozenset(named) if several else named[0])
        cuts.append(cut)
    return labels, cuts


@public
@measured
@torch.no_grad()
def path_patching(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    kind: Kind,
    effect: Effect = "total",
    *,
    direction: Direction = "denoise",
    pairs: Iterable[Any] | None = None,
    at: Positions | None = None,
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Patch every edge between two heads: the destination's input is made with the source's output of the other run.

    Path patching (Goldowsky-Dill et al. 2023; Wang et al. 2023) by the direct edge between two heads. The destination's
    new output goes through all that follows, computed anew ("total"), or straight to the logits ("direct"). See
    composition_ablation.

    Args:
        clean, corrupted: runs of one model over tokens of one shape.
        kind, effect, pairs, at: as in composition_ablation.
        direction: "denoise": clean outputs go into the corrupted run, whose value is the baseline; "noise": the other
            way. Targets are the clean run's next tokens unless they are given.

    Returns:
        values [P]; setup["clean"] and setup["corrupted"] hold what the two runs measure.

    Raises:
        TypeError: something else than two runs.
        ValueError: runs of different models or shapes; as composition_ablation.
    """
    into, source, options = _directed(clean, corrupted, direction, options)
    found: Result = composition_ablation(
        into, kind, "resample", effect, pairs=pairs, at=at, reference=source, **options
    )
    return _with_runs(found, clean, corrupted, direction, options)


@public
@measured
@torch.no_grad()
def activation_patching(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    *,
    what: What = "z",
    at: At | None = None,
    direction: Direction = "denoise",
    heads: Iterable[Any] | None = None,
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Patch every layer or head: what one run has there is put into the other, and all behind it is computed anew.

    This is also called causal tracing or interchange intervention (Meng et al. 2022; Vig et al. 2020). With at="each"
    it makes the maps over layers and positions that TransformerLens draws by `patching.get_act_patch_*`, which these
    equal; many patches run together, from the layer and the position that they change.

    Args:
        clean, corrupted: runs of one model over tokens of one shape.
        what: what is patched in each layer. "resid_pre", "resid_mid": the residual stream before the layer, or before
            its MLP; "attn_out", "mlp_out": what the heads, or the MLP, add to it. Of each head: "z", its mixed values;
            "q", "k", "v": queries, keys (of key/value heads), values; "pattern": its attention from a position.
        at: as in head_ablation: the positions where it is patched; "each": every position on its own.
        direction: as in path_patching.
        heads: with what="z", the nodes to patch, as in head_ablation.

    Returns:
        values [L], of heads [L, H] ("k", "v": [L, Hkv]), or [P] with `heads`; with at="each" followed by [T]. Labels
        are (what, layer), (label of the head, "Q"), ..., with at="each" (label, position). setup["clean"] and
        setup["corrupted"] hold what the two runs measure.

    Raises:
        TypeError: something else than two runs.
        ValueError: runs of different models or shapes; a point that the model has not (no MLP, or one that runs beside
            the heads); heads with another `what`; as head_ablation.
        IndexError: no such node or position.
    """
    if heads is not None and what != "z":
        raise ValueError(f"heads is given, but what is {what!r}: nodes are patched by their outputs, what='z'")
    into, source, options = _directed(clean, corrupted, direction, options)
    if what == "z":
        found: Result = head_ablation(into, "resample", "recomputed", heads=heads, at=at, reference=source, **options)
    else:
        value = AblationValue(into, "resample", source, at=at_mask(into, at))
        interventions, labels, shape = patches(into, what, value, each=at == "each")
        how = measurement(into, options, "recomputed")
        found = measure(into, interventions, how, labels, shape, mode="resample", attention="recomputed")
    return _with_runs(replace(found, setup={**found.setup, "what": what}), clean, corrupted, direction, options)


@public
@measured
def edge_attribution(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    kind: Kind,
    effect: Effect = "total",
    *,
    pairs: Iterable[Any] | None = None,
    exact: int = 0,
    direction: Direction = "denoise",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """path_patching of every pair to first order: one backward pass instead of a run for each pair.

    Edge attribution patching (Syed et al. 2023; Nanda 2023): the source's output less its output in the other run,
    times the gradient of the metric by the destination's input. It is a screen: attention and norms saturate, so check
    what matters with `exact`. `edge_scores` has the same of all edges at once, with integrated gradients too.

    Args:
        clean, corrupted, kind, effect, direction: as in path_patching. The metric must have a gradient, so not "rank",
            "top1" or "kl" (which has none at the clean run), and values are means.
        pairs: as in composition_ablation, of the nodes that edge_scores knows; several that go together add up.
        exact: the number of pairs, of those that seem to matter most, that are patched exactly too.

    Returns:
        values [P], the baseline plus the first-order change. With `exact`, extra["exact"] and extra["error"] (first
        order less exact), NaN for the pairs that were not patched.

    Raises:
        TypeError, ValueError: as path_patching; a metric without a gradient; exact below 0.
    """
    if exact < 0:
        raise ValueError(f"exact is {exact}, expected a number of pairs")
    into, source, options = _directed(clean, corrupted, direction, options)
    how = measurement(into, options, "recomputed")
    if not all(metric.has_gradient for metric in how.metrics) or how.apart:
        raise ValueError(
            f"metric is {how.metrics[0].name!r}, kl {len(how.metrics) > 1}, per_token {how.per_token}, per_sequence "
            f"{how.per_sequence}: expected the mean of a metric with a gradient, nll, logit_difference or probability"
        )
    outside, weights = Outside(into, source, clean_norms=True), into.weights
    entries = list(enumerate_paths(weights.n_layers, weights.n_heads, 2) if pairs is None else pairs)
    labels, cuts = _parse_pairs(into, entries, kind, effect)
    with torch.no_grad():
        scores = first_order(into, outside, how, effect=effect)
    rise = scores.new_zeros(len(cuts))
    for i, cut in enumerate(cuts):
        for edge in cut:
            named: Any = edge_label(edge, kind)
            rise[i] += scores[outside.graph.place((named[0], edge.receiver.label))]
    found = measure(into, [], how, [], kind=kind, effect=effect)
    values = found.baseline + rise
    found = replace(found, labels=labels, values=values, rise=rise, harm="size")
    if exact:
        best = found.means().abs().sort(descending=True, stable=True).indices[:exact]
        patched: Result = path_patching(
            clean, corrupted, kind, effect, pairs=[entries[i] for i in best.tolist()], direction=direction, **options
        )
        known = torch.full_like(values, torch.nan)
        known[best] = patched.values
        found = replace(found, extra={"exact": known, "error": values - known})
    return _with_runs(found, clean, corrupted, direction, options)


def _directed(
    clean: FrozenTrace, corrupted: FrozenTrace, direction: str, options: MeasureOptions
) -> tuple[FrozenTrace, FrozenTrace, MeasureOptions]:
    """The run that is changed, the one that outputs are taken from, and options about the clean run's tokens."""
    check_same_model("corrupted", corrupted, clean)
    if corrupted.tokens.shape != clean.tokens.shape:
        raise ValueError(
            f"corrupted has tokens of shape {list(corrupted.tokens.shape)}, but clean {list(clean.tokens.shape)}"
        )
    if direction == "noise":
        return clean, corrupted, options
    return corrupted, clean, _about(clean, options)


def _about(clean: FrozenTrace, options: MeasureOptions) -> MeasureOptions:
    """Options that ask any run about the clean run's tokens; errors as measurement."""
    how = measurement(clean, options)
    metric = replace(how.metrics[0], targets=how.asked.targets)
    return {**options, "metric": metric, "targets": None, "against": None}


def _with_runs(
    found: Result, clean: FrozenTrace, corrupted: FrozenTrace, direction: str, options: MeasureOptions
) -> Result:
    """The result with what either run measures by itself in its setup."""
    setup = dict(found.setup) | {"direction": direction}
    plain: MeasureOptions = {**_about(clean, options), "per_token": False, "per_sequence": False, "kl": False}
    plain["progress"] = None
    for name, run in (("clean", clean), ("corrupted", corrupted)):
        setup[name] = float(measure(run, [], measurement(run, plain, "recomputed"), []).baseline)
    return replace(found, setup=setup)
