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
    shared = weights.n_heads // weights.W_V.shape[1]
    for (layer, kv), members in grouped((path[-1].layer, path[-1].head // shared) for path in paths).items():
        prefixes = grouped(paths[i][:-1] for i in members)  # query heads share the values of what they read
        values = _values(trace, layer, weights.head("W_V", layer, kv * shared), list(prefixes))
        place = {members[i]: value for value, some in enumerate(prefixes.values()) for i in some}
        for head, mine in grouped(paths[i][-1].head for i in members).items():
            places = [members[i] for i in mine]
            mixed = values[span([place[i] for i in places])]
            z = apply_pattern(head_pattern(trace.patterns[layer], head), mixed[:, :, None])[:, :, 0]
            out[span(places)] = trace.apply_post_norm(z, layer)
    return out


def _values(trace: FrozenTrace, layer: int, W_V: Tensor, prefixes: Sequence[Path]) -> Tensor:
    """The values [n, B, T, r] that W_V of a layer makes of what each prefix carries; () carries the non-head stream."""
    weights = trace.weights
    out = trace.embedded.new_empty(len(prefixes), *trace.tokens.shape, weights.d_value)
    for before, members in grouped(prefix[-1].layer if prefix else None for prefix in prefixes).items():
        if before is None:
            out[members] = _non_head_read(trace, layer) @ W_V
        else:  # the sources in a layer together
            some = [prefixes[i] for i in members]
            W_O = _written_by(weights, [prefix[-1] for prefix in some])
            virtual_weights = centered(W_O, weights) @ W_V
            carried = _prefix_z(trace, some) @ virtual_weights[:, None]
            out[span(members)] = carried * trace.value_scale(layer)[..., None]
    return out


def _written_by(weights: CircuitWeights, heads: Sequence[Sequence[int]]) -> Tensor:
    """W_O of some heads of one layer, [n, r, d]: of fewer than it has, no more than theirs is read."""
    if len(heads) < weights.n_heads:
        return torch.stack([weights.head("W_O", layer, head) for layer, head in heads])
    return weights.heads("W_O", heads[0][0])[span([head for _, head in heads])]


def _prefix_z(trace: FrozenTrace, paths: Sequence[Path]) -> Tensor:
    """path_z of some paths, which the trace keeps for those that go on from there, up to a block in all."""
    kept = trace.prefix_z
    if missing := list(dict.fromkeys(path for path in paths if path not in kept)):
        made = path_z(trace, missing)
        found = dict(zip(missing, made, strict=True))
        if not made.requires_grad:
            room = memory.block_bytes(made.device) // max(made[0].nbytes, 1) - len(kept)
            kept.update((path, found[path].clone()) for path in missing[: max(room, 0)])
        return torch.stack([found[path] if path in found else kept[path] for path in paths])
    return torch.stack([kept[path] for path in paths])


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
