"""Term importance: a metric of the model that has only the paths of some orders, or of some layers' heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public, takes_sharded
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.learning import asked_losses
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import NLL, Metric, Positions
from pyfastcircuits.experiments.options import Measurement, measurement
from pyfastcircuits.ops import Backend
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.paths import order_streams
from pyfastcircuits.run.trace import FrozenTrace

# Elhage et al. 2021, "Term importance analysis", two layers: fall of the loss in nats.
ARTICLE_ORDERS = (1.8, 5.2, 0.3)
ARTICLE_MARGINALS = ((1.3, 0.05), (5.2, 4.0))


@public
@takes_sharded
def order_losses(
    trace: FrozenTrace,
    max_order: int | None = None,
    *,
    metric: Metric = "nll",
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Loss with all paths of order at most k, k = 0..max_order: [K + 1], or [K + 1, B, T'] with `per_token`.

    Held at the clean run's: attention patterns, norm scales (the final one included), and what MLPs write, which
    belongs to order 0 whatever the MLPs read. A logit cap is applied after the sum. Equal to the article's algorithm
    ("Term importance analysis"), which reruns the model once for each order with the others' outputs zeroed.

    Args:
        trace: a frozen run.
        max_order: K, at most the number of layers, which is the default; there the loss is the clean one.
        metric, targets, against, positions: as in head_ablation. Another metric stands in the place of the loss.
        per_token: each position's value instead of the mean, NaN where nothing is measured.
        backend: of the kernels.
        progress: called with the number of losses finished since the last call, times the share of the positions.

    Returns:
        Nats, or the metric's unit, in the computing dtype. Losses are differentiable (see `trace`), other metrics are
        constants.

    Raises:
        ValueError: max_order outside [0, L]; targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend that is not there.
    """
    layers = trace.weights.n_layers
    order = layers if max_order is None else max_order
    if not 0 <= order <= layers:
        raise ValueError(f"max_order is {max_order}, expected 0 to {layers} (the number of layers)")
    options = {
        "metric": metric, "targets": targets, "against": against, "positions": positions, "per_token": per_token,
        "backend": backend, "progress": progress,
    }  # fmt: skip
    return _of_streams(trace, order + 1, lambda part: order_streams(part, order).cumsum(0), measurement(trace, options))


class LayerMarginals(NamedTuple):
    """How much better the metric is with each layer's single-head paths: [L], or [L, B, T'] each.

    Better is the fall of a loss, divergence or rank, and the rise of another metric.
    """

    given_direct: Tensor  # added to the direct path alone
    given_rest: Tensor  # added to the direct path and the single-head paths of all other layers

    @public
    def plot(self) -> Any:
        """Draw both over the layers; of `per_token`, means over positions.

        Raises:
            ValueError: the model has no layers.
            ImportError: matplotlib is missing.
        """
        from pyfastcircuits.drawing.marks import curve

        if not len(self[0]):
            raise ValueError("given_direct is empty: the model has no layers")
        series = dict(zip(("given the direct path alone", "given all other layers too"), self._means(), strict=True))
        title = "Marginal effect of each layer's single-head paths"
        return curve(range(len(self[0])), series, title=title, x="layer", y="gain in the metric", zero=True)

    def _means(self) -> list[Tensor]:
        return [(x if x.dim() == 1 else x.flatten(1).nanmean(-1)).detach().double() for x in self]

    def _repr_html_(self) -> str:
        """Both, layer by layer, as a table with a picture."""
        from pyfastcircuits.drawing.notebook import card

        means = zip(*(x.tolist() for x in self._means()), strict=True)
        rows = [(str(i), f"{a:.4g}", f"{b:.4g}") for i, (a, b) in enumerate(means)]
        names = ("layer", "given the direct path alone", "given all other layers too")
        return card("Marginal effect of each layer's single-head paths", names, rows, self.plot)


@public
@takes_sharded
@torch.no_grad()
def layer_marginals(
    trace: FrozenTrace,
    *,
    metric: Metric = "nll",
    targets: Tensor | int | None = None,
    against: Tensor | int | None = None,
    positions: Positions | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> LayerMarginals:
    """The article's marginal effects of each layer's heads as order-1 terms ("Term importance analysis").

    Arguments and errors are those of order_losses; there are 2 L + 2 losses.
    """
    layers = trace.weights.n_layers

    def streams(part: FrozenTrace) -> Tensor:
        direct = part.non_head_stream(layers)
        single = [part.attend(part.non_head_stream(layer), layer) for layer in range(layers)]
        whole = sum(single, direct)
        return torch.stack([direct, whole, *(direct + s for s in single), *(whole - s for s in single)])

    options = {
        "metric": metric, "targets": targets, "against": against, "positions": positions, "per_token": per_token,
        "backend": backend, "progress": progress,
    }  # fmt: skip
    how = measurement(trace, options)
    values = _of_streams(trace, 2 * layers + 2, streams, how)
    direct, whole, added, left = values.split([1, 1, layers, layers])
    if how.metrics[0].harm == "fall":
        return LayerMarginals(added - direct, whole - left)
    return LayerMarginals(direct - added, left - whole)


def _of_streams(trace: FrozenTrace, count: int, streams: Callable[[FrozenTrace], Tensor], how: Measurement) -> Tensor:
    """The metric of each of the `count` final streams that `streams` makes of a part of the run: [K], or [K, B, T'].

    Parts of the sequences keep these streams, and the heads' outputs beside them, near two blocks.
    """
    sequences, length = trace.tokens.shape
    width = count * trace.weights.d_model
    if not isinstance(how.metrics[0], NLL):
        instead = Intervention(
            places=range(count),
            items=range(count),
            remove=lambda part, members: part.final - streams(part)[list(members)],
            extra_floats_per_position=width,
        )
        return measure(trace, [instead], how, range(count)).values
    row = trace.weights.compute_dtype.itemsize * trace.weights.d_model
    step = max(1, 2 * memory.block_bytes(trace.tokens.device) // (row * length * (count + 2)))
    found = []
    for some in slices(sequences, step):
        part, asked = trace[some], how.asked[some]
        losses = asked_losses(part, asked, how, asked.rows(streams(part)))
        found.append(asked.placed(losses) if how.per_token else losses)
        if how.progress is not None:
            how.progress(count * asked.count / how.asked.count)
    return torch.cat(found, 1) if how.per_token else torch.cat(found, 1).mean(-1)
