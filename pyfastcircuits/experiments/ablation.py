"""Ablations of paths, heads, layers and pairs of heads: frozen ones are low-rank changes of the clean logits."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation_value import Mode, Over, Replacement
from pyfastcircuits.experiments.edges import (
    Effect,
    Head,
    frozen_hop,
    frozen_removed,
    hop_changes,
    removed_z,
    rerun_removed,
)
from pyfastcircuits.experiments.measure import Change, FinalNorm, Measuring, Options, can_share, measure, options_of
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.paths import Path, checked_pairs, checked_path, enumerate_paths, path_values
from pyfastcircuits.run.trace import FrozenTrace

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["head_ablation", "layer_ablation", "pair_ablation", "path_ablation"]

Attention = Literal["frozen", "recomputed"]
Scope = Literal["path", "direct", "edge", "joint"]


@torch.no_grad()
def path_ablation(
    trace: FrozenTrace,
    paths: Iterable[Any],
    mode: Mode = "zero",
    *,
    reference: FrozenTrace | None = None,
    over: Over = "all",
    final_norm: FinalNorm = "frozen",
    **how: "Unpack[Measuring]",
) -> Result:
    """What is left when one path, or one set of paths, is taken out of the logits: logits - path_logits(trace, path).

    Held at the clean run's: attention patterns, norm scales, and what MLPs write: an MLP after an ablated path still
    writes what it wrote. A logit cap is applied to what is left.

    Args:
        trace: a frozen run.
        paths: P of them: each a path, a tuple of (layer, head), `()` being the direct path; or several paths that go
            together, such as [((0, 1),), ((0, 1), (1, 2))].
        mode, reference, over: what a path writes instead; see head_ablation. What a path writes in another run is that
            path's term of that run.
        final_norm: whether the final norm's scale is the clean run's ("frozen") or that of what is left.
        how: what is measured and how: metric, targets, against, positions, kl, per_token, low_memory, precision,
            backend, progress; see effects.Measuring.

    Returns:
        values [P]; `what` holds the paths, a frozenset for several.

    Raises:
        ValueError, IndexError: see paths.checked_path, replacement.Replacement and metrics.scoring.
        RuntimeError: a backend or precision that is not there.
    """
    swap = Replacement(trace, mode, reference, over)
    what: list[Label] = []
    sets: list[list[Path]] = []
    for given in paths:
        entry = tuple(given)
        several = isinstance(given, (set, frozenset)) or (len(entry) > 0 and _is_path(entry[0]))
        sets.append([checked_path(trace.weights, path) for path in (entry if several else (entry,))])
        what.append(frozenset(sets[-1]) if several else sets[-1][0])
    options = options_of(trace, final_norm, **how)
    measured = measure(trace, _path_changes(trace, sets, swap), options)
    return measured.result(what, (len(what),), options.score, mode=mode)


@torch.no_grad()
def pair_ablation(
    trace: FrozenTrace,
    scope: Scope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    pairs: Iterable[Sequence[Sequence[int]]] | None = None,
    reference: FrozenTrace | None = None,
    over: Over = "all",
    final_norm: FinalNorm | None = None,
    **how: "Unpack[Measuring]",
) -> Result:
    """Every pair of heads, sorted by source and then destination.

    In models of two layers without biases "path", "direct" and "edge" are the same; deeper, they are not.

    Args:
        trace: a frozen run.
        scope: what is taken out of the run.
            "path": the path source -> destination alone, from the sources that the source head reads to the logits
            (the virtual attention head; Elhage et al. 2021).
            "direct": all that the source head writes, through the destination, straight to the logits.
            "edge": all that the source head writes, through the destination, and on from there by every way.
            "joint": both heads and all that follows from them: pairs within a layer too. By inclusion-exclusion
            what it takes out is what each head's ablation does, less what goes through both.
        mode, reference, over: what the source head (joint: each head) writes instead; see head_ablation.
        attention: "frozen", or "recomputed": the destination's pattern, and for "edge" and "joint" all that comes after
            it (patterns, norms, MLPs), are computed anew. A path exists under frozen patterns alone.
        pairs: [(source, destination), ...]; None: all there are.
        final_norm: "frozen" or "recomputed"; as `attention` if None.
        how: as in path_ablation.

    Returns:
        values [P]; `pairs` is [P, 2, 2], those with layer1 < layer2 (joint: and those within a layer).

    Raises:
        ValueError: an unknown scope, mode, attention or metric; "path" with recomputed attention; pairs that are none.
        IndexError: no such head.
        RuntimeError: a backend or precision that is not there.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}, expected one of {', '.join(get_args(Scope))}")
    _check_attention(trace, attention)
    if scope == "path" and attention == "recomputed":
        raise ValueError("attention is 'recomputed', but scope is 'path': paths exist under frozen patterns alone")
    weights = trace.weights
    swap = Replacement(trace, mode, reference, over)
    if scope == "joint":
        layers = [[(layer, h) for h in range(weights.n_heads)] for layer in range(weights.n_layers)]
        within: list[Path] = [pair for heads in layers for pair in combinations(heads, 2)]
        chosen = sorted(enumerate_paths(weights.n_layers, weights.n_heads, 2) + within)
        if pairs is not None:
            chosen = [_checked_joint(trace, pair) for pair in pairs]
    else:
        chosen = checked_pairs(weights, pairs)
    options = options_of(trace, final_norm or attention, **how)
    if scope == "path":
        changes = _path_changes(trace, [[pair] for pair in chosen], swap)
    elif scope == "joint":
        changes = _joint_changes(trace, chosen, swap, attention, options)
    elif attention == "recomputed":
        changes = hop_changes(
            trace, [[pair] for pair in chosen], "QKV", swap, "direct" if scope == "direct" else "total"
        )
    else:
        changes = _frozen_hop_changes(trace, chosen, swap, straight=scope == "direct")
    measured = measure(trace, changes, options)
    return measured.result(chosen, (len(chosen),), options.score, scope=scope, mode=mode, attention=attention)


@torch.no_grad()
def head_ablation(
    trace: FrozenTrace,
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    heads: Iterable[Any] | None = None,
    effect: Effect = "total",
    reference: FrozenTrace | None = None,
    over: Over = "all",
    final_norm: FinalNorm | None = None,
    **how: "Unpack[Measuring]",
) -> Result:
    """Without each head: everything it writes, its value bias included, and all that follows from it.

    Args:
        trace: a frozen run.
        mode: what each head writes instead, before its W_O: "zero"; "mean", its mean; "resample", what it writes in
            another sequence.
        attention: "frozen": later heads read the residual stream without it under the clean run's patterns and norm
            scales, and MLPs write what they wrote. "recomputed": everything behind the head is computed anew, as by a
            plain rerun with a hook.
        heads: None: every head; else P entries, each a head (layer, head) or several that go together.
        effect: "total", or "direct": what the head itself writes to the logits, all else as it was.
        reference: the run that means are taken over or that sequences are resampled from, sequence by sequence; by
            default this one, where each sequence is given the one before it.
        over: what means are taken over: "all" positions and sequences; "positions" of each sequence; "batch", the
            sequences at each position. Padding does not count.
        final_norm: "frozen" or "recomputed"; as `attention` if None.
        how: as in path_ablation.

    Returns:
        values [L, H], or [P] with `heads`.

    Raises:
        ValueError: an unknown mode, attention, effect, over or metric; a reference that does not fit.
        IndexError: no such head.
        RuntimeError: a backend or precision that is not there.
    """
    _check_attention(trace, attention)
    if effect not in get_args(Effect):
        raise ValueError(f"effect is {effect!r}, expected one of {', '.join(get_args(Effect))}")
    weights = trace.weights
    swap = Replacement(trace, mode, reference, over)
    options = options_of(trace, final_norm or attention, **how)
    if heads is None:
        what: list[Label] = list(enumerate_paths(weights.n_layers, weights.n_heads, 1))
        sets: list[tuple[Head, ...]] = [(path[0],) for path in enumerate_paths(weights.n_layers, weights.n_heads, 1)]
    else:
        sets = [_checked_set(trace, entry) for entry in heads]
        what = [heads if len(heads) == 1 else frozenset(heads) for heads in sets]
    shape = (weights.n_layers, weights.n_heads) if heads is None else (len(sets),)
    changes = _direct_changes(sets, swap) if effect == "direct" else _set_changes(sets, swap, attention)
    measured = measure(trace, changes, options)
    return measured.result(what, shape, options.score, mode=mode, attention=attention, effect=effect)


@torch.no_grad()
def layer_ablation(
    trace: FrozenTrace,
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    reference: FrozenTrace | None = None,
    over: Over = "all",
    final_norm: FinalNorm | None = None,
    **how: "Unpack[Measuring]",
) -> Result:
    """Without all heads of each layer at once, and all that follows from them; see head_ablation.

    Returns:
        values [L]; `what` holds the layers.

    Raises:
        ValueError, RuntimeError: as head_ablation.
    """
    weights = trace.weights
    layers = [[(layer, head) for head in range(weights.n_heads)] for layer in range(weights.n_layers)]
    found = head_ablation(
        trace, mode, attention, heads=layers, reference=reference, over=over, final_norm=final_norm, **how
    )
    return replace(found, labels=range(weights.n_layers))


def _is_path(entry: Any) -> bool:
    """Whether an entry of a set of paths is one, and not a head of a path."""
    return isinstance(entry, (tuple, list)) and all(isinstance(head, (tuple, list)) for head in entry)


def _check_attention(trace: FrozenTrace, attention: str) -> None:
    if attention not in get_args(Attention):
        raise ValueError(f"attention is {attention!r}, expected one of {', '.join(get_args(Attention))}")


def _checked_set(trace: FrozenTrace, entry: Any) -> tuple[Head, ...]:
    heads = (
        entry if isinstance(entry, (set, frozenset)) or isinstance(next(iter(entry), None), (tuple, list)) else [entry]
    )
    return tuple(sorted({checked_path(trace.weights, (head,))[0] for head in heads}))


def _checked_joint(trace: FrozenTrace, pair: Any) -> Path:
    heads = _checked_set(trace, tuple(pair))
    if len(heads) != 2:
        raise ValueError(f"pairs holds {pair}, expected two heads, a (layer, head) each")
    return heads


def _path_changes(trace: FrozenTrace, sets: Sequence[Sequence[Path]], swap: Replacement) -> list[Change]:
    """Single paths grouped by their last head, through whose W_O @ W_U they write; sets of paths, and those with the
    direct path, write to the whole residual stream.
    """
    weights = trace.weights
    groups: dict[Any, list[int]] = {}
    for i, paths in enumerate(sets):
        single = paths[0][-1] if len(paths) == 1 and paths[0] else () in paths
        groups.setdefault(single, []).append(i)

    def through(head: Head, indices: list[int]) -> Change:
        def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
            chosen = [sets[indices[i]][0] for i in members]
            return swap.removed(lambda run: path_values(run, chosen), part, sequences, ("paths", *chosen))

        return Change(indices, removed, [head])

    def several(direct: bool, indices: list[int]) -> Change:
        def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
            def written(run: FrozenTrace, paths: Sequence[Path]) -> Tensor:
                heads = (path_values(run, [p])[0] @ weights.head("W_O", *p[-1]) for p in paths if p)
                return sum(heads, run.sources_before(weights.n_layers) if direct else torch.zeros_like(run.embedded))

            chosen = [sets[indices[i]] for i in members]
            values = lambda run: torch.stack([written(run, paths) for paths in chosen])  # noqa: E731
            return swap.removed(values, part, sequences, ("sets", *map(tuple, chosen)))

        return Change(indices, removed, bias=direct and swap.mode == "zero")

    return [
        several(key, indices) if isinstance(key, bool) else through(key, indices) for key, indices in groups.items()
    ]


def _set_changes(sets: Sequence[tuple[Head, ...]], swap: Replacement, attention: Attention) -> list[Change]:
    """Total effects, through the whole residual stream."""
    gone = frozen_removed if attention == "frozen" else rerun_removed

    def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
        return gone(part, sequences, [sets[i] for i in members], swap)

    return [Change(range(len(sets)), removed)] if sets else []


def _direct_changes(sets: Sequence[tuple[Head, ...]], swap: Replacement) -> list[Change]:
    """What single heads write themselves."""
    if any(len(heads) != 1 for heads in sets):
        raise ValueError("heads holds a set of several, but effect is 'direct': give single heads")

    def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
        chosen = [sets[i][0] for i in members]
        gone = {layer: part.post(removed_z(part, sequences, layer, swap), layer) for layer in {at for at, _ in chosen}}
        return torch.stack([gone[layer][h] for layer, h in chosen])

    return [Change(range(len(sets)), removed, [head for (head,) in sets])] if sets else []


def _joint_changes(
    trace: FrozenTrace, pairs: Sequence[Path], swap: Replacement, attention: Attention, options: Options
) -> list[Change]:
    """Pairs within a layer share what each head takes out; the others go one by one."""
    weights = trace.weights
    shared = attention == "frozen" and can_share(options, weights)
    changes = []
    groups: dict[int | None, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair[0][0] if shared and pair[0][0] == pair[1][0] else None, []).append(i)
    for layer, indices in groups.items():
        chosen = [pairs[i] for i in indices]
        change = _set_changes(chosen if layer is None else _heads_of(weights, layer), swap, attention)[0]
        together = None if layer is None else [(first[1], second[1]) for first, second in chosen]
        scratch = 0 if layer is None else weights.n_heads * weights.d_model
        changes.append(replace(change, indices=indices, pairs=together, scratch=scratch))
    return changes


def _heads_of(weights: CircuitWeights, layer: int) -> list[tuple[Head, ...]]:
    return [((layer, head),) for head in range(weights.n_heads)]


def _frozen_hop_changes(trace: FrozenTrace, pairs: Sequence[Path], swap: Replacement, straight: bool) -> list[Change]:
    """What sources write, through a destination's frozen pattern: straight to the logits, or on through later heads."""
    weights = trace.weights
    groups: dict[Head, list[int]] = {}
    for i, (_, destination) in enumerate(pairs):
        groups.setdefault(destination, []).append(i)

    def through(head: Head, indices: list[int]) -> Change:
        W_O = weights.head("W_O", *head)

        def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
            z = frozen_hop(part, sequences, [pairs[indices[i]][0] for i in members], head, swap)
            if straight:
                return z
            gone = z @ W_O
            for layer in range(head[0] + 1, weights.n_layers):
                gone = gone + part.attend(gone, layer)
            return gone

        return Change(indices, removed, [head] if straight else [])

    return [through(head, indices) for head, indices in groups.items()]
