"""sweep_nll on the tile core: the epilogue keeps the running maximum and sum of an online softmax for every row.

Each split of the vocabulary leaves partial sums, which are joined in order. The expected change of the logits needs no
pass over them: it is linear in the basis, whose mean under the clean run's probabilities serves all of a group. Under a
soft cap it is not, and the epilogue sums it too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.exp_sums import clean_means, expected, logsumexp, online_sum, reference
from pyfastcircuits.kernels.sweep import block_and_split, clean_rows, logits_of, next_group, prepared, rows_of
from pyfastcircuits.kernels.tile import load_left, tiles_of, work_type
from pyfastcircuits.shapes import check_sweep, register_outputs, sweep_nll_outputs, work_dtype

# Left to itself, ptxas would rather spill than have few warps.
TOKENS_OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 255}
WIDE_OPTIONS = {"num_warps": 8, "maxnreg": 255}  # with scales or changes


@triton.jit
def sweep_nll_kernel(
    base,  # [T, V]
    delta,  # [P, T, r]
    basis,  # [G, r, stride]
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    clean_lse,  # [T], or None for no changes
    references,  # [S, P, T] partial
    totals,  # [S, P, T] partial
    changes,  # [S, P, T] partial
    pairs,
    positions,
    vocabulary,
    groups,
    stride,
    splits,
    tiles_a_split,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Sums of exponentials of one block of rows over one split of the vocabulary."""
    T: tl.constexpr = work_type(base.dtype.element_ty)
    block, split = block_and_split(pairs, splits, BLOCK_P)
    out, t, home, poison, inside = rows_of(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    base = clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P, BLOCK_T)
    rows = delta + out * RANK
    left = load_left(rows, 0, RANK, BLOCK_K)
    if scale is not None:
        scale = tl.load(scale + out).to(T)
    if clean_lse is not None:
        clean_lse = tl.load(clean_lse + t).to(T)
    first, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    g = next_group(home, -1, groups)
    while g < groups:
        start = basis + g * RANK * stride
        highest = tl.full([BLOCK_P * BLOCK_T], float("-inf"), T)
        total = tl.zeros([BLOCK_P * BLOCK_T], T)
        change = tl.zeros([BLOCK_P * BLOCK_T], T)
        for tile in range(first, end):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            logits, clean = logits_of(base, scale, left, rows, start, stride, columns, vocabulary, RANK, PRECISION, CAP)
            if clean_lse is not None:
                change += expected(logits, clean, clean_lse, (columns < vocabulary)[None, :], CAP)
            highest, total = online_sum(highest, total, logits)
        here = inside & (home == g)
        place = split.to(tl.int64) * pairs * positions + out
        tl.store(references + place, reference(highest) + poison.to(T), here)
        tl.store(totals + place, total, here)
        if clean_lse is not None:
            tl.store(changes + place, change + poison.to(T), here)
        g = next_group(home, g, groups)


@triton.jit
def sweep_nll_tokens_kernel(
    base,  # [T, V]
    delta,  # [P, T, r]
    basis,  # [G, r, stride]
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    tokens,  # [T, K]
    mean_base,  # [T] or None
    mean_basis,  # [G, T, r] or None
    picked,  # [P, T, K]
    change,  # [P, T] or empty
    pairs,
    positions,
    vocabulary,
    groups,
    stride,
    choices,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Logits of the tokens, and the expected change, of one block of rows.

    The tokens of the block's positions are a tile like those of the sweep, multiplied in the same order: equal logits
    stay equal. The sweep does not do this itself, for its registers are full.
    """
    T: tl.constexpr = work_type(base.dtype.element_ty)
    block = tl.program_id(0)
    out, t, home, poison, inside = rows_of(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    base = clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P, BLOCK_T)
    rows = delta + out * RANK
    left = load_left(rows, 0, RANK, BLOCK_K)
    if scale is not None:
        scale = tl.load(scale + out).to(T)

    lane = tl.arange(0, BLOCK_T)
    own = lane[None, :] == (tl.arange(0, BLOCK_P * BLOCK_T) % BLOCK_T)[:, None]
    place = tl.minimum(block // tl.cdiv(pairs, BLOCK_P) * BLOCK_T + lane, positions - 1).to(tl.int64)
    g = next_group(home, -1, groups)
    while g < groups:
        here = inside & (home == g)
        start = basis + g * RANK * stride
        for k in range(choices):
            token = tl.load(tokens + place * choices + k)
            there = (token >= 0) & (token < vocabulary)
            columns = tl.where(there, token, vocabulary)
            logits, _ = logits_of(base, scale, left, rows, start, stride, columns, vocabulary, RANK, PRECISION, CAP)
            value = tl.sum(tl.where(own & there[None, :], logits, 0.0), 1)
            tl.store(picked + out * choices + k, value.to(tl.float64) + poison, here)
        g = next_group(home, g, groups)

    if mean_basis is not None:
        means = mean_basis + (home.to(tl.int64) * positions + t) * RANK
        moved = tl.zeros([BLOCK_P * BLOCK_T], T)
        for first in range(0, RANK, 16):
            step = load_left(rows, first, RANK, 16).to(T)
            moved += tl.sum(step * load_left(means, first, RANK, 16), 1)
        if scale is not None:
            moved = scale * moved + (scale - 1) * tl.load(mean_base + t)
        tl.store(change + out, moved.to(tl.float64) + poison, inside)


@torch.library.custom_op("pyfastcircuits::sweep_nll_triton", mutates_args=())
def sweep_nll_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None,  # [P, T]
    clean_lse: Tensor | None,  # [T]
    precision: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.sweep_nll by Triton: the same arguments and results, and precision "tf32" as well.

    A group outside [0, G) gives NaN: CUDA tensors are not read to check this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    others = {"tokens": (tokens, "T K", int), "scale": (scale, "P T", float), "clean_lse": (clean_lse, "T", float)}
    sizes = check_sweep(base, delta, basis, group, **others)
    lse, picked, change = sweep_nll_outputs(base, delta, basis, tokens, group, scale, clean_lse)
    if lse.numel() == 0:
        return lse, picked, change
    config, tensors, counts, row_blocks = prepared("sweep_nll", sizes, base, delta, basis, group, precision)
    references, totals = base.new_empty(2, config.splits, *lse.shape, dtype=work_dtype(base))
    summed, means = None, (None, None)
    if clean_lse is not None and cap:
        clean_lse, summed = clean_lse.contiguous(), torch.empty_like(totals)
    elif clean_lse is not None:
        means, clean_lse = clean_means(base, tensors[2], clean_lse, totals.dtype), None
    tensors = *tensors, None if scale is None else scale.contiguous()
    tiles = config.tiles(base.shape[1], "BLOCK_V")
    constants = {"RANK": sizes["r"], "PRECISION": precision, "CAP": cap}
    options = config.options | (WIDE_OPTIONS if scale is not None or summed is not None else {})
    with torch.cuda.device_of(base):
        sweep_nll_kernel[(row_blocks * config.splits,)](
            *tensors, clean_lse, references, totals, summed, *counts, config.splits, tiles, **constants, **options
        )
        options = config.options | TOKENS_OPTIONS
        del options["BLOCK_V"]
        sweep_nll_tokens_kernel[(row_blocks,)](
            *tensors, tokens.contiguous(), *means, picked, change, *counts, tokens.shape[1], **constants, **options
        )
        lse = logsumexp(references, totals)
        if summed is not None:
            change = summed.sum(0, dtype=torch.float64)
    return lse, picked, change


register_outputs("sweep_nll_triton", sweep_nll_outputs)
