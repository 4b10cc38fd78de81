"""logits_lse on the tile core: the epilogue keeps the running maximum and sum of an online softmax for every row.

Each split of the vocabulary leaves partial sums, which are joined in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.exp_sums import logsumexp, online_sum, reference
from pyfastcircuits.kernels.sweep import (
    OPTIONS,
    block_and_split,
    clean_rows,
    clean_tile,
    logits_of,
    next_group,
    prepared,
    rows_of,
)
from pyfastcircuits.kernels.tile import load_parts, row_length, tiles_of, work_type
from pyfastcircuits.shapes import check_sweep, logits_lse_outputs, register_outputs, work_dtype


@triton.jit
def logits_lse_kernel(
    base,  # [T, V]
    delta,  # this and basis as `common.for_products` makes them
    basis,
    order,  # [P] ablations sorted by group
    group,  # [P]
    references,  # [S, P, T] partial
    totals,  # [S, P, T] partial
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
    out, _t, home, poison, inside = rows_of(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    base = clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P, BLOCK_T)
    rows = delta + out * row_length(RANK, PRECISION)
    left = load_parts(rows, RANK, BLOCK_K, PRECISION)
    first, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    g = next_group(home, -1, groups)
    while g < groups:
        highest = tl.full([BLOCK_P * BLOCK_T], float("-inf"), T)
        total = tl.zeros([BLOCK_P * BLOCK_T], T)
        clean = clean_tile(base, first * BLOCK_V + tl.arange(0, BLOCK_V), vocabulary)
        for tile in range(first, end):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            # The next tile's clean logits come while this one's product is made.
            following = clean_tile(base, columns + BLOCK_V, vocabulary)
            logits = logits_of(clean, left, rows, basis, g, stride, columns, vocabulary, RANK, PRECISION, CAP)
            highest, total = online_sum(highest, total, logits)
            clean = following
        here = inside & (home == g)
        place = split.to(tl.int64) * pairs * positions + out
        tl.store(references + place, reference(highest) + poison.to(T), here)
        tl.store(totals + place, total, here)
        g = next_group(home, g, groups)


@torch.library.custom_op("pyfastcircuits::logits_lse_triton", mutates_args=())
def logits_lse_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    group: Tensor,  # [P]
    precision: str,
    cap: float | None = None,
) -> Tensor:
    """torch.ops.pyfastcircuits.logits_lse by Triton: the same arguments and result, and all precisions.

    A group outside [0, G) gives NaN: CUDA tensors are not read to check this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    sizes = check_sweep(base, delta, basis, group)
    lse = logits_lse_outputs(base, delta)
    if lse.numel() == 0:
        return lse
    config, kind, tensors, counts, row_blocks = prepared("logits_lse", sizes, base, delta, basis, group, precision)
    references, totals = base.new_empty(2, config.splits, *lse.shape, dtype=work_dtype(base))
    constants = {"RANK": sizes["r"], "PRECISION": kind, "CAP": cap}
    tiles = config.tiles(base.shape[1], "BLOCK_V")
    with torch.cuda.device_of(base):
        logits_lse_kernel[(row_blocks * config.splits,)](
            *tensors, references, totals, *counts, config.splits, tiles, **constants, **config.options | OPTIONS
        )
        return logsumexp(references, totals)


register_outputs("logits_lse_triton", logits_lse_outputs)
