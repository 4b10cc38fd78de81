"""sweep_nll on the tile core: the epilogue sums what each ablation changes of the clean run's probabilities.

Each split of the vocabulary leaves partial sums, which are joined in order. The clean probabilities are made once for
all ablations of a block: an exponential for each position and token, of which a block has BLOCK_P times fewer than
products. `effects` has the forms, and `exact` what is left to fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.effects import (
    SMALL,
    bounds_of,
    lanes,
    log_probability,
    probability,
    saturation,
    stretchable,
    stretched,
    sums_of,
    under_cap,
)
from pyfastcircuits.kernels.exact import Rows, effects, nothing
from pyfastcircuits.kernels.sweep import (
    OPTIONS,
    block_and_split,
    clean_rows,
    clean_tile,
    next_group,
    prepared,
    rows_of,
    spread,
)
from pyfastcircuits.kernels.tile import load_parts, multiply_basis, row_length, tiles_of, work_type
from pyfastcircuits.shapes import check_sweep, register_outputs, sweep_nll_outputs, work_dtype

LANES = tl.constexpr(8)  # partial sums of a row: a thread shares none of them while it walks over tiles
WIDE_OPTIONS = OPTIONS | {"num_warps": 8}  # with scales or a cap


@triton.jit
def _walk(
    base,  # [BLOCK_T] pointers
    scale,  # [M] or None
    less_1,  # [M]: the scale less 1
    lse,  # [BLOCK_T]
    bar,  # [BLOCK_T]
    left,  # from tile.load_parts
    rows,
    basis,
    g,
    stride,
    vocabulary,
    first,
    end,
    RANK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FAR: tl.constexpr,
    MEANS: tl.constexpr,
):
    """What `sums_of` gives and, with MEANS, p * change, summed over tiles of the vocabulary; [M] each."""
    T: tl.constexpr = work_type(left[0].dtype)
    M: tl.constexpr = rows.shape[0]
    P: tl.constexpr = M // base.shape[0]
    gain = tl.zeros([M, LANES], T)
    total = tl.zeros([M, LANES], T)
    raised = tl.zeros([M, LANES], T)
    size = tl.zeros([M, LANES], T)
    mean = tl.zeros([M, LANES], T)
    clean = clean_tile(base, first * BLOCK_V + tl.arange(0, BLOCK_V), vocabulary)
    for tile in range(first, end):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        # The next tile's clean logits come while this one's product is made.
        following = clean_tile(base, columns + BLOCK_V, vocabulary)
        log_p = log_probability(clean, lse, CAP)
        p = spread(probability(log_p, clean, bar), P)
        x = multiply_basis(left, rows, basis, g, stride, columns, vocabulary, RANK, PRECISION)
        if scale is not None:
            x = x * scale[:, None] + spread(stretchable(log_p, clean, CAP), P) * less_1[:, None]
        if CAP is not None:
            bent, slope = saturation(clean, CAP)
            x = under_cap(x, spread(bent, P), spread(slope, P), CAP)
        sums = sums_of(p, x, FAR, LANES)
        gain += sums[0]
        if FAR:
            total += sums[1]
            raised += sums[2]
            size += sums[3]
        if MEANS:
            mean += lanes(p * x, LANES)
        clean = following
    return tl.sum(gain, 1), tl.sum(total, 1), tl.sum(raised, 1), tl.sum(size, 1), tl.sum(mean, 1)


@triton.jit
def sweep_nll_kernel(
    base,  # [T, V]
    delta,  # this and basis as `common.for_products` makes them
    basis,
    order,  # [P] ablations sorted by group
    group,  # [P]
    scale,  # [P, T] or None
    clean_lse,  # [T]
    bar,  # [T]: the least of the clean logits that are summed in fp64
    bounds,  # [P, T]
    gains,  # [S, P, T] partial
    totals,  # [S, P, T] partial
    raised,  # [S, P, T] partial
    sizes,  # [S, P, T] partial
    means,  # [S, P, T] partial, or None
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
    """The sums of one block of rows over one split of the vocabulary."""
    T: tl.constexpr = work_type(base.dtype.element_ty)
    block, split = block_and_split(pairs, splits, BLOCK_P)
    out, _t, home, _poison, inside = rows_of(order, group, pairs, positions, groups, block, BLOCK_P, BLOCK_T)
    base = clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P, BLOCK_T)
    place = tl.minimum(block // tl.cdiv(pairs, BLOCK_P) * BLOCK_T + tl.arange(0, BLOCK_T), positions - 1)
    lse = tl.load(clean_lse + place)
    bar = tl.load(bar + place)
    rows = delta + out * row_length(RANK, PRECISION)
    left = load_parts(rows, RANK, BLOCK_K, PRECISION)
    less_1 = None
    if scale is not None:
        stretch = tl.load(scale + out).to(tl.float64)
        less_1 = (stretch - 1).to(T)
        scale = stretch.to(T)
    far = tl.max(tl.load(bounds + out)) > SMALL
    first, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    MEANS: tl.constexpr = means is not None
    g = next_group(home, -1, groups)
    while g < groups:
        here = inside & (home == g)
        where = split.to(tl.int64) * pairs * positions + out
        if far:
            gain, total, more, size, mean = _walk(
                base, scale, less_1, lse, bar, left, rows, basis, g, stride, vocabulary, first,
                end, RANK, BLOCK_V, PRECISION, CAP, True, MEANS,
            )  # fmt: skip
        else:
            gain, total, more, size, mean = _walk(
                base, scale, less_1, lse, bar, left, rows, basis, g, stride, vocabulary, first,
                end, RANK, BLOCK_V, PRECISION, CAP, False, MEANS,
            )  # fmt: skip
        tl.store(gains + where, gain, here)
        tl.store(totals + where, total, here)
        tl.store(raised + where, more, here)
        tl.store(sizes + where, size, here)
        if MEANS:
            tl.store(means + where, mean, here)
        g = next_group(home, g, groups)


@torch.library.custom_op("pyfastcircuits::sweep_nll_triton", mutates_args=())
def sweep_nll_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [P]
    scale: Tensor | None,  # [P, T]
    clean_lse: Tensor,  # [T]
    mean: bool,
    precision: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.sweep_nll by Triton: the same arguments and results, and all precisions.

    A group outside [0, G) gives NaN: CUDA tensors are not read to check this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    others = {"tokens": (tokens, "T K", int), "scale": (scale, "P T", float), "clean_lse": (clean_lse, "T", float)}
    sizes = check_sweep(base, delta, basis, group, **others)
    if 0 in (sizes["P"], *base.shape):
        return nothing(sweep_nll_outputs(base, delta, basis, tokens, group, scale, clean_lse, mean))
    config, kind, tensors, counts, row_blocks = prepared("sweep_nll", sizes, base, delta, basis, group, precision)
    base, left, right, order, group = tensors
    delta, basis = delta.contiguous(), basis.contiguous()
    work, clean_lse = work_dtype(base), clean_lse.double().contiguous()
    bounds = bounds_of(delta, basis, group, work, kind)
    if scale is not None:
        scale = scale.contiguous()
        bounds = stretched(bounds, scale, base, clean_lse, cap).to(work)
    constants = {"RANK": sizes["r"], "PRECISION": kind, "CAP": cap}
    tiles = config.tiles(base.shape[1], "BLOCK_V")
    options = config.options | (OPTIONS if scale is None and cap is None else WIDE_OPTIONS)

    def summed(bar: Tensor) -> tuple[Tensor, ...]:
        sums = base.new_empty(5 if mean and cap else 4, config.splits, *bounds.shape, dtype=work).unbind()
        sweep_nll_kernel[(row_blocks * config.splits,)](
            base, left, right, order, group, scale, clean_lse, bar, bounds, *sums, *[None] * (5 - len(sums)),
            *counts, config.splits, tiles, **constants, **options,
        )  # fmt: skip
        return sums

    with torch.cuda.device_of(base):
        rows = Rows(base, delta, basis, group, None, None, scale, clean_lse)
        there = (group >= 0) & (group < len(basis))
        return effects(rows, bounds, tokens, there, mean, cap, summed)


register_outputs("sweep_nll_triton", sweep_nll_outputs)
