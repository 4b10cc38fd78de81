"""The residual stream of a run as a sum of components: what each head writes, and everything else."""

import torch
from torch import Tensor

from pyfastcircuits.result import Label
from pyfastcircuits.run.trace import FrozenTrace

__all__ = ["EMBED", "besides_heads", "head_label", "heads_written", "source_label"]

EMBED = "embed"


def head_label(layer: int, head: int) -> Label:
    """Of a head, as every Result has it."""
    return ((layer, head),)


def source_label(layer: int) -> Label:
    """Of what a layer adds besides its heads."""
    return f"sources {layer}"


def heads_written(trace: FrozenTrace, layer: int) -> Tensor:
    """What all heads of a layer write together, value biases included, [B, T, d]."""
    heads = torch.einsum("hbtr,hrd->btd", trace.z(layer), trace.weights.heads("W_O", layer))
    return trace.post(heads, layer)


def besides_heads(trace: FrozenTrace, layer: int) -> Tensor:
    """What a layer adds that none of its heads writes, [B, T, d]: its MLP's output, and what biases are left."""
    return trace.streams[layer + 1] - trace.streams[layer] - heads_written(trace, layer)
