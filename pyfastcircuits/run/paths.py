"""Path expansion: the model as a sum of paths through its attention heads (Elhage et al. 2021, "Path Expansion")."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.model.norms import centered
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.run import memory
from pyfastcircuits.run.nodes import Head, Path, grouped, parse_path, span
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

MOST_LAYERS = 10_000  # whose paths are counted: the numbers have tens of thousands of digits


@public
def count_paths(n_layers: int, n_heads: int) -> list[int]:
    """The number of paths of each order 0..n_layers: C(n_layers, order) * n_heads**order.

    Raises:
        ValueError: a negative number, or more than MOST_LAYERS layers.
    """
    if not (0 <= n_layers <= MOST_LAYERS and n_heads >= 0):
        raise ValueError(f"n_layers is {n_layers} and n_heads {n_heads}, expected 0 to {MOST_LAYERS} layers")
    return [comb(n_layers, order) * n_heads**order for order in range(n_layers + 1)]


@public
def enumerate_paths(n_layers: int, n_heads: int, order: int) -> list[Path]:
    """Every path through `order` heads, each a tuple of (layer, head) with increasing layers, sorted.

    Raises:
        ValueError: a negative number.
    """
    if min(n_layers, n_heads, order) < 0:
        raise ValueError(f"n_layers is {n_layers}, n_heads {n_heads}, order {order}: expected no negative numbers")
    heads = [[Head(layer, head) for head in range(n_heads)] for layer in range(n_layers)]
    return sorted(path for layers in combinations(heads, order) for path in product(*layers))


@dataclass(frozen=True)
class PathOutputs:
    """`path_z` of some paths, as outputs that an ablation replaces."""

    paths: tuple[Path, ...]

    def __call__(self, run: FrozenTrace) -> Tensor:
        """[P, B, T, r]."""
        return path_z(run, self.paths)


def path_z(trace: FrozenTrace, paths: Sequence[Path]) -> Tensor:
    """The values that the last head of each path has mixed, along that path alone, before its W_O: [P, B, T, r].

    The path writes `path_z @ W_O` of its last head to the residual stream (the scale of a norm after the heads is in
    it). Paths must not be empty.
    """
    weights = trace.weights
    out = trace.embedded.new_empty(len(paths), *trace.tokens.shape, weights.d_value)
    for (layer, head), members in grouped(path[-1] for path in paths).items():
        W_V = weights.head("W_V", layer, head)
        values = out.new_empty(len(members), *out.shape[1:])
        for before, inner in grouped(tuple(source for source, _ in paths[i][-2:-1]) for i in members).items():
            if before:  # the sources in a layer together
                prefixes = [paths[members[i]][:-1] for i in inner]
                carried = torch.stack([_prefix_z(trace, prefix) for prefix in prefixes])
                W_O = _written_by(weights, [prefix[-1] for prefix in prefixes])
                virtual_weights = centered(W_O, weights) @ W_V
                values[span(inner)] = (carried @ virtual_weights[:, None]) * trace.value_scale(layer)[..., None]
            else:
                values[span(inner)] = trace.read_by_values(trace.non_head_stream(layer), layer) @ W_V
        z = apply_pattern(head_pattern(trace.patterns[layer], head), values[:, :, None])[:, :, 0]
        out[span(members)] = trace.apply_post_norm(z, layer)
    return out


def _written_by(weights: CircuitWeights, heads: Sequence[Sequence[int]]) -> Tensor:
    """W_O of some heads of one layer, [n, r, d]: of fewer than it has, no more than theirs is read."""
    if len(heads) < weights.n_heads:
        return torch.stack([weights.head("W_O", layer, head) for layer, head in heads])
    return weights.heads("W_O", heads[0][0])[span([head for _, head in heads])]


def _prefix_z(trace: FrozenTrace, path: Path) -> Tensor:
    """path_z of one path [B, T, r]; the trace keeps it for paths that go on from there, up to a block in all."""
    z = trace.prefix_z.get(path)
    if z is None:
        z = path_z(trace, [path])[0]
        if not z.requires_grad and (len(trace.prefix_z) + 1) * z.nbytes <= memory.block_bytes(z.device):
            trace.prefix_z[path] = z
    return z


@public
def path_logits(trace: FrozenTrace, path: Iterable[Sequence[int]]) -> Tensor:
    """The logits that one path adds, [B, T, V]: materialised on purpose; differentiable (see `trace`).

    `()` is the direct path: embedding, biases, MLP outputs (frozen: they are sources, not functions of what they read)
    and the unembedding bias. The paths of all orders sum to the logits, before a logit cap.

    Raises:
        ValueError, IndexError: see nodes.parse_path.
    """
    path = parse_path(trace.weights, path)
    weights = trace.weights
    if not path:
        return trace.unembed(trace.non_head_stream(weights.n_layers))
    written = path_z(trace, [path])[0] @ weights.head("W_O", *path[-1])
    return trace.normed(written, weights.n_layers) @ weights.W_U.to(weights.compute_dtype)


def order_streams(trace: FrozenTrace, max_order: int) -> Tensor:
    """The sum of what all paths of exactly k heads write to the final residual stream, [max_order + 1, B, T, d].

    The graded recursion: each layer raises the order of what it reads by one, so one pass with max_order + 1 streams
    stands for the (1 + H)^L paths.
    """
    streams = [trace.embedded]
    for layer in range(trace.weights.n_layers):
        raised = min(layer + 1, max_order)
        written = trace.attend(torch.stack(streams[:raised]), layer) if raised else ()
        streams[0] = streams[0] + trace.non_head_writes[layer]
        grown = [stream + add for stream, add in zip(streams[1:], written, strict=False)]
        streams[1:] = [*grown, *written[len(grown) :]]
    return torch.stack(streams)


@public
def order_losses(
    trace: FrozenTrace,
    max_order: int | None = None,
    *,
    per_token: bool = False,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Loss with all paths of order at most k, k = 0..max_order: [K + 1], or [K + 1, B, T-1] with `per_token`.

    Held at the clean run's: attention patterns, norm scales (the final one included), and what MLPs write, which
    belongs to order 0 whatever the MLPs read. A logit cap is applied after the sum. Equal to the article's algorithm
    ("Term importance analysis"), which reruns the model once for each order with the others' outputs zeroed.

    Args:
        trace: a frozen run.
        max_order: K, at most the number of layers, which is the default; there the loss is the clean one.
        per_token: each predicting position's value instead of the mean.
        backend: of the sweep_nll kernel.
        progress: called with the number of losses finished since the last call, times the share of the sequences.

    Returns:
        Nats, in the computing dtype; differentiable (see `trace`).

    Raises:
        ValueError: max_order outside [0, L].
    """
    trace.guard.check_values()
    layers = trace.weights.n_layers
    order = layers if max_order is None else max_order
    if not 0 <= order <= layers:
        raise ValueError(f"max_order is {max_order}, expected 0 to {layers} (the number of layers)")
    losses = _in_parts(trace, order + 1, lambda part: order_streams(part, order).cumsum(0), backend, progress)
    return losses if per_token else trace.mean(losses)


class LayerMarginals(NamedTuple):
    """Fall of the loss, in nats, that each layer's single-head paths bring: [L] each."""

    given_direct: Tensor  # added to the direct path alone
    given_rest: Tensor  # added to the direct path and the single-head paths of all other layers


@public
@torch.no_grad()
def layer_marginals(
    trace: FrozenTrace, *, backend: Backend = "auto", progress: Callable[[float], None] | None = None
) -> LayerMarginals:
    """The article's marginal effects of each layer's heads as order-1 terms ("Term importance analysis").

    `backend` and `progress` are as in order_losses; there are 2 L + 2 losses.
    """
    layers = trace.weights.n_layers

    def streams(part: FrozenTrace) -> Tensor:
        direct = part.non_head_stream(layers)
        single = [part.attend(part.non_head_stream(layer), layer) for layer in range(layers)]
        whole = sum(single, direct)
        return torch.stack([direct, whole, *(direct + s for s in single), *(whole - s for s in single)])

    losses = trace.mean(_in_parts(trace, 2 * layers + 2, streams, backend, progress))
    direct, whole, added, left = losses.split([1, 1, layers, layers])
    return LayerMarginals(direct - added, left - whole)


def _in_parts(
    trace: FrozenTrace,
    count: int,
    streams: Callable[[FrozenTrace], Tensor],
    backend: Backend,
    progress: Callable[[float], None] | None,
) -> Tensor:
    """Losses of the `count` final streams that `streams` makes of a part of the run [K, B, T-1].

    Parts of the sequences keep these streams, and the heads' outputs beside them, near two blocks.
    """
    sequences, length = trace.tokens.shape
    row = trace.weights.compute_dtype.itemsize * trace.weights.d_model
    step = max(1, 2 * memory.block_bytes(trace.tokens.device) // (row * length * (count + 2)))
    losses = []
    for first in range(0, sequences, step):
        part = trace[first : first + step]
        losses.append(part.stream_losses(streams(part), backend))
        if progress is not None:
            progress(count * len(part.tokens) / sequences)
    return torch.cat(losses, 1)
