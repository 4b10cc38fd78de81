"""Inputs of pair_norms, and what torch makes of them at their own dtype."""

import torch
from torch import Tensor


def factors(
    lefts: int, rights: int, rank: int, depth: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random left [N, r, d] and right [M, d, s]."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(lefts, rank, depth, generator=generator, dtype=torch.float64)
    right = torch.randn(rights, depth, width, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


def torch_norms(left: Tensor, right: Tensor) -> Tensor:
    """What a user of torch writes: the product of everything, in the inputs' own dtype."""
    product = left.flatten(0, 1) @ right.transpose(0, 1).flatten(1)
    return product.view(len(left), left.shape[1], len(right), -1).transpose(1, 2).norm(dim=(2, 3))
