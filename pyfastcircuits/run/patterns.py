"""Attention patterns of a frozen run: stored whole, or as the queries and keys from which tiles are made again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfastcircuits.ops import attention_lse, frozen_attention


@dataclass(frozen=True, eq=False)
class QKPattern:
    """A layer's causal patterns softmax(scale * q @ k.T), in memory that grows with T and not with T squared.

    A window hides sources at that distance or further; a softcap turns scores x into softcap * tanh(x / softcap).
    """

    q: Tensor  # [B, H, T, r]
    k: Tensor  # [B, Hkv, T, r]
    lse: Tensor  # [B, H, T]
    scale: float
    mask: Tensor | None  # [B, T]: which sources are real
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H], a score in each row that no source has

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        scale: float,
        mask: Tensor | None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> "QKPattern":
        """The patterns that queries and keys make; the logsumexp of every query's scores is computed here."""
        lse = attention_lse(q, k, scale=scale, mask=mask, window=window, softcap=softcap)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None].to(lse.dtype).expand_as(lse))
        return QKPattern(q, k, lse, scale, mask, window, softcap, sinks)


Pattern = Tensor | QKPattern  # a tensor is [B, H, T, T]


def apply_pattern(pattern: Pattern, values: Tensor) -> Tensor:
    """z [S, B, H, T, s]: the patterns applied to S streams of values [S, B, Hkv, T, s], shared by H / Hkv heads."""
    if isinstance(pattern, QKPattern):
        shaped = {name: getattr(pattern, name) for name in ("scale", "mask", "window", "softcap")}
        return frozen_attention(pattern.q, pattern.k, values, pattern.lse, **shaped)
    streams, batch, kv, length, width = values.shape
    side_by_side = values.permute(1, 2, 3, 0, 4).flatten(3)
    out = pattern.reshape(batch, kv, -1, length) @ side_by_side
    heads: Tensor = out.view(batch, pattern.shape[1], length, streams, width)
    return heads.permute(3, 0, 1, 2, 4)


def head_pattern(pattern: Pattern, head: int) -> Pattern:
    """The pattern of one query head, as a layer of one head."""
    if isinstance(pattern, Tensor):
        return pattern[:, head : head + 1]
    kv = head // (pattern.q.shape[1] // pattern.k.shape[1])
    q, lse = (x[:, head : head + 1] for x in (pattern.q, pattern.lse))
    sinks = None if pattern.sinks is None else pattern.sinks[head : head + 1]
    return replace(pattern, q=q, k=pattern.k[:, kv : kv + 1], lse=lse, sinks=sinks)


def select_sequences(pattern: Pattern, sequences: slice | Tensor) -> Pattern:
    """The patterns of some of the sequences; a slice gives views."""
    if isinstance(pattern, Tensor):
        return pattern[sequences]
    q, k, lse = (x[sequences] for x in (pattern.q, pattern.k, pattern.lse))
    return replace(pattern, q=q, k=k, lse=lse, mask=None if pattern.mask is None else pattern.mask[sequences])


def stored(pattern: Pattern) -> Tensor:
    """The pattern as a tensor [B, H, T, T]: rows are destinations, columns sources; padding attends to itself alone."""
    if isinstance(pattern, Tensor):
        return pattern
    shape = (pattern.window, pattern.softcap, pattern.sinks)
    return softmax_pattern(pattern.q, pattern.k, pattern.scale, pattern.mask, *shape)


def softmax_pattern(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal softmax of scale * q k.T, [..., B, H, T, T]; padding attends to itself alone; see QKPattern."""
    scores = scale * (q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).mT)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(-window)
    if mask is not None:
        own = torch.eye(len(hidden), dtype=torch.bool, device=scores.device)
        hidden = hidden | ~(mask[:, None, None] | own)
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, beside), -1).softmax(-1)[..., :-1]
