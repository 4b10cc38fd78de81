"""The inputs that the benches of sweep ops share: a dozen ablations through one head of GPT-2 small."""

import torch
from torch import Tensor

T, V, R, P = 512, 50257, 64, 12


def sweep_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base [T, V], delta [P, T, R], basis [1, R, V], targets [T], of the sizes that a trained model has."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(T, V, generator=g) * 3
    delta = torch.randn(P, T, R, generator=g)
    basis = torch.randn(1, R, V, generator=g) * 0.2
    return base, delta, basis, torch.randint(0, V, (T,), generator=g)
