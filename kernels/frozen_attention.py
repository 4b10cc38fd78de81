"""frozen_attention on the tile core: a tile of scores becomes weights in registers by the known logsumexp and is
multiplied with a block of columns of the values of all streams; no running maximum, nothing is rescaled.

A program has BLOCK_M destinations of one head and BLOCK_C columns of streams x width. Transposed, keys are the
destinations, and the query heads that share them their sources, from a key's own position on.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.configs import Config, arithmetic, choose
from pyfastcircuits.kernels.tile import dot, load_left, multiply
from pyfastcircuits.ops.frozen_attention import frozen_attention_fake, save_patterns, transposed_patterns

__all__ = ["frozen_attention_triton"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.1219444005469057e-4)
ALIGNMENT = 16  # elements between rows of q and k, so that loads are wide and can run ahead
# A score that were fused into a subtraction in one kernel alone would not be the one whose logsumexp was taken. Left to
# itself, ptxas would rather spill than have few warps.
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}


@triton.jit
def _tanh(x):
    """By expm1, for what is small beside 1."""
    x = tl.minimum(tl.maximum(x, -20.0), 20.0) * 2
    n = tl.floor(x * LOG2E + 0.5)
    f = x - n * LN2_HIGH - n * LN2_LOW
    series = tl.zeros_like(f) + 1.0
    for k in tl.static_range(14 if x.dtype == tl.float64 else 8):
        series = 1.0 + series * f / (15.0 - k if x.dtype == tl.float64 else 9.0 - k)
    power = tl.exp2(n)
    less_one = series * f * power + (power - 1)
    return less_one / (less_one + 2)


@triton.jit
def _scores(
    left,  # [M, BLOCK_K]
    rows,  # [M] pointers
    sources,  # pointer to [T, DEPTH]
    n,  # [N]
    positions,
    zeros,  # [M, N]
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile [M, N]; those of sources past the last repeat its."""
    columns = tl.minimum(n, positions - 1).to(tl.int64) * DEPTH
    end = positions.to(tl.int64) * DEPTH
    scores = multiply(zeros, left, rows, sources, 1, columns, end, DEPTH, BLOCK_K, PRECISION) * SCALE
    return _tanh(scores / SOFTCAP) * SOFTCAP if SOFTCAP > 0 else scores


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
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Largest score of each query of a block, and the sum of exponentials relative to it."""
    T: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
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
        zeros = tl.zeros([BLOCK_M, BLOCK_N], T)
        sources = k + head * positions * DEPTH
        x = _scores(left, rows, sources, n, positions, zeros, DEPTH, SCALE, SOFTCAP, BLOCK_K, PRECISION)
        x = tl.where(seen, x, float("-inf"))
        taller = tl.maximum(top, tl.max(x, 1))
        reference = tl.where(tl.abs(taller) < float("inf"), taller, 0.0)
        total = tl.where(total == 0, 0.0, total * tl.exp2((top - reference) * LOG2E))
        total += tl.sum(tl.exp2((x - reference[:, None]) * LOG2E), 1)
        top = taller
    tl.store(highest + place, tl.where(tl.abs(top) < float("inf"), top, 0.0), m < positions)
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
    SOFTCAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Results of one block of destinations and of columns."""
    T: tl.constexpr = tl.float64 if to.dtype.element_ty == tl.float64 else tl.float32
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
            zeros = tl.zeros([BLOCK_M, BLOCK_N], T)
            x = _scores(
                left, rows, sources + home * DEPTH, n, positions, zeros, DEPTH, SCALE, SOFTCAP, BLOCK_K, PRECISION
            )
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
    """torch.ops.pyfastcircuits.frozen_attention by Triton: the same arguments and results, precision "tf32" as well.

    Raises:
        ValueError: shapes that do not fit, a precision that the dtype does not have, or a transposed call without lse.
    """
    _check(q, k, values, lse, pre, post, mask, transposed, precision)
    arguments = (q, k, values, lse, pre, post, mask, scale, window, softcap, transposed, precision)
    out, found = frozen_attention_fake(*arguments)
    batches, heads, positions, rank = q.shape
    if batches * heads * positions == 0:
        return out, found
    arch = 90
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = 10 * major + minor
    config, kind = launch(values.shape, rank, str(q.dtype).removeprefix("torch."), precision, arch)
    # Memory holds rows of a head in order; for bf16 products, all factors are rounded here, once.
    q, k = (_packed(x, kind) for x in (q, k))
    values = (values.bfloat16() if kind == "bf16" else values).contiguous()
    # In the factors' own type: a narrower one would have fp64 products laid out as their instruction cannot have them.
    mask = None if mask is None else mask.to(out.dtype).contiguous()
    window = positions if window is None else min(window, positions)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    constants = {"DEPTH": q.shape[3], "SCALE": scale, "SOFTCAP": softcap or 0.0, "PRECISION": precision}
    tiles = {name: config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    blocks = triton.cdiv(positions, tiles["BLOCK_M"])
    with torch.cuda.device_of(q):
        if lse is None:
            highest, totals = q.new_empty(2, batches, heads, positions, dtype=out.dtype)
            attention_lse_kernel[(blocks * batches * heads,)](
                q, k, mask, highest, totals, heads, k.shape[1], positions, window, **constants, **tiles, **options
            )
            found = highest.double() + totals.double().log()
            lse = found
        if values.numel():
            lse = lse.double().contiguous()
            high = lse.to(out.dtype)
            low = torch.where(high.isfinite(), lse - high, 0.0).to(out.dtype)
            before, after = (
                None if x is None else x.to(out.dtype).contiguous()
                for x in ((post, pre) if transposed else (pre, post))
            )
            to, sources = (k, q) if transposed else (q, k)
            frozen_attention_kernel[
                (blocks * batches * to.shape[1], triton.cdiv(len(values) * values.shape[4], config.blocks["BLOCK_C"]))
            ](
                to,
                sources,
                values,
                high,
                low,
                before,
                after,
                mask,
                out,
                batches,
                to.shape[1],
                sources.shape[1],
                positions,
                len(values),
                window,
                WIDTH=values.shape[4],
                TRANSPOSED=transposed,
                BLOCK_C=config.blocks["BLOCK_C"],
                **constants,
                **tiles,
                **options,
            )
    return out, found


def launch(values: torch.Size, rank: int, dtype: str, precision: str, arch: int) -> tuple[Config, str]:
    """Configuration and arithmetic of the product with values; that of bfloat16 inputs has unrounded weights."""
    kind = arithmetic("float32" if dtype == "bfloat16" else dtype, precision)
    sizes = {"B": values[1], "H": values[2], "T": values[3], "r": rank, "C": values[0] * values[4]}
    return choose("frozen_attention", sizes, kind, arch), kind


def _packed(x: Tensor, kind: str) -> Tensor:
    if kind == "bf16":
        x = x.bfloat16()
    padding = ALIGNMENT if x.shape[3] == 0 else -x.shape[3] % ALIGNMENT
    return torch.nn.functional.pad(x, (0, padding)).contiguous()


@frozen_attention_triton.register_fake
def _outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    return frozen_attention_fake(*arguments)


frozen_attention_triton.register_autograd(transposed_patterns(frozen_attention_triton), setup_context=save_patterns)


def _check(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    lse: Tensor | None,
    pre: Tensor | None,
    post: Tensor | None,
    mask: Tensor | None,
    transposed: bool,
    precision: str,
) -> None:
    if q.dtype == torch.float64 and precision != "ieee":
        raise ValueError(f"precision is {precision!r}, but q is float64, which has only 'ieee'")
    if {k.dtype, values.dtype} != {q.dtype}:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and values {values.dtype}: expected one dtype")
    if transposed and lse is None:
        raise ValueError("lse is None, but the transposed form needs it")
    if q.dim() != 4 or k.dim() != 4 or (q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]):
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}, expected [B, H, T, r] and [B, Hkv, T, r]")
    batches, heads, positions, rank = q.shape
    source_heads = heads if transposed else k.shape[1]
    expected = {
        "k": (k, (batches, k.shape[1], positions, rank)),
        "values": (values, (len(values), batches, source_heads, positions, values.shape[-1])),
        "lse": (lse, (batches, heads, positions)),
        "pre": (pre, (batches, positions)),
        "post": (post, (batches, positions)),
        "mask": (mask, (batches, positions)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
