"""Ablations of paths, heads, layers and pairs of heads.

Under frozen attention each is a low-rank change of the clean logits, and its loss is a differentiable function of the
weights: with metric "nll", precision "ieee" and weights that require gradients, `values`, `baseline` and `delta` have
them, through the clean run's patterns and norm scales too where that was made with gradients (see `trace`). The
backward pass makes each few experiments again. Other metrics, and recomputed attention, have no gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public, takes_sharded
from pyfastcircuits.experiments import edges
from pyfastcircuits.experiments.ablation_value import AblationValue, AverageOver, Mode
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import At, at_mask
from pyfastcircuits.experiments.options import Attention, Measurement, MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.rerun import Site, rerun_removal
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run import nodes
from pyfastcircuits.run.node_names import parse_nodes, set_label
from pyfastcircuits.run.nodes import Edge, Head, HeadInput, Outputs, Path, grouped, one_or_several
from pyfastcircuits.run.paths import PathOutputs, enumerate_paths, path_z
from pyfastcircuits.run.trace import FrozenTrace

Scope = Literal["path", "direct", "edge", "joint"]


@public
@takes_sharded
@measured
def path_ablation(
    trace: FrozenTrace,
    paths: Iterable[Any],
    mode: Mode = "zero",
    *,
    reference: FrozenTrace | None = None,
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Take one path, or one set of paths, out of the logits: logits - path_logits(trace, path).

    Attention patterns, norm scales and the writes of MLPs are held at the clean run's: an MLP after an ablated path
    still writes what it wrote. A logit cap is applied to the rest.

    Args:
        trace: a frozen run.
        paths: P of them: each a path, a tuple of (layer, head), `()` being the direct path; or several paths that go
            together, such as [((0, 1),), ((0, 1), (1, 2))].
        mode, reference, over: the value that a path writes instead; see head_ablation. A path's value in another run is
            that path's term of that run.

    Returns:
        values [P], differentiable (see head_ablation); `labels` holds the paths, a frozenset for several.

    Raises:
        ValueError, IndexError, TypeError: see nodes.parse_path, ablation_value.AblationValue and options.measurement.
        RuntimeError: a backend or precision that is not there.
    """
    value = AblationValue(trace, mode, reference, over)
    labels: list[Label] = []
    sets: list[list[Path]] = []
    for entry in paths:
        given, several = one_or_several(entry)
        sets.append([nodes.parse_path(trace.weights, path) for path in given])
        labels.append(frozenset(sets[-1]) if several else sets[-1][0])
    return measure(trace, _path_removals(sets, value), measurement(trace, options), labels, mode=mode)


@public
@takes_sharded
@measured
def pair_ablation(
    trace: FrozenTrace,
    scope: Scope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    pairs: Iterable[Sequence[Sequence[int]]] | None = None,
    reference: FrozenTrace | None = None,
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Ablate every pair of heads, sorted by source and then destination.

    In models of two layers without biases "path", "direct" and "edge" are the same; deeper, they are not.

    Args:
        trace: a frozen run.
        scope: what is taken out of the run.
            "path": the path source -> destination alone, from the sources that the source head reads to the logits
            (the virtual attention head; Elhage et al. 2021).
            "direct": all that the source head writes, through the destination, straight to the logits.
            "edge": all that the source head writes, through the destination, and on from there by every way.
            "joint": both heads and all that follows from them: pairs within a layer too. By inclusion-exclusion
            the joint effect is the sum of the single ones, less the effect through both.
        mode, reference, over: the value that the source head (joint: each head) writes instead; see head_ablation.
        attention: "frozen", or "recomputed": the destination's pattern, and for "edge" and "joint" all that comes after
            it (patterns, norms, MLPs), are computed anew. A path exists under frozen patterns alone.
        pairs: [(source, destination), ...]; None: all there are.

    Returns:
        values [P], differentiable (see head_ablation); `pairs` is [P, 2, 2], those with layer1 < layer2 (joint: and
        those within a layer).

    Raises:
        ValueError: an unknown scope, mode, attention or metric; "path" with recomputed attention; pairs that are none.
        IndexError: no such head.
        RuntimeError: a backend or precision that is not there.
    """
    if scope == "path" and attention == "recomputed":
        raise ValueError("attention is 'recomputed', but scope is 'path': paths exist under frozen patterns alone")
    weights, value = trace.weights, AblationValue(trace, mode, reference, over)
    parse = _parse_joint if scope == "joint" else nodes.parse_pair
    every = all_pairs(weights, within_layers=scope == "joint")
    chosen = list(every) if pairs is None else [parse(weights, pair) for pair in pairs]
    how = measurement(trace, options, attention)
    if scope == "path":
        interventions = _path_removals([[pair] for pair in chosen], value)
    elif scope == "joint":
        interventions = _joint_removals(weights, chosen, value, attention, how)
    elif attention == "recomputed":
        cuts = [[Edge(source, HeadInput(to, "QKV"))] for source, to in chosen]
        interventions = edges.edge_removals(weights, cuts, value, "direct" if scope == "direct" else "total")
    else:
        interventions = _frozen_edge_removals(chosen, value, direct=scope == "direct")
    return measure(trace, interventions, how, chosen, scope=scope, mode=mode, attention=attention)


@public
@takes_sharded
@measured
def head_ablation(
    trace: FrozenTrace,
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    heads: Iterable[Any] | None = None,
    effect: edges.Effect = "total",
    at: At | None = None,
    reference: FrozenTrace | None = None,
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Ablate each head, or other nodes: everything it writes, its value bias included, and all that follows from it.

    Args:
        trace: a frozen run.
        mode: the value that each head writes instead, before its W_O: "zero"; "mean", its mean; "resample", its output
            in another sequence.
        attention: "frozen": later heads read the residual stream without it under the clean run's patterns and norm
            scales, and MLPs write what they wrote. "recomputed": everything behind the head is computed anew, as by a
            plain rerun with a hook.
        heads: None: every head; else P entries, each a node or several that go together: a head (layer, head), an MLP
            ("mlp", layer), the bias of a layer's heads ("bias", layer), or "embed".
        effect: "total", or "direct": the node's own write to the logits, all else as it was.
        at: the positions where outputs are taken out: an integer, several that go together, or a mask [T] or [B, T];
            negative ones count from the end. "each": every position on its own. None: all of them together.
        reference: the run that means are taken over or that sequences are resampled from, sequence by sequence; by
            default this one, where each sequence is given the one before it.
        over: the axes of means: "all" positions and sequences; "positions" of each sequence; "batch", the sequences at
            each position. Padding does not count.

    Returns:
        values [L, H], or [P] with `heads`; with at="each" [L, H, T] or [P, T], labels being (label, position). With
        metric "nll", frozen attention and precision "ieee" they, and the baseline, are differentiable where the weights
        require gradients; else they are constants.

    Raises:
        ValueError: an unknown mode, attention, effect, over or metric; a reference that does not fit; no such node; an
            `at` of another shape.
        IndexError: no such head, layer or position.
        RuntimeError: a backend or precision that is not there.
    """
    weights, how = trace.weights, measurement(trace, options, attention)
    value = AblationValue(trace, mode, reference, over, at_mask(trace, at))
    entries = enumerate_paths(weights.n_layers, weights.n_heads, 1) if heads is None else heads
    sets = [parse_nodes(trace, entry) for entry in entries]
    labels = [set_label(nodes) for nodes in sets]
    shape: tuple[int, ...] = (weights.n_layers, weights.n_heads) if heads is None else (len(sets),)
    sites = [Site(nodes) for nodes in sets]
    if at == "each":
        each = range(trace.tokens.shape[1])
        sites, shape = [Site(nodes, position) for nodes in sets for position in each], (*shape, len(each))
        labels = [(label, position) for label in labels for position in each]
    if effect == "direct" and any(len(nodes) != 1 for nodes in sets):
        raise ValueError("heads holds a set of several, but effect is 'direct': give single ones")
    if effect == "direct":
        interventions = _direct_removals(sites, value)
    elif attention == "recomputed":
        remove = partial(rerun_removal, value=value)
        interventions = [Intervention(places=range(len(sites)), items=sites, remove=remove, of_rows=True)]
    else:
        remove = partial(edges.frozen_removal, value=value)
        interventions = [Intervention(places=range(len(sites)), items=sites, remove=remove)]
    return measure(trace, interventions, how, labels, shape, mode=mode, attention=attention, effect=effect)


@public
@takes_sharded
@measured
def layer_ablation(
    trace: FrozenTrace,
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    at: At | None = None,
    reference: FrozenTrace | None = None,
    over: AverageOver = "all",
    **options: "Unpack[MeasureOptions]",
) -> Result:
    """Ablate all heads of each layer at once, and all that follows from them; see head_ablation.

    Args:
        trace, mode, attention, at, reference, over: as in head_ablation.

    Returns:
        values [L], differentiable (see head_ablation); `labels` holds the layers. With at="each" [L, T], and labels are
        (layer, position).

    Raises:
        ValueError, IndexError, RuntimeError: as head_ablation.
    """
    weights = trace.weights
    layers = [[(layer, head) for head in range(weights.n_heads)] for layer in range(weights.n_layers)]
    found: Result = head_ablation(
        trace, mode, attention, heads=layers, at=at, reference=reference, over=over, **options
    )
    numbers, each = range(weights.n_layers), range(trace.tokens.shape[1])
    return replace(found, labels=list(product(numbers, each)) if at == "each" else numbers)


def all_pairs(weights: CircuitWeights, within_layers: bool) -> Iterator[Path]:
    """Every pair of heads in two layers, and within a layer if asked, sorted by source and then destination."""
    heads = [head for (head,) in enumerate_paths(weights.n_layers, weights.n_heads, 1)]
    return (pair for pair in combinations(heads, 2) if within_layers or pair[0].layer < pair[1].layer)


def _parse_joint(weights: CircuitWeights, pair: Any) -> Path:
    heads = tuple(sorted({nodes.parse_head(weights, head, "pair") for head in pair}))
    if len(heads) != 2:
        raise ValueError(f"pairs holds {pair}, expected two heads, a (layer, head) each")
    return heads


@dataclass(frozen=True)
class _PathSetWrites:
    """The sum of what the paths of each set write to the final residual stream: [P, B, T, d], see nodes.Outputs."""

    sets: tuple[tuple[Path, ...], ...]

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See nodes.Outputs."""
        return torch.stack([self._written(run, paths) for paths in self.sets])

    def _written(self, run: FrozenTrace, paths: Sequence[Path]) -> Tensor:
        direct = run.non_head_stream(run.weights.n_layers) if () in paths else torch.zeros_like(run.embedded)
        return sum((path_z(run, [p])[0] @ run.weights.head("W_O", *p[-1]) for p in paths if p), direct)


def _path_removals(sets: Sequence[Sequence[Path]], value: AblationValue) -> list[Intervention]:
    """Single paths are grouped by their last head, whose W_O @ W_U they go through; sets and the direct path have none.

    Of these, those with the direct path in them take the bias of the logits out too.
    """

    def removal(outputs: Callable[[tuple[Any, ...]], Outputs], part: FrozenTrace, items: Sequence[Any]) -> Tensor:
        return value.removal(outputs(tuple(items)), part)

    kinds = grouped((paths[0][-1:] if len(paths) == 1 else (), () in paths) for paths in sets)
    return [
        Intervention(
            places=places,
            items=[sets[i][0] if write_heads else tuple(sets[i]) for i in places],
            remove=partial(removal, PathOutputs if write_heads else _PathSetWrites),
            write_heads=write_heads,
            removes_unembed_bias=direct and value.mode == "zero",
        )
        for (write_heads, direct), places in kinds.items()
    ]


def _direct_removals(sites: Sequence[Site], value: AblationValue) -> list[Intervention]:
    """What each site's one node loses, and nothing that follows: of heads before their W_O."""

    def of_heads(part: FrozenTrace, some: Sequence[Site]) -> Tensor:
        layers = {site.nodes[0].layer for site in some}
        gone = {layer: part.apply_post_norm(edges.removed_z(part, layer, value), layer) for layer in layers}
        return torch.stack([site.only_here(gone[site.nodes[0].layer][site.nodes[0].index]) for site in some])

    def of_others(part: FrozenTrace, some: Sequence[Site]) -> Tensor:
        gone = edges.removed_writes(part, dict.fromkeys(site.nodes[0] for site in some), value)
        return torch.stack([site.only_here(gone[site.nodes[0]]) for site in some])

    out = []
    for is_head, places in grouped(isinstance(site.nodes[0], Head) for site in sites).items():
        items = [sites[i] for i in places]
        heads = [node for site in items for node in site.nodes if isinstance(node, Head)]
        out.append(
            Intervention(places=places, items=items, remove=of_heads if is_head else of_others, write_heads=heads)
        )
    return out


def _joint_removals(
    weights: CircuitWeights, pairs: Sequence[Path], value: AblationValue, attention: Attention, how: Measurement
) -> list[Intervention]:
    """Pairs within a layer share what each head takes out, where the changes of two heads add up; others do not."""
    linear = attention == "frozen" and (how.final_norm == "frozen" or weights.norm is None)
    adds_up = linear and how.from_sums and not how.learns
    groups = grouped(first.layer if adds_up and first.layer == second.layer else None for first, second in pairs)
    rerun = attention == "recomputed"
    remove = partial(rerun_removal if rerun else edges.frozen_removal, value=value)
    out: list[Intervention] = []
    for layer, places in groups.items():
        chosen = [pairs[i] for i in places]
        if layer is None:
            sites = [Site(pair) for pair in chosen]
            out.append(Intervention(places=places, items=sites, remove=remove, of_rows=rerun))
            continue
        out.append(
            Intervention(
                places=places,
                items=[Site((Head(layer, head),)) for head in range(weights.n_heads)],
                remove=remove,
                pairs=[(first.head, second.head) for first, second in chosen],
                extra_floats_per_position=weights.n_heads * weights.d_model,
            )
        )
    return out


def _frozen_edge_removals(pairs: Sequence[Path], value: AblationValue, direct: bool) -> list[Intervention]:
    """What sources write through one frozen destination, straight to the logits or on through later heads too."""

    def removal(destination: Head, part: FrozenTrace, sources: Sequence[Head]) -> Tensor:
        z = edges.frozen_edge_z(part, sources, destination, value)
        if direct:
            return z
        gone = z @ part.weights.head("W_O", *destination)
        for layer in range(destination.layer + 1, part.weights.n_layers):
            gone = gone + part.attend(gone, layer)
        return gone

    return [
        Intervention(
            places=places,
            items=[pairs[i][0] for i in places],
            remove=partial(removal, head),
            write_heads=[head] if direct else [],
        )
        for head, places in grouped(destination for _, destination in pairs).items()
    ]
