"""Inputs of frozen_attention, what torch makes of them at their own dtype, and what is allowed of ours."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.ops import reference
from support.accuracy import assert_as_accurate


class Attention(NamedTuple):
    """The bare op's arguments but for the precision, in its order."""

    q: Tensor
    k: Tensor
    values: Tensor
    lse: Tensor | None
    pre: Tensor | None
    post: Tensor | None
    mask: Tensor | None
    scale: float
    window: int | None
    softcap: float | None
    transposed: bool


def make(
    S: int = 3,
    B: int = 2,
    H: int = 4,
    kv: int = 2,
    T: int = 131,
    r: int = 37,
    s: int = 19,
    *,
    whole: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    device: str = "cpu",
) -> Attention:
    """Random inputs; scores of about `size`; `whole`: with pre, post and mask. Transposed, with the lse of its dtype."""
    generator = torch.Generator().manual_seed(S + 10 * B + 100 * T + 1000 * r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    call = Attention(
        q=(size * normal(B, H, T, r)).to(dtype),
        k=normal(B, kv, T, r).to(dtype),
        values=normal(S, B, H if transposed else kv, T, s).to(dtype),
        lse=None,
        pre=normal(B, T) if whole else None,
        post=normal(B, T) if whole else None,
        mask=torch.rand(B, T, generator=generator) > 0.2 if whole else None,
        scale=max(r, 1) ** -0.5,
        window=window,
        softcap=softcap,
        transposed=transposed,
    )
    if transposed:
        call = call._replace(lse=exact(forward(call))[1])
    return Attention(*(x.to(device) if isinstance(x, Tensor) else x for x in call))


def forward(call: Attention) -> Attention:
    """The call that finds a transposed one's lse."""
    return call._replace(values=call.k[None, ..., :0], lse=None, transposed=False)


def eager(call: Attention) -> tuple[Tensor, Tensor]:
    """What a user would write, in the inputs' dtype (bfloat16 accumulates in fp32)."""
    return reference.frozen_attention(*call, dtype=torch.promote_types(call.q.dtype, torch.float32))


def exact(call: Attention) -> tuple[Tensor, Tensor]:
    """The reference, in fp64."""
    return reference.frozen_attention(*call)


def tiny(call: Attention) -> float:
    """A few roundings: of results near 1 and, where the reference rounds as much, of scores as well."""
    if call.q.dtype != torch.float64:
        return 1e-6
    return 2e-14 * (1 + float(call.q.abs().max() if call.q.numel() else 0))


def largest_scores(call: Attention) -> Tensor:
    """Of every row [B, H, T] of queries, or of keys [B, Hkv, T] where transposed; without the cap, whose slope is 1."""
    group = call.q.shape[1] // max(call.k.shape[1], 1)
    scores = call.scale * call.q.double() @ call.k.double().repeat_interleave(group, 1).mT
    scores = scores.abs().nan_to_num(0, 0).tril()
    if call.mask is not None:
        scores = scores * call.mask[:, None, None]
    if not scores.numel():
        return scores.new_zeros(())
    return scores.amax(-2).unflatten(1, (-1, group)).amax(2) if call.transposed else scores.amax(-1)


def assert_as_accurate_rows(
    call: Attention, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]
) -> None:
    """Outputs row by row, logsumexps (if ours are there) position by position: as wrong as rounded scores make them."""
    scores = largest_scores(call)
    size = 1.0
    for x in (call.values, call.pre, call.post):
        size *= 1.0 if x is None or not x.numel() else float(x.double().abs().nan_to_num(0, 0, 0).max())
    assert_as_accurate(ours[0], theirs[0], truth[0], tiny(call), [1, 2, 3], through=size * scores[..., None])
    if ours[1].numel():
        assert_as_accurate(ours[1], theirs[1], truth[1], tiny(call), [2], through=scores)
