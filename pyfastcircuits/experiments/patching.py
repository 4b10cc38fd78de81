"""Composition ablation, activation patching, path patching and its first-order screen."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pyfastcircuits.experiments.ablation import head_ablation
from pyfastcircuits.experiments.ablation_value import Mode, Over, Replacement, check_same_model
from pyfastcircuits.experiments.edges import Effect, Input, hop_changes, removed_z, renormed, rerun_of, written
from pyfastcircuits.experiments.measure import FinalNorm, Measuring, Options, measure, options_of, row_losses
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.forward import norm_scale, toward_logits
from pyfastcircuits.run.paths import Path, checked_pairs, enumerate_paths
from pyfastcircuits.run.trace import FrozenTrace

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["activation_patching", "composition_ablation", "edge_attribution", "path_patching"]

Direction = Literal["denoise", "noise"]


@torch.no_grad()
def composition_ablation(
    trace: FrozenTrace,
    input: Input,
    mode: Mode = "zero",
    effect: Effect = "total",
    *,
    pairs: Iterable[Any] | None = None,
    reference: FrozenTrace | None = None,
    over: Over = "all",
    final_norm: FinalNorm = "recomputed",
    **how: "Unpack[Measuring]",
) -> Result:
    """Every pair of heads: the destination's queries, keys or values are made without what the source wrote.

    All else is intact: the destination's other two inputs, and every other head's. Its pattern and the norm in front of
    it are computed anew. This is what breaks a composition and nothing else ("Three Kinds of Composition", Elhage et
    al. 2021), the same as a plain rerun with a hook on one input of one head.

    Args:
        trace: a frozen run.
        input: "Q", "K" or "V".
        mode, reference, over: what the source writes instead, for this one reader; see head_ablation.
        effect: "total": everything behind the destination is computed anew. "direct": what it writes goes straight to
            the logits, and all else stays.
        pairs: P entries, each (source, destination), or, for total effects, several such that are cut together and have
            destinations in one layer: all previous-token heads from all induction heads, say. None: all pairs.
        final_norm: whether its scale is that of what comes out ("recomputed") or the clean run's ("frozen").
        how: what is measured and how: metric, targets, against, positions, kl, per_token, low_memory, precision,
            backend, progress; see effects.Measuring.

    Returns:
        values [P]; `pairs` is [P, 2, 2]; `what` holds a frozenset for several.

    Raises:
        ValueError: an unknown input, mode, effect or metric; pairs that are none; a run whose model cannot be rerun.
        IndexError: no such head.
        RuntimeError: a backend or precision that is not there.
    """
    _check_effect(input, effect)
    what: list[Label] = []
    cuts: list[list[Path]] = []
    for entry in enumerate_paths(trace.weights.n_layers, trace.weights.n_heads, 2) if pairs is None else pairs:
        given = list(entry)
        several = isinstance(entry, (set, frozenset)) or not _is_head(next(iter(given[0]), None) if given else None)
        cuts.append(checked_pairs(trace.weights, given if several else [given]))
        what.append(frozenset(cuts[-1]) if several else cuts[-1][0])
        if len({to[0] for _, to in cuts[-1]}) != 1 or (several and effect == "direct"):
            raise ValueError(
                f"pairs holds {entry}: pairs that are cut together need one layer of destinations and effect 'total'"
            )
    swap = Replacement(trace, mode, reference, over)
    options = options_of(trace, final_norm, **how)
    measured = measure(trace, hop_changes(trace, cuts, input, swap, effect), options)
    return measured.result(what, (len(what),), options.score, input=input, mode=mode, effect=effect)


@torch.no_grad()
def path_patching(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    input: Input,
    effect: Effect = "direct",
    *,
    direction: Direction = "noise",
    pairs: Iterable[Sequence[Sequence[int]]] | None = None,
    final_norm: FinalNorm = "recomputed",
    **how: "Unpack[Measuring]",
) -> Result:
    """Every pair of heads: the destination's input is made with what the source writes in the other run.

    Path patching (Goldowsky-Dill et al. 2023; Wang et al. 2023) by the direct edge between two heads; what the
    destination then writes goes straight to the logits ("direct"), or through all that follows, computed anew
    ("total"). See composition_ablation.

    Args:
        clean, corrupted: runs of one model over tokens of one shape.
        input, effect, pairs, final_norm, how: as in composition_ablation.
        direction: "noise": corrupted outputs go into the clean run, whose value is the baseline; "denoise": the other
            way. Targets are the clean run's next tokens unless they are given.

    Returns:
        values [P]; setup["clean"] and setup["corrupted"] hold what the two runs measure.

    Raises:
        TypeError: something else than two runs.
        ValueError: runs of different models or shapes; as composition_ablation.
    """
    into, source, how = _directed(clean, corrupted, direction, how)
    found = composition_ablation(
        into, input, "resample", effect, pairs=pairs, reference=source, final_norm=final_norm, **how
    )
    return _with_runs(found, clean, corrupted, direction, how)


@torch.no_grad()
def activation_patching(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    *,
    direction: Direction = "denoise",
    heads: Iterable[Any] | None = None,
    **how: "Unpack[Measuring]",
) -> Result:
    """Every head: its output in one run is put into the other, and everything behind it is computed anew.

    Also called causal tracing or interchange intervention (Meng et al. 2022; Vig et al. 2020).

    Args:
        clean, corrupted: runs of one model over tokens of one shape.
        direction: "denoise": clean outputs go into the corrupted run, whose value is the baseline; "noise": the other
            way. Targets are the clean run's next tokens unless they are given.
        heads: as in head_ablation.
        how: as in composition_ablation.

    Returns:
        values [L, H], or [P] with `heads`; setup["clean"] and setup["corrupted"] hold what the two runs measure.

    Raises:
        TypeError: something else than two runs.
        ValueError: runs of different models or shapes; as head_ablation.
    """
    into, source, how = _directed(clean, corrupted, direction, how)
    found = head_ablation(into, "resample", "recomputed", heads=heads, reference=source, **how)
    return _with_runs(found, clean, corrupted, direction, how)


def edge_attribution(
    clean: FrozenTrace,
    corrupted: FrozenTrace,
    input: Input,
    effect: Effect = "direct",
    *,
    exact: int = 0,
    direction: Direction = "noise",
    final_norm: FinalNorm = "recomputed",
    **how: "Unpack[Measuring]",
) -> Result:
    """path_patching of every pair to first order: one gradient for each destination instead of a run for each pair.

    Edge attribution patching (Syed et al. 2023; Nanda 2023): what the source writes less what it writes in the other
    run, times the gradient of the metric by what the destination reads. A screen: attention and norms saturate, so
    check what matters with `exact`.

    Args:
        clean, corrupted, input, effect, direction, final_norm: as in path_patching.
        exact: how many of the pairs that seem to matter most are patched exactly too.
        how: as in composition_ablation; a metric that has a gradient, so not "rank", "top1" or "kl" (which has none at
            the clean run); means only.

    Returns:
        values [P], the baseline plus the first-order change. With `exact`, also["exact"] and also["error"] (first order
        less exact), NaN for the pairs that were not patched.

    Raises:
        TypeError, ValueError: as path_patching; a metric without a gradient; exact below 0.
    """
    _check_effect(input, effect)
    if exact < 0:
        raise ValueError(f"exact is {exact}, expected a number of pairs")
    asked = {name: how.get(name, default) for name, default in (("metric", "nll"), ("kl", False), ("per_token", False))}
    if asked["metric"] in ("kl", "rank", "top1") or asked["kl"] or asked["per_token"]:
        raise ValueError(
            f"metric is {asked['metric']!r}, kl {asked['kl']}, per_token {asked['per_token']}: expected the mean of a "
            "metric with a gradient, nll, logit_difference or probability"
        )
    into, source, how = _directed(clean, corrupted, direction, how)
    options = options_of(into, final_norm, **how)
    pairs = enumerate_paths(into.weights.n_layers, into.weights.n_heads, 2)
    changes = _first_order(into, Replacement(into, "resample", source), input, effect, options)
    measured = measure(into, [], options)
    shape = (into.weights.n_layers, into.weights.n_heads) * 2
    where = tuple(torch.tensor(pairs, dtype=torch.long).view(-1, 4).mT)
    found = measured.result([], (0,), options.score, input=input, effect=effect)
    values = found.baseline + changes.view(shape)[where]
    found = replace(found, labels=pairs, values=values, harm="size")
    if exact:
        best = found.means().abs().sort(descending=True, stable=True).indices[:exact]
        true = path_patching(
            clean, corrupted, input, effect, pairs=[pairs[i] for i in best.tolist()], direction=direction,
            final_norm=final_norm, **how,
        )  # fmt: skip
        known = torch.full_like(values, torch.nan)
        known[best] = true.values
        found = replace(found, extra={"exact": known, "error": values - known})
    return _with_runs(found, clean, corrupted, direction, how)


def _is_head(entry: Any) -> bool:
    """Whether a pair's first entry is a head's first: then it is a pair, and not several."""
    return not isinstance(entry, (tuple, list))


def _check_effect(input: str, effect: str) -> None:
    if input not in get_args(Input):
        raise ValueError(f"input is {input!r}, expected one of {', '.join(get_args(Input))}")
    if effect not in get_args(Effect):
        raise ValueError(f"effect is {effect!r}, expected one of {', '.join(get_args(Effect))}")


def _directed(
    clean: FrozenTrace, corrupted: FrozenTrace, direction: str, how: Measuring
) -> tuple[FrozenTrace, FrozenTrace, Measuring]:
    """The run that is changed, the one outputs are taken from, and the clean run's targets."""
    if not isinstance(clean, FrozenTrace):
        raise TypeError(f"clean is a {type(clean).__name__}, expected a FrozenTrace (see trace)")
    if direction not in get_args(Direction):
        raise ValueError(f"direction is {direction!r}, expected one of {', '.join(get_args(Direction))}")
    check_same_model("corrupted", corrupted, clean)
    if corrupted.tokens.shape != clean.tokens.shape:
        raise ValueError(
            f"corrupted has tokens of shape {list(corrupted.tokens.shape)}, but clean {list(clean.tokens.shape)}"
        )
    if direction == "noise":
        return clean, corrupted, how
    score = options_of(clean, **how).score  # the last position has no next token: an error here, and not below
    return corrupted, clean, {**how, "targets": score.targets}


def _with_runs(found: Result, clean: FrozenTrace, corrupted: FrozenTrace, direction: str, how: Measuring) -> Result:
    """With what either run measures by itself."""
    options = options_of(clean, **how)
    setup = dict(found.setup) | {"direction": direction}
    for name, run in (("clean", clean), ("corrupted", corrupted)):
        targets = {"targets": options.score.targets}
        plain: Measuring = {**how, **targets, "per_token": False, "kl": False}  # type: ignore[typeddict-item]
        setup[name] = repr(float(measure(run, [], options_of(run, **plain)).baselines[options.score.metric]))
    return replace(found, setup=setup)


def _first_order(trace: FrozenTrace, swap: Replacement, input: Input, effect: Effect, options: Options) -> Tensor:
    """d metric of every pair, [L * H * L * H]."""
    weights, heads = trace.weights, range(trace.weights.n_heads)
    out = trace.embedded.new_zeros(weights.n_layers, len(heads), weights.n_layers, len(heads), dtype=torch.float64)
    for first in range(len(trace.tokens)):  # gradients of one sequence at a time
        sequences = slice(first, first + 1)
        part, score = trace[sequences], options.score[sequences]
        if not score.count:
            continue
        with torch.no_grad():
            gone = [
                torch.stack([written(part, removed_z(part, sequences, layer, swap)[h], layer, h) for h in heads])
                for layer in range(weights.n_layers)
            ]
        toward_z = _gradients_of_z(part, options, score.count / options.score.count, sequences, effect)
        for layer in range(1, weights.n_layers):
            read = _gradients_of_input(part, layer, toward_z[layer], input)
            for earlier in range(layer):
                change = torch.einsum("sbtd,hbtd->sh", gone[earlier].double(), read.double())
                out[earlier, :, layer] -= change
    return out.flatten().to(weights.compute_dtype)


def _gradients_of_z(
    part: FrozenTrace, options: Options, share: float, sequences: slice, effect: Effect
) -> list[Tensor]:
    """Gradient of the metric's mean, times `share`, by z of each layer: L of [H, B, T, r]."""
    weights = part.weights
    with torch.enable_grad():
        if effect == "direct":
            final = part.final.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_metric(part, final, options, sequences) * share, final)
            written = [part.post(gradient, layer) for layer in range(weights.n_layers)]
            W_O = [weights.heads("W_O", layer) for layer in range(weights.n_layers)]
        else:
            zeros = [torch.zeros_like(part.embedded[None]).requires_grad_() for _ in range(weights.n_layers)]
            stream = part.embedded[None]
            for layer, zero in enumerate(zeros):
                stream = rerun_of(part).after(layer, stream, zero)
            gradients = torch.autograd.grad(_metric(part, stream[0], options, sequences) * share, zeros)
            written = [gradient[0] for gradient in gradients]
            W_O = [weights.W_O[layer].to(weights.compute_dtype) for layer in range(weights.n_layers)]
    return [torch.einsum("btd,hrd->hbtr", gradient, out) for gradient, out in zip(written, W_O, strict=True)]


def _metric(part: FrozenTrace, final: Tensor, options: Options, sequences: slice) -> Tensor:
    """The mean over the positions measured, differentiable by the final residual stream."""
    score, weights = options.score[sequences], part.weights
    scale = part.scales[-1] if options.final_norm == "frozen" else norm_scale(final, weights)
    rows = score.rows(toward_logits(final, weights) * scale[..., None])
    if score.metric != "logit_difference":
        losses = row_losses(rows, score.tokens()[:, 0], weights, options.backend)
        return (losses if score.metric == "nll" else (-losses).exp()).mean()
    logits = []
    for tokens in score.tokens().unbind(-1):
        picked = torch.einsum("nd,dn->n", rows, weights.W_U[:, tokens].to(rows.dtype))
        picked = picked if weights.unembed_bias is None else picked + weights.unembed_bias[tokens]
        logits.append(picked if weights.logit_cap is None else weights.logit_cap * (picked / weights.logit_cap).tanh())
    return (logits[0] - logits[1]).mean()


def _gradients_of_input(part: FrozenTrace, layer: int, toward_z: Tensor, input: Input) -> Tensor:
    """Gradient by what each head of a layer reads as its input, [H, B, T, d]."""
    rerun, heads = rerun_of(part), part.weights.n_heads
    with torch.no_grad():
        clean = rerun.project(layer, part.normed(part.streams[layer], layer)[None])
    with torch.enable_grad():
        stream = part.streams[layer].expand(heads, *part.embedded.shape).detach().requires_grad_()
        changed = rerun.project(layer, renormed(part, stream))
        mixture = (new if name == input else old for name, new, old in zip("QKV", changed, clean, strict=True))
        z = rerun.mix(layer, *mixture)  # [H, B, H, T, r]: each copy of the stream for one head
        own = torch.stack([z[head, :, head] for head in range(heads)])
        (gradient,) = torch.autograd.grad((own * toward_z).sum(), stream)
    return gradient
