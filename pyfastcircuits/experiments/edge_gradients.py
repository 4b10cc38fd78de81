"""The gradient of a metric by what every receiver reads, layer by layer from the logits down.

Each layer is run again by itself, so that nothing of it outlives its turn: what is kept is the residual stream in front
of every layer. A receiver's gradient goes through its own norm, and no further: what reaches the stream in front of a
layer is the gradient behind it and the sum of those of the layer's receivers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyfastcircuits.experiments.edges import Effect
from pyfastcircuits.experiments.metric_gradient import metric_gradient
from pyfastcircuits.experiments.metrics import Asked
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import normalized
from pyfastcircuits.run import memory
from pyfastcircuits.run.graph import MLP, Graph, NodeLabel
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.nodes import KINDS
from pyfastcircuits.run.split_inputs import SplitInputs, mixed_gradients
from pyfastcircuits.run.trace import FrozenTrace

GRADIENTS = 64 << 20  # bytes of gradients of a layer's heads made at a time, at least one position's

# numbers of receivers; how many nodes they read; some positions; gradients there, [n, B, t, d]
Found = Callable[[slice, int, slice, Tensor], None]


def receiver_gradients(
    part: FrozenTrace,
    graph: Graph,
    streams: list[Tensor],
    asked: Asked,
    how: Measurement,
    found: Found,
    held: tuple[NodeLabel | int, Tensor] | None = None,
    effect: Effect = "total",
) -> None:
    """Give `found` the gradient of the metric's mean by what receivers read, a few of them and of positions at a time.

    Args:
        part: some sequences of the clean run.
        graph: of its model.
        streams: the residual stream [B, T, d] in front of each layer and at the end, of the run to differentiate at.
        asked, how: what is measured.
        found: takes the gradients.
        held: a layer, whose heads, or ("mlp", layer), whose MLP, are constants in that run; and what they write,
            [B, T, d].
        effect: "direct": what receivers then write goes straight to the logits.
    """
    gradient = metric_gradient(part, streams[-1], asked, how)
    logits = slice(graph.receivers_at[-1], graph.receivers_at[-1] + 1)
    for places in _places(part, graph):
        found(logits, graph.heads_at[-1], places, gradient[None, :, places])
    for layer in reversed(range(graph.layers)):
        behind = _through_layer(part, graph, layer, streams[layer], gradient, found, held, effect)
        gradient = behind if effect == "total" else gradient
        memory.give_back(gradient)


def _through_layer(
    part: FrozenTrace,
    graph: Graph,
    layer: int,
    stream: Tensor,
    gradient: Tensor,
    found: Found,
    held: tuple[NodeLabel | int, Tensor] | None,
    effect: Effect,
) -> Tensor:
    """The gradient by the stream in front of a layer, from that by the stream behind it."""
    forward, (fixed, value) = part.forward, held or (None, None)
    q, k, v = made = forward.qkv(layer, normalized(stream, part.weights)[None])
    group = q.shape[2] // k.shape[2]
    inputs = [x[0].repeat_interleave(n, 1) for x, n in ((q, 1), (k, group), (v, group))]
    behind, reads = gradient, graph.mlps[layer]
    z = forward.apply(layer, *made).requires_grad_()
    with torch.enable_grad():
        written = forward.write(layer, z)[0]
    if reads is not None and fixed != (MLP, layer):
        read = stream
        if reads == "after heads":
            read = stream + (value if fixed == layer and value is not None else written.detach())
        by_mlp = _by_mlp(part, layer, read, gradient)
        for places in _places(part, graph):
            found(_mlp(graph, layer), graph.read_by_mlp(layer), places, by_mlp[None, :, places])
        behind = gradient + by_mlp
    if fixed == layer:  # heads that are constants read nothing
        return behind
    if effect == "direct":
        W_O = part.weights.heads("W_O", layer)
        by_z = torch.einsum("btd,hrd->bhtr", part.apply_post_norm(gradient, layer), W_O)
    else:
        by_z = torch.autograd.grad(written, z, behind if reads != "before heads" else gradient)[0][0]
    by_inputs = mixed_gradients(part, layer, inputs, by_z)
    split, total = SplitInputs(part, layer, stream, made), behind.clone()
    pulled = [split.pull_back(kind, stream, by_input) for kind, by_input in zip(KINDS, by_inputs, strict=True)]
    receivers = slice(graph.receivers_at[layer], graph.receivers_at[layer] + len(KINDS) * graph.heads)
    for places in _places(part, graph):
        by_stream = stream.new_empty(len(KINDS), graph.heads, *stream[:, places].shape)
        for out, pull_back in zip(by_stream, pulled, strict=True):
            out.copy_(pull_back(places))
        by_stream = by_stream.flatten(0, 1)
        found(receivers, graph.heads_at[layer], places, by_stream)
        total[:, places] += by_stream.sum(0)
    return total


def _places(part: FrozenTrace, graph: Graph) -> Iterator[slice]:
    """Positions that are worked on at a time."""
    one = len(KINDS) * graph.heads * part.embedded[:, :1].nbytes
    return slices(part.tokens.shape[1], max(1, GRADIENTS // one))


def _by_mlp(part: FrozenTrace, layer: int, read: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        read = read.detach().requires_grad_()
        (by_read,) = torch.autograd.grad(part.forward.mlp(layer, read[None])[0], read, gradient)
    return by_read


def _mlp(graph: Graph, layer: int) -> slice:
    last = graph.receivers_at[layer + 1]
    return slice(last - 1, last)


def streams_from(
    part: FrozenTrace, graph: Graph, layer: int, stream: Tensor, held: tuple[NodeLabel | int, Tensor] | None = None
) -> list[Tensor]:
    """The residual stream [B, T, d] in front of `layer`, which is given, of each layer behind it, and at the end."""
    streams, forward = [stream], part.forward
    fixed, value = held or (None, None)
    for later in range(layer, graph.layers):
        if fixed not in (later, (MLP, later)):
            streams.append(forward.block(later, streams[-1][None])[0])
            continue
        assert value is not None
        before, reads = streams[-1], graph.mlps[later]
        if fixed == later:
            written = value
        else:
            z = forward.apply(later, *forward.qkv(later, normalized(before, part.weights)[None]))
            written = forward.write(later, z)[0]
        after = before + written
        if fixed == (MLP, later):
            after = after + value
        elif reads is not None:
            after = after + forward.mlp(later, (before if reads == "before heads" else after)[None])[0]
        streams.append(after)
    return streams
