"""Inputs of sweep_nll, target_ranks and joint_nll, and what torch makes of them at their own dtype."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits import ops
from pyfastcircuits.ops import SweepPartial, reference

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]  # gain, log_total [P, T], picked [P, T, K], mean [P, T]


class Sweep(NamedTuple):
    """The op's tensors, in its order."""

    base: Tensor
    delta: Tensor
    basis: Tensor
    tokens: Tensor
    group: Tensor
    scale: Tensor | None
    clean_lse: Tensor
    mean: bool


class Joint(NamedTuple):
    """The tensors of joint_nll, in its order."""

    base: Tensor
    delta: Tensor
    basis: Tensor
    tokens: Tensor
    group: Tensor
    pairs: Tensor
    clean_lse: Tensor
    mean: bool


def partial(case: Sweep | Joint, **options: object) -> SweepPartial:
    """The raw typed op of the case."""
    base, delta, basis, tokens, group, other, clean_lse, mean = case
    if isinstance(case, Joint):
        return ops.joint_partial(base, delta, basis, tokens, other, clean_lse, group=group, mean=mean, **options)
    return ops.sweep_partial(base, delta, basis, tokens, clean_lse, group=group, scale=other, mean=mean, **options)


def joint(sweep: Sweep, pairs: int) -> Joint:
    """Random pairs of a sweep's ablations, in any order, some of them twice."""
    generator = torch.Generator().manual_seed(pairs)
    chosen = torch.randint(0, max(len(sweep.delta), 1), (pairs, 2), generator=generator).to(sweep.base.device)
    return Joint(*sweep[:5], chosen, *sweep[6:])


def make(
    P: int,
    T: int,
    V: int,
    r: int,
    G: int = 1,
    K: int = 1,
    *,
    scale: bool = False,
    mean: bool = False,
    dtype: torch.dtype = torch.float32,
    size: float = 3.0,
    device: str = "cpu",
    cap: float | None = None,
) -> Sweep:
    """Random inputs; logits of about `size`. `cap`: what will be asked for with them."""
    generator = torch.Generator().manual_seed(P + 10 * T + 100 * V + 1000 * r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = (size * normal(T, V)).to(dtype)
    sweep = Sweep(
        base=base,
        delta=(normal(P, T, r) / max(r, 1) ** 0.5).to(dtype),
        basis=normal(G, r, V).to(dtype),
        tokens=torch.randint(0, max(V, 1), (T, K), generator=generator),
        group=torch.randint(0, G, (P,), generator=generator),
        scale=(0.5 + torch.rand(P, T, generator=generator, dtype=torch.float64)) if scale else None,
        clean_lse=capped(base.double(), cap).logsumexp(-1),
        mean=mean,
    )
    return Sweep(*(x.to(device) if isinstance(x, Tensor) else x for x in sweep))


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def whole_numbers(
    P: int, T: int, V: int, r: int, G: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Sweep:
    """Small integers, whose sums are exact in every dtype, and full of equal logits."""
    generator = torch.Generator().manual_seed(P + 10 * T + 100 * V + 1000 * r)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)

    tokens = torch.randint(0, max(V, 1), (T, 1), generator=generator)
    group = torch.randint(0, G, (P,), generator=generator)
    base = integers(T, V)
    factors = integers(P, T, r), integers(G, r, V)
    return Sweep(base, *factors, tokens.to(device), group.to(device), None, base.double().logsumexp(-1), False)


def not_finite(device: str = "cpu") -> Sweep:
    """Rows with some and only -inf, with +inf, with NaN, and an ablation that is NaN."""
    sweep = make(P=3, T=6, V=200, r=5, K=2, device=device)
    sweep.base[0, 3:90] = -torch.inf
    sweep.base[1] = -torch.inf
    sweep.base[2, 7] = torch.inf
    sweep.base[3, 8] = torch.nan
    sweep.base[4, 1], sweep.base[4, 2] = torch.inf, torch.nan
    sweep.delta[1, 5, 2] = torch.nan
    return sweep._replace(clean_lse=sweep.base.double().logsumexp(-1))


def exact(case: Sweep | Joint, cap: float | None = None, dtype: torch.dtype = torch.float64) -> Statistics:
    """The reference, in fp64."""
    form = reference.joint_nll if isinstance(case, Joint) else reference.sweep_nll
    return form(*case, cap, dtype=dtype)
