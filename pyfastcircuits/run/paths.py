"""Path expansion: the model as a sum of paths through its attention heads (Elhage et al. 2021, "Path Expansion")."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyfastcircuits.experiments.measure import BLOCK, stream_losses
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, library
from pyfastcircuits.run.forward import centered
from pyfastcircuits.run.patterns import mixed, of_head
from pyfastcircuits.run.trace import FrozenTrace

__all__ = [
    "LayerMarginals",
    "Path",
    "checked_pairs",
    "checked_path",
    "count_paths",
    "enumerate_paths",
    "layer_marginals",
    "order_losses",
    "order_streams",
    "path_logits",
    "path_values",
]

Path = tuple[tuple[int, int], ...]
Key = TypeVar("Key", bound=Hashable)


def count_paths(n_layers: int, n_heads: int) -> list[int]:
    """Number of paths of each order 0..n_layers: C(n_layers, order) * n_heads**order."""
    counts: list[int] = library.host.count_paths(n_layers, n_heads)
    return counts


def enumerate_paths(n_layers: int, n_heads: int, order: int) -> list[Path]:
    """Every path through `order` heads, each a tuple of (layer, head) with increasing layers, sorted."""
    return [tuple(path) for path in library.host.enumerate_paths(n_layers, n_heads, order)]


def checked_path(weights: CircuitWeights, path: Iterable[Sequence[int]]) -> Path:
    """The path as a tuple of pairs of ints.

    Raises:
        ValueError: something else than (layer, head) pairs, or layers that do not increase.
        IndexError: a layer or head that the model does not have.
    """
    try:
        out = tuple((int(layer), int(head)) for layer, head in path)
    except (TypeError, ValueError):
        raise ValueError(f"path is {path!r}, expected a tuple of (layer, head)") from None
    for layer, head in out:
        if not (0 <= layer < weights.n_layers and 0 <= head < weights.n_heads):
            raise IndexError(
                f"path {out} goes through head {layer}.{head}; the model has layers 0 to {weights.n_layers - 1} "
                f"and heads 0 to {weights.n_heads - 1}"
            )
    if any(a[0] >= b[0] for a, b in pairwise(out)):
        raise ValueError(f"path {out}: layers must increase from one head to the next")
    return out


def checked_pairs(weights: CircuitWeights, pairs: Iterable[Sequence[Sequence[int]]] | None) -> list[Path]:
    """Pairs of heads (source, destination) in two layers; None: all there are, sorted. Errors as checked_path."""
    if pairs is None:
        return enumerate_paths(weights.n_layers, weights.n_heads, 2)
    chosen = [checked_path(weights, pair) for pair in pairs]
    for pair in chosen:
        if len(pair) != 2:
            raise ValueError(f"pairs holds {pair}, expected (source, destination), a (layer, head) each")
    return chosen


def path_values(trace: FrozenTrace, paths: Sequence[Path]) -> Tensor:
    """What the last head of each path has mixed before its W_O, along that path alone: [P, B, T, r].

    The path writes `path_values @ W_O` of its last head to the residual stream (the scale of a norm after the heads is
    in them). Paths must not be empty.
    """
    weights = trace.weights
    out = trace.embedded.new_empty(len(paths), *trace.tokens.shape, weights.d_head)
    for (layer, head), members in _grouped(paths, lambda path: path[-1]):
        W_V = weights.head("W_V", layer, head)
        values = out.new_empty(len(members), *out.shape[1:])
        for before, inner in _grouped([paths[i][:-1] for i in members], lambda path: path[-1:]):
            if before:
                carried = torch.stack([_prefix_values(trace, paths[members[i]][:-1]) for i in inner])
                passed = centered(weights.head("W_O", *before[0]), weights) @ W_V
                values[inner] = (carried @ passed) * trace.scales[layer][..., None]
            else:
                values[inner] = trace.normed(trace.sources_before(layer), layer) @ W_V
        out[members] = trace.post(mixed(of_head(trace.patterns[layer], head), values[:, :, None])[:, :, 0], layer)
    return out


def _prefix_values(trace: FrozenTrace, path: Path) -> Tensor:
    """path_values of one path [B, T, r], kept on the trace for the paths that go on from it, up to a BLOCK in all."""
    values = trace.prefix_values.get(path)
    if values is None:
        values = path_values(trace, [path])[0]
        if not values.requires_grad and (len(trace.prefix_values) + 1) * values.nbytes <= BLOCK:
            trace.prefix_values[path] = values
    return values


def _grouped(items: Sequence[Path], key: Callable[[Path], Key]) -> Iterator[tuple[Key, list[int]]]:
    groups: dict[Key, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(key(item), []).append(i)
    return iter(groups.items())


def path_logits(trace: FrozenTrace, path: Iterable[Sequence[int]]) -> Tensor:
    """What one path adds to the logits, [B, T, V]: materialised on purpose; differentiable (see `trace`).

    `()` is the direct path: embedding, biases, MLP outputs (frozen: they are sources, not functions of what they read)
    and the unembedding bias. The paths of all orders sum to the logits, before a logit cap.

    Raises:
        ValueError, IndexError: see checked_path.
    """
    path = checked_path(trace.weights, path)
    weights = trace.weights
    if not path:
        return trace.unembed(trace.sources_before(weights.n_layers))
    written = path_values(trace, [path])[0] @ weights.head("W_O", *path[-1])
    return trace.normed(written, weights.n_layers) @ weights.W_U.to(weights.compute_dtype)


def order_streams(trace: FrozenTrace, max_order: int) -> Tensor:
    """What all paths of exactly k heads write to the final residual stream, [max_order + 1, B, T, d].

    The graded recursion: each layer raises the order of what it reads by one, so one pass with max_order + 1 streams
    stands for the (1 + H)^L paths.
    """
    streams = [trace.embedded]
    for layer in range(trace.weights.n_layers):
        raised = min(layer + 1, max_order)
        written = trace.attend(torch.stack(streams[:raised]), layer) if raised else ()
        streams[0] = streams[0] + trace.sources[layer]
        grown = [stream + add for stream, add in zip(streams[1:], written, strict=False)]
        streams[1:] = [*grown, *written[len(grown) :]]
    return torch.stack(streams)


def order_losses(
    trace: FrozenTrace, max_order: int | None = None, *, per_token: bool = False, backend: Backend = "auto"
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

    Returns:
        Nats, in the computing dtype; differentiable (see `trace`).

    Raises:
        ValueError: max_order outside [0, L].
    """
    layers = trace.weights.n_layers
    order = layers if max_order is None else max_order
    if not 0 <= order <= layers:
        raise ValueError(f"max_order is {max_order}, expected 0 to {layers} (the number of layers)")
    losses = _in_parts(trace, order + 1, lambda part: order_streams(part, order).cumsum(0), backend)
    return losses if per_token else trace.mean(losses)


class LayerMarginals(NamedTuple):
    """Fall of the loss, in nats, that each layer's single-head paths bring: [L] each."""

    given_direct: Tensor  # added to the direct path alone
    given_rest: Tensor  # added to the direct path and the single-head paths of all other layers


@torch.no_grad()
def layer_marginals(trace: FrozenTrace, *, backend: Backend = "auto") -> LayerMarginals:
    """The article's marginal effects of each layer's heads as order-1 terms ("Term importance analysis")."""
    layers = trace.weights.n_layers

    def streams(part: FrozenTrace) -> Tensor:
        direct = part.sources_before(layers)
        single = [part.attend(part.sources_before(layer), layer) for layer in range(layers)]
        whole = sum(single, direct)
        return torch.stack([direct, whole, *(direct + s for s in single), *(whole - s for s in single)])

    losses = trace.mean(_in_parts(trace, 2 * layers + 2, streams, backend))
    direct, whole, added, left = losses.split([1, 1, layers, layers])
    return LayerMarginals(direct - added, left - whole)


def _in_parts(trace: FrozenTrace, count: int, streams: Callable[[FrozenTrace], Tensor], backend: Backend) -> Tensor:
    """stream_losses of `streams(part)` over parts of the sequences that keep count + heads streams near two BLOCKs."""
    sequences, length = trace.tokens.shape
    row = trace.weights.compute_dtype.itemsize * trace.weights.d_model
    step = max(1, 2 * BLOCK // (row * length * (count + 2)))
    parts = (trace[first : first + step] for first in range(0, sequences, step))
    return torch.cat([stream_losses(part, streams(part), backend) for part in parts], 1)
