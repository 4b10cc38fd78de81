"""Path expansion: the model as a sum of paths through its attention heads (Elhage et al. 2021, "Path Expansion")."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.model.norms import centered
from pyfastcircuits.model.weights import CircuitWeights
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
                values[span(inner)] = _non_head_read(trace, layer) @ W_V
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


def _non_head_read(trace: FrozenTrace, layer: int) -> Tensor:
    """What a layer's values read of everything that is no head [B, T, d]; kept until another layer is asked about."""
    read = trace.non_head_reads.get(layer)
    if read is None:
        read = trace.read_by_values(trace.non_head_stream(layer), layer)
        if not read.requires_grad:
            trace.non_head_reads.clear()
            trace.non_head_reads[layer] = read
    return read


@public
def path_logits(trace: FrozenTrace, path: Iterable[Sequence[int]]) -> Tensor:
    """The logits that one path adds, [B, T, V']: materialised on purpose; differentiable (see `trace`).

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
