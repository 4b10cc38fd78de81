"""target_ranks on the tile core: the epilogue counts the logits of each row that are greater than its threshold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.sweep import (
    block_and_split,
    clean_rows,
    clean_tile,
    logits_of,
    next_group,
    prepared,
    rows_of,
)
from pyfastcircuits.kernels.tile import load_parts, row_length, tiles_of
from pyfastcircuits.shapes import check_sweep, register_outputs, target_ranks_outputs, work_dtype


@triton.jit
def target_ranks_kernel(
    base,  # [T, V]
    delta,  # this and basis as `common.for_products` makes them
    basis,
    order,  # [P] ablations sorted by group
    group,  # [P]
    tokens,  # [T]
    thresholds,  # [P, T]
    ranks,  # [P, T] zeros
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
):
    """Adds the counts of one block of rows in one split of the vocabulary."""
    block, split = block_and_split(pairs, splits, BLOCK_P)
    out, t, home, _poison, inside = rows_of(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    base = clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P, BLOCK_T)
    rows = delta + out * row_length(RANK, PRECISION)
    left = load_parts(rows, RANK, BLOCK_K, PRECISION)
    bar = tl.load(thresholds + out)
    token = tl.load(tokens + t)
    first, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    g = next_group(home, -1, groups)
    while g < groups:
        count = tl.zeros([BLOCK_P * BLOCK_T], tl.int32)
        clean = clean_tile(base, first * BLOCK_V + tl.arange(0, BLOCK_V), vocabulary)
        for tile in range(first, end):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            # The next tile's clean logits come while this one's product is made.
            following = clean_tile(base, columns + BLOCK_V, vocabulary)
            logits = logits_of(clean, left, rows, basis, g, stride, columns, vocabulary, RANK, PRECISION, None)
            others = (columns < vocabulary)[None, :] & (columns[None, :] != token[:, None])
            count += tl.sum(((logits > bar[:, None]) & others).to(tl.int32), 1)
            clean = following
        # Integers add up to the same in any order.
        tl.atomic_add(ranks + out, count.to(tl.int64), inside & (home == g), sem="relaxed")
        g = next_group(home, g, groups)


@torch.library.custom_op("pyfastcircuits::target_ranks_triton", mutates_args=())
def target_ranks_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T]
    group: Tensor,  # [P]
    thresholds: Tensor,  # [P, T]
    precision: str,
) -> Tensor:
    """torch.ops.pyfastcircuits.target_ranks by Triton: the same arguments and result, and all precisions.

    A group outside [0, G) gives -1: CUDA tensors are not read to check this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    others = {"tokens": (tokens, "T", int), "thresholds": (thresholds, "P T", float)}
    sizes = check_sweep(base, delta, basis, group, **others)
    ranks = target_ranks_outputs(base, delta).zero_()
    if ranks.numel() == 0:
        return ranks
    config, kind, tensors, counts, row_blocks = prepared("target_ranks", sizes, base, delta, basis, group, precision)
    # The largest number not above each threshold: a logit exceeds the one just where it exceeds the other.
    bars = thresholds.to(work_dtype(base))
    bars = torch.where(bars.double() > thresholds, bars.nextafter(torch.full_like(bars, -torch.inf)), bars)
    tensors = *tensors, tokens.contiguous(), bars.contiguous(), ranks
    tiles = config.tiles(base.shape[1], "BLOCK_V")
    with torch.cuda.device_of(base):
        target_ranks_kernel[(row_blocks * config.splits,)](
            *tensors, *counts, config.splits, tiles, RANK=sizes["r"], PRECISION=kind, **config.options
        )
        return torch.where(((group < 0) | (group >= len(basis)))[:, None], -1, ranks)


register_outputs("target_ranks_triton", target_ranks_outputs)
