"""Random models of every kind the library takes."""

import itertools
from typing import get_args

import torch

from pyfastcircuits.model.weights import CircuitWeights, Norm, Positional

KINDS = list(itertools.product((None, *get_args(Norm)), get_args(Positional)))


def random_weights(
    layers: int = 2,
    heads: int = 4,
    kv: int = 2,
    d: int = 20,
    r: int = 6,
    vocabulary: int = 97,
    *,
    predicted: int | None = None,
    norm: str | None = None,
    positional: str = "shortformer",
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> CircuitWeights:
    """Weights of size about 0.4, embeddings of 0.8: attention that is neither flat nor one-hot.

    `predicted` tokens are another vocabulary than the one that is read.
    """
    predicted = vocabulary if predicted is None else predicted
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * 0.4).to(dtype)

    options = {}
    if biases:
        shapes = {"b_Q": (heads, r), "b_K": (kv, r), "b_V": (kv, r), "b_O": (d,)}
        options = {name: normal(layers, *shape) for name, shape in shapes.items()} | {"b_U": normal(predicted)}
    if positional in ("standard", "shortformer"):
        options["W_pos"] = normal(32, d)
    if positional == "rotary":
        options["rotary_dim"] = 4
    return CircuitWeights(
        normal(vocabulary, d) * 2,
        normal(layers, heads, d, r),
        normal(layers, kv, d, r),
        normal(layers, kv, d, r),
        normal(layers, heads, r, d),
        normal(d, predicted),
        norm=norm,
        positional=positional,
        **options,
    )


def random_tokens(batch: int = 2, length: int = 9, vocabulary: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
