"""The naive form of every op: materialised, in fp64 unless told, readable beside the article."""

import torch
from torch import Tensor


def logits_lse(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    group: Tensor,  # [P]
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logsumexp of base + delta @ basis[group], [P,T]."""
    return _capped(base.to(dtype) + delta.to(dtype) @ basis.to(dtype)[group], cap).logsumexp(-1)


def sweep_nll(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None,  # [P, T]
    clean_lse: Tensor,  # [T]
    expected: bool,
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gain and log total [P,T], changes of the logits of `tokens` [P,T,K], and their mean [P,T] (or [0,T])."""
    base, clean_lse, moved = base.to(dtype), clean_lse.to(dtype), delta.to(dtype) @ basis.to(dtype)[group]
    if scale is not None:
        moved = scale.to(dtype)[..., None] * moved + _stretched(base, scale.to(dtype), clean_lse, cap)
    return _changed(base, moved, tokens, clean_lse, expected, cap)


def joint_nll(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [S]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor,  # [T]
    expected: bool,
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same results, with both ablations of each pair at once."""
    singles = delta.to(dtype) @ basis.to(dtype)[group]
    first, second = pairs.unbind(-1)
    moved = singles[first] + singles[second]
    return _changed(base.to(dtype), moved, tokens, clean_lse.to(dtype), expected, cap)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def _stretched(base: Tensor, scale: Tensor, clean_lse: Tensor, cap: float | None) -> Tensor:
    """What a scale [P, T] adds to the logits, of log-probabilities where no cap forbids it: [P, T, V]."""
    start = base if cap is not None else base - clean_lse[:, None]
    return torch.where(base == -torch.inf, 0.0, (scale[..., None] - 1) * start)


def _changed(
    base: Tensor,  # [T, V]
    moved: Tensor,  # [P, T, V]
    tokens: Tensor,  # [T, K]
    clean_lse: Tensor,  # [T]
    expected: bool,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cap is not None:
        moved = torch.where(base.isinf(), 0.0, _capped(base + moved, cap) - _capped(base, cap))
    log_p = _capped(base, cap) - clean_lse[:, None]
    p = log_p.exp()
    gain = torch.where(p == 0, 0.0, p * moved.expm1()).sum(-1)
    log_total = (log_p + moved).logsumexp(-1)
    here = (tokens >= 0) & (tokens < base.shape[1])
    index = torch.where(here, tokens, 0).expand(len(moved), -1, -1)
    picked = torch.where(here, moved.gather(-1, index), 0.0)
    mean = torch.where(p == 0, 0.0, p * moved).sum(-1)
    return gain, log_total, picked, mean if expected else mean[:0]


def target_ranks(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T]
    group: Tensor,  # [P]
    thresholds: Tensor,  # [P, T]
) -> Tensor:
    """Tokens other than tokens[t] whose logits are greater than thresholds[p, t], [P, T]."""
    logits = base.double() + delta.double() @ basis.double()[group]
    others = torch.arange(base.shape[1], device=base.device) != tokens[:, None]
    return ((logits > thresholds.double()[..., None]) & others).sum(-1)


def pair_norms(
    left: Tensor,  # [N, r, d]
    right: Tensor,  # [M, d, s]
    before: Tensor | None = None,  # [M]
) -> Tensor:
    """Frobenius norms of left[i] @ right[j], [N, M] in fp64; zero where i >= before[j]."""
    norms: Tensor = torch.einsum("nrd,mds->nmrs", left.double(), right.double()).norm(dim=(2, 3))
    if before is None:
        return norms
    return torch.where(torch.arange(len(left), device=left.device)[:, None] < before, norms, 0.0)


def factored_topk(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    k: int,
    largest: bool = True,
    per_row: bool = False,
    shift: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values in fp64, rows and columns of the k best entries of A @ B - shift[:, None]: [k], or [N, k] per row."""
    product = A.double() @ B.double()
    if shift is not None:
        product = product - shift.double()[:, None]
    ordered = (product if per_row else product.flatten()).sort(dim=-1, descending=largest, stable=True)
    values, index = ordered.values[..., :k], ordered.indices[..., :k]
    if per_row:
        return values, torch.arange(len(A), device=A.device)[:, None].expand_as(index), index
    return values, index // B.shape[1], index % B.shape[1]


def diagonal_ranks(A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
    """Entries of row i of A @ B greater than entry (i, columns[i]), [N]."""
    product = A.double() @ B.double()
    return (product > product.gather(1, columns[:, None])).sum(1)


def frozen_attention(
    q: Tensor,  # [B, H, T, r]
    k: Tensor,  # [B, Hkv, T, r]
    values: Tensor,  # [S, B, Hkv, T, s]; transposed [S, B, H, T, s]
    lse: Tensor | None,  # [B, H, T]
    pre: Tensor | None,  # [B, T]
    post: Tensor | None,  # [B, T]
    mask: Tensor | None,  # [B, T]
    scale: float,
    window: int | None,
    softcap: float | None,
    transposed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """post * A (pre * values) [S,B,H,T,s], or transposed pre * A.T (post * values) [S,B,Hkv,T,s]; and lse [B,H,T]."""
    q, k, values = q.to(dtype), k.to(dtype), values.to(dtype)
    group, positions = q.shape[1] // max(k.shape[1], 1), q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(positions, device=q.device)[:, None] - torch.arange(positions, device=q.device)
    seen = (distance >= 0) & (distance < (positions if window is None else window))
    there = q.new_ones(len(q), positions, dtype=torch.bool) if mask is None else mask
    scores = scores.masked_fill(~(seen & there[:, None, None, :]), -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse.to(dtype)
    pattern = torch.where(lse[..., None] == -torch.inf, 0.0, (scores - lse[..., None]).exp())
    if pre is not None:
        pattern = pattern * torch.where(there, pre.to(dtype), 0.0)[:, None, None, :]
    if post is not None:
        pattern = pattern * post.to(dtype)[:, None, :, None]
    if transposed:
        return (pattern.mT @ values).unflatten(2, (k.shape[1], group)).sum(3), lse
    values = torch.where(there[None, :, None, :, None], values, 0.0)
    return pattern @ values.repeat_interleave(group, 2), lse
