"""What each part of a run adds to logits, to a feature direction, and layer by layer to the prediction."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pyfastcircuits.experiments.measure import BLOCK, Change, FinalNorm, Measuring, measure, options_of, unembed_columns
from pyfastcircuits.experiments.metrics import Positions, Scoring, scoring
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.components import EMBED, besides_heads, head_label, source_label
from pyfastcircuits.run.forward import centered
from pyfastcircuits.run.paths import Path, checked_path, path_values
from pyfastcircuits.run.trace import FrozenTrace

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["direct_logit_attribution", "logit_lens", "project"]

Part = Literal["component", "head", "source", "path"]
UNEMBED_BIAS = "b_U"


@torch.no_grad()
def direct_logit_attribution(
    trace: FrozenTrace,
    by: Part = "component",
    *,
    paths: Iterable[Iterable[Sequence[int]]] | None = None,
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    center: bool = False,
    per_token: bool = False,
) -> Result:
    """What each part of the model adds to the logit of the target, straight through the frozen final norm.

    The logit is linear in the residual stream once the norm's scale is frozen, and the stream is a sum: components sum
    to the model's own logit, before a cap. What a head writes includes its value bias, as in TransformerLens'
    `logit_attrs`, which these agree with. The direction in the residual stream that makes each target's logit is taken
    back through W_O, so that nothing of size [T, V] or [H, T, d] is formed.

    Args:
        trace: a frozen run.
        by: "component": every head, the embedding ("embed"), what each layer adds besides its heads ("sources 0", ...:
            MLPs and biases), and the unembedding bias ("b_U"); "head" or "source": only those; "path": paths through
            heads, as path_logits has them: there value biases are no head's, and `()` has everything that is none.
        paths: with by="path", which; all of them (enumerate_paths) sum to the logit.
        targets: the token asked about: an integer, [B], or [B, T]; None: the next token.
        against: likewise; then it is logit(target) - logit(against) that is taken apart.
        positions: as in metrics.scoring.
        center: of the logit less the mean of all V, which changes no prediction. Without it the logit is as W_U has
            it, and a part that raises all logits alike counts; with `against` it makes no difference.
        per_token: each position's values instead of means.

    Returns:
        In logits: [L, H] by head; else [C] in the order of layers, or [P] in that of `paths`. With `per_token` followed
        by [B, T'], NaN where nothing is measured. The baseline is 0: these are parts, not runs.

    Raises:
        ValueError: an unknown part; paths missing or too many; a path that is none; targets or positions that do not
            fit.
        IndexError: a head, token or position that is out of range.

    Source: "The Path Expansion Trick", Elhage et al. 2021.
    """
    if by not in get_args(Part):
        raise ValueError(f"by is {by!r}, expected one of {', '.join(get_args(Part))}")
    if (paths is None) == (by == "path"):
        raise ValueError(f"paths is {'missing' if paths is None else 'given'}, but by is {by!r}")
    weights = trace.weights
    checked = [checked_path(weights, path) for path in paths or ()]
    metric: Literal["nll", "logit_difference"] = "nll" if against is None else "logit_difference"
    score = scoring(trace, metric, targets=targets, against=against, positions=positions)
    directions, bias = _toward_targets(trace, score, center)
    if by == "path":
        what: list[Label] = list(checked)
        values = _along_paths(trace, checked, directions, bias, score)
    else:
        what, values = _along(trace, weights.n_layers, directions[None], score)
        what, values = [*what, UNEMBED_BIAS], torch.cat((values[:, 0], bias[None]))
        if by != "component":
            kept = [i for i, label in enumerate(what) if isinstance(label, tuple) == (by == "head")]
            what, values = [what[i] for i in kept], values[kept]
    values = score.placed(values) if per_token else values.mean(-1)
    if by == "head":
        values = values.unflatten(0, (weights.n_layers, weights.n_heads))
    name = "logit" if against is None else "logit_difference"
    return Result(what, values, _nothing(score, values, per_token), name, setup={"by": by}, harm="size")


@torch.no_grad()
def logit_lens(trace: FrozenTrace, *, final_norm: FinalNorm = "recomputed", **how: "Unpack[Measuring]") -> Result:
    """How well the residual stream predicts before each layer: read by the final norm and W_U as if it were the end.

    Args:
        trace: a frozen run.
        final_norm: "recomputed": the norm's scale is that of the stream it is given, as the logit lens has it;
            "frozen": the clean run's, so that logits of the layers add up.
        how: what is measured and how, as in path_ablation.

    Returns:
        values [L + 1]: what is the layer that reads the stream, L standing for the end, which is the model itself.

    Raises:
        ValueError: an unknown final_norm or metric; targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend or precision that is not there.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    count = trace.weights.n_layers + 1

    def removed(part: FrozenTrace, sequences: slice, members: Sequence[int]) -> Tensor:
        return part.final - torch.stack([part.streams[layer] for layer in members])

    options = options_of(trace, final_norm, **how)
    measured = measure(trace, [Change(range(count), removed)], options)
    return measured.result(range(count), (count,), options.score, final_norm=final_norm)


@torch.no_grad()
def project(
    trace: FrozenTrace,
    direction: Tensor,
    *,
    layer: int | None = None,
    positions: Positions | None = None,
    per_token: bool = False,
) -> Result:
    """What each component adds to the residual stream along a feature direction: its dot product with it.

    Args:
        trace: a frozen run.
        direction: [d], or several [k, d], as they are: unit vectors make lengths.
        layer: of the stream that this layer reads, before its norm; None: at the end.
        positions: an integer, several, or a mask [T] or [B, T]; None: every real one.
        per_token: each position's values instead of means.

    Returns:
        [C], which sum to the stream's own dot product with the direction: heads with their value biases, "embed", and
        what each layer adds besides its heads, "sources 0", ...; for several directions [C, k], with (component, i) as
        what. With `per_token` followed by [B, T'], NaN where nothing is measured. The baseline is 0.

    Raises:
        TypeError: a direction that is no tensor of floating point numbers.
        ValueError: a direction of another size or device; positions that leave nothing.
        IndexError: no such layer or position.

    Source: "Virtual Weights and the Residual Stream as a Communication Channel", Elhage et al. 2021.
    """
    weights = trace.weights
    last = weights.n_layers if layer is None else layer
    if not 0 <= last <= weights.n_layers:
        raise IndexError(f"layer is {layer}, expected 0 to {weights.n_layers}")
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        kind = direction.dtype if isinstance(direction, Tensor) else type(direction).__name__
        raise TypeError(f"direction is {kind}, expected a tensor of floating point numbers")
    if direction.dim() not in (1, 2) or direction.shape[-1] != weights.d_model:
        d = weights.d_model
        raise ValueError(f"direction has shape {list(direction.shape)}, expected [{d}] or [k, {d}]")
    if direction.device != weights.device:
        raise ValueError(f"direction is on {direction.device}, but the weights are on {weights.device}")
    score = scoring(trace, "kl", positions=range(trace.tokens.shape[1]) if positions is None else positions)
    directions = direction.to(weights.compute_dtype).reshape(-1, 1, weights.d_model)
    what, values = _along(trace, last, directions, score)
    values = score.placed(values) if per_token else values.mean(-1)
    if direction.dim() == 1:
        values = values[:, 0]
    else:
        what = [(label, i) for label in what for i in range(len(direction))]
    setup = {"layer": str(last)}
    return Result(what, values, _nothing(score, values, per_token), "projection", setup=setup, harm="size")


def _along(trace: FrozenTrace, last: int, directions: Tensor, score: Scoring) -> tuple[list[Label], Tensor]:
    """Every component of what layer `last` reads, along directions [k, N or 1, d]: [C, k, N]."""
    weights = trace.weights
    labels: list[Label] = []
    parts: list[Tensor] = []

    def add(label: Label, stream: Tensor) -> None:
        labels.append(label)
        parts.append(torch.einsum("nd,knd->kn", score.rows(stream), directions)[None])

    add(EMBED, trace.embedded)
    for layer in range(last):
        through = torch.einsum("knd,hrd->hknr", directions, weights.heads("W_O", layer))
        z = score.rows(trace.post(trace.z(layer), layer))
        parts.append(torch.einsum("hnr,hknr->hkn", z, through))
        labels += [head_label(layer, head) for head in range(weights.n_heads)]
        add(source_label(layer), besides_heads(trace, layer))
    return labels, torch.cat(parts)


def _along_paths(trace: FrozenTrace, paths: list[Path], directions: Tensor, bias: Tensor, score: Scoring) -> Tensor:
    """What each path writes along directions [N, d], and the direct path's bias [N]: [P, N]."""
    weights = trace.weights
    values = directions.new_empty(len(paths), len(directions))
    at_once = max(1, BLOCK // (trace.tokens.numel() * weights.d_head * directions.element_size()))
    groups: dict[Any, list[int]] = {}
    for i, path in enumerate(paths):
        groups.setdefault(path[-1:], []).append(i)
    for end, members in groups.items():
        if not end:
            direct = score.rows(trace.sources_before(weights.n_layers))
            values[members] = (direct * directions).sum(-1) + bias
            continue
        through = directions @ weights.head("W_O", *end[0]).mT
        for some in torch.tensor(members).split(at_once):
            z = score.rows(path_values(trace, [paths[i] for i in some.tolist()]))
            values[some] = torch.einsum("pnr,nr->pn", z, through)
    return values


def _toward_targets(trace: FrozenTrace, score: Scoring, center: bool) -> tuple[Tensor, Tensor]:
    """The logit of each target is the final residual stream along [N, d], plus [N]."""
    weights, bias = trace.weights, trace.weights.unembed_bias
    tokens = score.tokens()
    bias = weights.W_E.new_zeros(weights.d_vocab, dtype=weights.compute_dtype) if bias is None else bias
    directions, added = unembed_columns(weights, tokens[:, 0]).mT, bias[tokens[:, 0]]
    if score.against is not None:
        directions, added = directions - unembed_columns(weights, tokens[:, 1]).mT, added - bias[tokens[:, 1]]
    elif center:
        mean = weights.W_U.mean(1, dtype=weights.compute_dtype)
        directions, added = directions - mean, added - bias.mean()
    if weights.ln_final_w is not None:
        directions = directions * weights.ln_final_w.to(directions.dtype)
    return centered(directions, weights) * score.rows(trace.scales[-1][..., None]), added


def _nothing(score: Scoring, values: Tensor, per_token: bool) -> Tensor:
    """Zero, at every position measured."""
    zeros = values.new_zeros(score.count)
    return score.placed(zeros) if per_token else values.new_zeros(())
