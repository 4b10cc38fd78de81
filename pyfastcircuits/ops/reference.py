"""The naive form of every op: materialised, in fp64 unless told, readable beside the article."""

import torch
from torch import Tensor


def sweep_nll(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None = None,  # [P, T]
    clean_lse: Tensor | None = None,  # [T]
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp [P,T], logits of `tokens` [P,T,K] and expected change under the clean run [P,T] (or [0,T])."""
    base, delta, basis = base.to(dtype), delta.to(dtype), basis.to(dtype)
    logits = base + delta @ basis[group]
    if scale is not None:
        logits = logits * scale.to(dtype)[..., None]
    return _partial(base, logits, tokens, clean_lse, cap)


def joint_nll(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [S]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor | None = None,  # [T]
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same results, with both ablations of each pair at once."""
    base = base.to(dtype)
    singles = delta.to(dtype) @ basis.to(dtype)[group]
    first, second = pairs.unbind(-1)
    return _partial(base, base + singles[first] + singles[second], tokens, clean_lse, cap)


def _partial(
    base: Tensor,  # [T, V]
    logits: Tensor,  # [P, T, V]
    tokens: Tensor,  # [T, K]
    clean_lse: Tensor | None,  # [T]
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cap is not None:
        logits, base = (cap * (x / cap).tanh() for x in (logits, base))
    here = (tokens >= 0) & (tokens < base.shape[1])
    index = torch.where(here, tokens, 0).expand(len(logits), -1, -1)
    picked = torch.where(here, logits.gather(-1, index), 0.0)
    if clean_lse is None:
        change = logits.new_empty(0, len(base))
    else:
        probability = (base - clean_lse.to(base.dtype)[:, None]).exp()
        change = torch.where(probability > 0, probability * (logits - base), 0.0).sum(-1)
    return logits.logsumexp(-1), picked, change


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
