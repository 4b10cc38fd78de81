"""Direct attribution: the part of a logit, or of a feature direction, that each node writes; and the logit lens."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import Asked, LogitDifference, Metric, Positions, Tokens, asked, metric_spec
from pyfastcircuits.experiments.options import MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.model.norms import centered
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import Unembedding
from pyfastcircuits.run.nodes import Head, HeadOutputs, Path, grouped, nodes_before, parse_path, written
from pyfastcircuits.run.paths import path_z
from pyfastcircuits.run.trace import FrozenTrace

Part = Literal["component", "head", "source", "path"]
UNEMBED_BIAS = "b_U"


@public
@torch.no_grad()
def direct_logit_attribution(
    trace: FrozenTrace,
    by: Part = "component",
    *,
    paths: Iterable[Iterable[Sequence[int]]] | None = None,
    metric: Metric | Literal["logit"] | None = None,
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    center: bool = False,
    per_token: bool = False,
) -> Result:
    """Split the target's logit among the parts of the model that write it, straight through the frozen final norm.

    The logit is linear in the residual stream once the norm's scale is frozen, and the stream is a sum: components sum
    to the model's own logit, before a cap. What a head writes includes its value bias, as in TransformerLens'
    `logit_attrs`, which these agree with. The direction in the residual stream that makes each target's logit is taken
    back through W_O, so that nothing of size [T, V] or [H, T, d] is formed.

    Args:
        trace: a frozen run.
        by: "component": every head, the embedding ("embed"), each layer's MLP (("mlp", 0), ...) and the bias of its
            heads (("bias", 0), ...), and the unembedding bias ("b_U"); "head": heads alone; "source": all else;
            "path": paths through heads, as path_logits has them: there value biases are no head's, and `()` has
            everything that is none.
        paths: with by="path", which; all of them (enumerate_paths) sum to the logit.
        metric: what is taken apart: "logit" of the target; "logit_difference", logit(target) - logit(against), or an
            object, `fc.LogitDifference(targets, against)`. None: the logit difference where `against` is given. Other
            metrics are not linear in the residual stream.
        targets: the token asked about: an integer, [B], or [B, T]; None: the next token.
        against: likewise, the second token of a logit difference.
        positions: as in metrics.asked.
        center: of the logit less the mean of all V, which changes no prediction. Without it the logit is as W_U has
            it, and a part that raises all logits alike counts; with `against` it makes no difference.
        per_token: each position's values instead of means.

    Returns:
        In logits: [L, H] by head; else [C] in the order of layers, or [P] in that of `paths`. With `per_token` followed
        by [B, T'], NaN where nothing is measured. The baseline is 0: these are parts, not runs.

    Raises:
        ValueError: an unknown part; paths missing or too many; a path that is none; a metric that is not linear;
            `against` missing or too much; targets or positions that do not fit.
        IndexError: a head, token or position that is out of range.

    Source: "The Path Expansion Trick", Elhage et al. 2021.
    """
    if (paths is None) == (by == "path"):
        raise ValueError(f"paths is {'missing' if paths is None else 'given'}, but by is {by!r}")
    weights = trace.weights
    checked = [parse_path(weights, path) for path in paths or ()]
    targets, against = _tokens_of(metric, targets, against)
    where = asked(trace, positions, targets=targets, against=against)
    directions, bias = toward_targets(trace, where, center)
    if by == "path":
        labels: list[Label] = list(checked)
        values = _along_paths(trace, checked, directions, bias, where)
    else:
        labels, values = _along(trace, weights.n_layers, directions[None], where)
        labels, values = [*labels, UNEMBED_BIAS], torch.cat((values[:, 0], bias[None]))
        if by != "component":
            heads = {Head(layer, head).label for layer in range(weights.n_layers) for head in range(weights.n_heads)}
            kept = [i for i, label in enumerate(labels) if (label in heads) == (by == "head")]
            labels, values = [labels[i] for i in kept], values[kept]
    if by == "head":
        values = values.unflatten(0, (weights.n_layers, weights.n_heads))
    name = "logit" if against is None else "logit_difference"
    return _parts(labels, values, where, per_token, name, by=by)


@public
@measured
@torch.no_grad()
def logit_lens(trace: FrozenTrace, **options: "Unpack[MeasureOptions]") -> Result:
    """Read the residual stream before each layer by the final norm and W_U, as if it were the end, and measure it.

    Args:
        trace: a frozen run. The final norm's scale is that of the stream it is given, as the logit lens has it, unless
            final_norm is "frozen", which makes the logits of the layers add up.

    Returns:
        values [L + 1]: a label is the layer that reads the stream, L standing for the end, which is the model itself.

    Raises:
        ValueError: an unknown final_norm or metric; targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend or precision that is not there.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    labels, how = range(trace.weights.n_layers + 1), measurement(trace, options, "recomputed")

    def written_from(part: FrozenTrace, layers: Sequence[int]) -> Tensor:
        return part.final - torch.stack([part.streams[layer] for layer in layers])

    lens = Intervention(places=labels, items=labels, remove=written_from)  # what is left is the stream there
    return measure(trace, [lens], how, labels, final_norm=how.final_norm)


@public
@torch.no_grad()
def project(
    trace: FrozenTrace,
    direction: Tensor,
    *,
    layer: int | None = None,
    positions: Positions | None = None,
    per_token: bool = False,
) -> Result:
    """Project each component's write to the residual stream onto a feature direction: their dot product.

    Args:
        trace: a frozen run.
        direction: [d], or several [k, d], as they are: unit vectors make lengths.
        layer: of the stream that this layer reads, before its norm; None: at the end.
        positions: an integer, several, or a mask [T] or [B, T]; None: every real one.
        per_token: each position's values instead of means.

    Returns:
        [C], which sum to the stream's own dot product with the direction: "embed", heads with their value biases, MLPs
        and the biases of heads, as direct_logit_attribution has them; for several directions [C, k], with (component,
        i) as label. With `per_token` followed by [B, T'], NaN where nothing is measured. The baseline is 0.

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
    where = asked(trace, range(trace.tokens.shape[1]) if positions is None else positions, of_tokens=False)
    directions = direction.to(weights.compute_dtype).reshape(-1, 1, weights.d_model)
    labels, values = _along(trace, last, directions, where)
    if direction.dim() == 1:
        values = values[:, 0]
    else:
        labels = [(label, i) for label in labels for i in range(len(direction))]
    return _parts(labels, values, where, per_token, "projection", layer=last)


def _along(trace: FrozenTrace, last: int, directions: Tensor, where: Asked) -> tuple[list[Label], Tensor]:
    """The writes of every node before layer `last` reads, along directions [k, N or 1, d]: [C, k, N]."""
    nodes = list(nodes_before(trace, last))
    parts: list[Tensor] = []
    for node in nodes:
        if not isinstance(node, Head):
            parts.append(torch.einsum("nd,knd->kn", where.rows(written(trace, node)), directions)[None])
        elif node.head == 0:  # the heads of a layer together: directions go back through W_O, and no [H, T, d] is made
            through = torch.einsum("knd,hrd->hknr", directions, trace.weights.heads("W_O", node.layer))
            z = where.rows(trace.apply_post_norm(HeadOutputs(node.layer)(trace), node.layer))
            parts.append(torch.einsum("hnr,hknr->hkn", z, through))
    return [node.label for node in nodes], torch.cat(parts)


def _along_paths(trace: FrozenTrace, paths: list[Path], directions: Tensor, bias: Tensor, where: Asked) -> Tensor:
    """The writes of each path along directions [N, d], with the direct path's bias [N]: [P, N]."""
    weights = trace.weights
    values = directions.new_empty(len(paths), len(directions))
    bytes_a_path = trace.tokens.numel() * weights.d_value * directions.element_size()
    at_once = max(1, memory.block_bytes(trace.tokens.device) // bytes_a_path)
    for end, members in grouped(path[-1:] for path in paths).items():
        if not end:
            direct = where.rows(trace.non_head_stream(weights.n_layers))
            values[members] = (direct * directions).sum(-1) + bias
            continue
        through = directions @ weights.head("W_O", *end[0]).mT
        for some in torch.tensor(members).split(at_once):
            z = where.rows(path_z(trace, [paths[i] for i in some.tolist()]))
            values[some] = torch.einsum("pnr,nr->pn", z, through)
    return values


def _tokens_of(metric: Metric | Literal["logit"] | None, targets: Tokens, against: Tokens) -> tuple[Tokens, Tokens]:
    """The token whose logit is taken apart, and the one that it is compared with, if any.

    Raises:
        ValueError: a metric that is not linear; else as metric_spec.
    """
    if metric is None:
        return targets, against
    if metric == "logit":
        if against is not None:
            raise ValueError("against is given, but metric is 'logit': a logit difference needs it, nothing else does")
        return targets, None
    if metric != LogitDifference.name and not isinstance(metric, LogitDifference):
        name = repr(metric) if isinstance(metric, str) else f"{type(metric).__name__}(...)"
        raise ValueError(
            f"metric is {name}, which is not linear in the residual stream and so no sum of parts: expected 'logit' or "
            "'logit_difference'"
        )
    spec = metric_spec(metric, targets, against)
    return spec.targets, spec.against


def toward_targets(trace: FrozenTrace, where: Asked, center: bool) -> tuple[Tensor, Tensor]:
    """Each target's logit as a function of the final residual stream: its product with [N, d], plus [N]."""
    weights, unembedding, tokens = trace.weights, Unembedding(trace.weights), where.tokens()
    bias = trace.embedded.new_zeros(weights.d_vocab_out) if unembedding.bias is None else unembedding.bias
    shares = where.shares().to(weights.compute_dtype)
    directions = trace.embedded.new_zeros(len(tokens), weights.d_model)
    for some, share in zip(tokens.unbind(-1), shares.unbind(-1), strict=True):
        directions = directions + share[:, None] * unembedding.columns(some).mT
    added = (shares * bias[tokens]).sum(-1)
    if where.against is None and center:
        directions = directions - weights.W_U.mean(1, dtype=weights.compute_dtype)
        added = added - bias.mean()
    if trace.final_shift is not None:
        added = added + (where.rows(trace.final_shift) * directions).sum(-1)
    if weights.ln_final_w is not None:
        directions = directions * weights.ln_final_w.to(directions.dtype)
    return centered(directions, weights) * where.rows(trace.scales[-1][..., None]), added


def _parts(
    labels: list[Label], values: Tensor, where: Asked, per_token: bool, metric: str, **setup: str | int | float
) -> Result:
    """The result of parts of a sum, [..., N] at the positions measured; the baseline is zero at each."""
    baseline = values.new_zeros(where.count)
    values, baseline = (where.placed(x) if per_token else x.mean(-1) for x in (values, baseline))
    return Result(labels, values, baseline, metric, setup=setup, harm="size")
