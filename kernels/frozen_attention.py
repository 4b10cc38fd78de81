"""frozen_attention on the tile core: tiles of the attention patterns are recomputed and multiplied with the values.

A tile of scores becomes a tile of the pattern in registers, by the logsumexp of the clean run, so that nothing keeps a
running maximum or is rescaled; it is multiplied with a block of columns of the values of all streams. A program has
BLOCK_M destinations of one head and BLOCK_C columns of streams x width. In the transposed form (the backward pass) keys
are the destinations, and the query heads that share them their sources, from a key's own position on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.gradients import register_frozen_attention
from pyfastcircuits.kernels.common import configure, laid_out, rounded
from pyfastcircuits.kernels.exp_sums import LOG2E, capped, finite, online_sum
from pyfastcircuits.kernels.tile import dot, load_left, multiply, nearest_tf32, work_type
from pyfastcircuits.shapes import check_shapes, frozen_attention_outputs, register_outputs

# A score that is fused into a subtraction in one kernel alone would not be the one whose logsumexp was taken. Left to
# itself, ptxas would rather spill than have few warps.
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}
LSE_OPTIONS = OPTIONS | {"num_warps": 8}  # its tiles of scores are all it holds


@triton.jit
def _scores(
    left,  # [M, BLOCK_K]
    rows,  # [M] pointers
    sources,  # pointer to [T, DEPTH]
    n,  # [N]
    positions,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile [M, N]; those of sources past the last repeat its."""
    columns = tl.minimum(n, positions - 1).to(tl.int64) * DEPTH
    end = tl.cast(positions, tl.int64) * DEPTH
    return capped(multiply(left, rows, sources, 1, columns, end, DEPTH, PRECISION) * SCALE, CAP)


@triton.jit
def attention_lse_kernel(
    q,  # [B, H, T, DEPTH]
    k,  # [B, Hkv, T, DEPTH]
    mask,  # [B, T] or None
    highest,  # [B, H, T]
    totals,  # [B, H, T]
    heads,
    kv,
    positions,
    window,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Largest score of each query of a block, and the sum of exponentials relative to it."""
    T: tl.constexpr = work_type(q.dtype.element_ty)
    blocks = tl.cdiv(positions, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last see the most keys
    row = tl.program_id(0) // blocks
    batch = row // heads
    head = (batch * kv + row % heads // (heads // kv)).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row.to(tl.int64) * positions + tl.minimum(m, positions - 1)
    rows = q + place * DEPTH
    left = load_left(rows, 0, DEPTH, BLOCK_K)
    top = tl.full([BLOCK_M], float("-inf"), T)
    total = tl.zeros([BLOCK_M], T)
    first = tl.maximum(block * BLOCK_M - window + 1, 0) // BLOCK_N * BLOCK_N
    for start in range(first, tl.minimum(positions, (block + 1) * BLOCK_M), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = (n[None, :] <= m[:, None]) & (m[:, None] - n[None, :] < window)
        if mask is not None:
            seen = seen & (tl.load(mask + batch * positions + n, n < positions, 0.0) > 0)[None, :]
        sources = k + head * positions * DEPTH
        x = _scores(left, rows, sources, n, positions, DEPTH, SCALE, CAP, PRECISION)
        top, total = online_sum(top, total, tl.where(seen, x, float("-inf")), SUBTRACT_FIRST=True)
    tl.store(highest + place, finite(top), m < positions)
    tl.store(totals + place, total, m < positions)


@triton.jit
def frozen_attention_kernel(
    to,  # [B, Ht, T, DEPTH]
    sources,  # [B, Hf, T, DEPTH]
    values,  # [S, B, Hf, T, WIDTH]
    high,  # [B, H, T] logsumexp of the queries, in two parts
    low,
    before,  # [B, T] or None: multiply a source's values
    after,  # [B, T] or None: multiply a destination's result
    mask,  # [B, T] or None: keys that are there
    out,  # [S, B, Ht, T, WIDTH]
    batches,
    heads_to,
    heads_from,
    positions,
    streams,
    window,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Results of one block of destinations and of columns."""
    T: tl.constexpr = work_type(to.dtype.element_ty)
    blocks = tl.cdiv(positions, BLOCK_M)
    block = tl.program_id(0) % blocks
    if not TRANSPOSED:
        block = blocks - 1 - block  # those that see the most sources first
    row = tl.program_id(0) // blocks
    batch = row // heads_to
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row.to(tl.int64) * positions + tl.minimum(m, positions - 1)
    rows = to + place * DEPTH
    left = load_left(rows, 0, DEPTH, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stream = (c // WIDTH).to(tl.int64)
    inside = c < streams * WIDTH
    if TRANSPOSED:
        first = block * BLOCK_M // BLOCK_N * BLOCK_N
        last = tl.minimum(positions, (block + 1) * BLOCK_M + window)
    else:
        first = tl.maximum(block * BLOCK_M - window + 1, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(positions, (block + 1) * BLOCK_M)
        row_high = tl.load(high + place)
        row_low = tl.load(low + place)
    total = tl.zeros([BLOCK_M, BLOCK_C], T)
    head = row % heads_to * heads_from // heads_to
    for source in range(head, head + tl.maximum(heads_from // heads_to, 1)):
        home = (batch * heads_from + source).to(tl.int64) * positions
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            x = _scores(left, rows, sources + home * DEPTH, n, positions, DEPTH, SCALE, CAP, PRECISION)
            there = n < positions
            if TRANSPOSED:
                seen = (m[:, None] <= n[None, :]) & (n[None, :] - m[:, None] < window)
                column_high = tl.load(high + home + n, there, float("-inf"))
                there = there & (column_high != float("-inf"))
                x = (x - column_high[None, :]) - tl.load(low + home + n, there, 0.0)[None, :]
            else:
                seen = (n[None, :] <= m[:, None]) & (m[:, None] - n[None, :] < window)
                if mask is not None:
                    there = there & (tl.load(mask + batch * positions + n, there, 0.0) > 0)
                x = (x - row_high[:, None]) - row_low[:, None]
            weights = tl.exp2(x * LOG2E)
            if before is not None:
                weights = weights * tl.load(before + batch * positions + n, there, 0.0)[None, :]
            weights = tl.where(seen & there[None, :], weights, 0.0)
            if PRECISION == "tf32":
                weights = nearest_tf32(weights)
            pointers = values + stream * batches * heads_from * positions * WIDTH + c % WIDTH
            pointers = pointers[None, :] + (home + n)[:, None] * WIDTH
            right = tl.load(pointers, there[:, None] & inside[None, :], 0.0)
            total = dot(weights, right if PRECISION == "bf16" else right.to(T), total, PRECISION)
    if after is not None:
        total = total * tl.load(after + batch * positions + m, m < positions, 0.0)[:, None]
    if TRANSPOSED:
        if mask is not None:
            total = tl.where((tl.load(mask + batch * positions + m, m < positions, 0.0) > 0)[:, None], total, 0.0)
    else:
        total = tl.where((row_high == float("-inf"))[:, None], 0.0, total)
    pointers = out + stream * batches * heads_to * positions * WIDTH + c % WIDTH
    tl.store(pointers[None, :] + place[:, None] * WIDTH, total, (m < positions)[:, None] & inside[None, :])


@torch.library.custom_op("pyfastcircuits::frozen_attention_triton", mutates_args=())
def frozen_attention_triton(
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
    transposed: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """torch.ops.pyfastcircuits.frozen_attention by Triton: the same arguments and results, and all precisions.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, a precision that the dtype does not have, or a
            transposed call without lse.
    """
    if transposed and lse is None:
        raise ValueError("lse is None, but the transposed form needs it")
    sizes = check_shapes(
        q=(q, "B H T r"),
        k=(k, "B Hkv T r"),
        values=(values, "S B H T s" if transposed else "S B Hkv T s"),
        lse=(lse, "B H T", float),
        pre=(pre, "B T", float),
        post=(post, "B T", float),
        mask=(mask, "B T", bool),
    )
    out, found = frozen_attention_outputs(q, k, values, lse, transposed, precision)
    batches, heads, positions = (sizes[x] for x in "BHT")
    if batches * heads * positions == 0:
        return out, found
    if not sizes["Hkv"] or heads % sizes["Hkv"]:
        raise ValueError(f"q has {heads} heads, no multiple of k's {sizes['Hkv']}")
    # By the results' type: the product of bfloat16 inputs with values has weights that are not rounded.
    config, kind = configure("frozen_attention", sizes | {"C": sizes["S"] * sizes["s"]}, out, precision)
    q, k, values = laid_out(q, kind), laid_out(k, kind), rounded(values, kind)
    # In the factors' own type: a narrower one would have fp64 products laid out as their instruction cannot have them.
    pre, post, mask = (None if x is None else x.to(out.dtype).contiguous() for x in (pre, post, mask))
    window = positions if window is None else min(window, positions)
    constants = {"DEPTH": q.shape[3], "SCALE": scale, "CAP": softcap, "PRECISION": kind}
    options = constants | config.options | OPTIONS
    columns = options.pop("BLOCK_C")
    blocks = config.count(positions, "BLOCK_M") * batches
    with torch.cuda.device_of(q):
        if lse is None:
            highest, totals = q.new_empty(2, batches, heads, positions, dtype=out.dtype)
            attention_lse_kernel[(blocks * heads,)](
                q, k, mask, highest, totals, heads, sizes["Hkv"], positions, window, **options | LSE_OPTIONS
            )
            lse = found = highest.double() + totals.double().log()
        if values.numel():
            lse = lse.double().contiguous()
            high = lse.to(out.dtype)
            low = torch.where(high.isfinite(), lse - high, 0.0).to(out.dtype)
            to, sources, before, after = (k, q, post, pre) if transposed else (q, k, pre, post)
            tensors = to, sources, values, high, low, before, after, mask, out
            counts = batches, to.shape[1], sources.shape[1], positions, len(values), window
            options |= {"WIDTH": sizes["s"], "TRANSPOSED": transposed, "BLOCK_C": columns}
            grid = blocks * to.shape[1], config.count(len(values) * sizes["s"], "BLOCK_C")
            frozen_attention_kernel[grid](*tensors, *counts, **options)
    return out, found


register_outputs("frozen_attention_triton", frozen_attention_outputs)
register_frozen_attention(frozen_attention_triton, frozen_attention_triton)
