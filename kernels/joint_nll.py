"""joint_nll on the tile core: a tile of the vocabulary is multiplied for all single ablations, then added up by pairs.

Which single ablations a pair adds is known at run time alone, and registers cannot be chosen then: a program stores its
products in a scratch of its own, which is small enough for the caches, and reads them back for every pair. The sums of
each pair lie beside it, in two copies: tiles read one and write the other, in turn, so that no thread can see what
another has already written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.common import configure, for_products, rounded
from pyfastcircuits.kernels.effects import (
    SMALL,
    bounds_of,
    log_probability,
    probability,
    saturation,
    sums_of,
    under_cap,
)
from pyfastcircuits.kernels.exact import Rows, effects, nothing
from pyfastcircuits.kernels.sweep import clean_tile, existing
from pyfastcircuits.kernels.tile import load_parts, multiply_basis, row_length, tiles_of
from pyfastcircuits.shapes import check_shapes, joint_nll_outputs, register_outputs, work_dtype

CAPPED_WARPS = 8  # the registers of fewer would spill


@triton.jit
def joint_nll_kernel(
    base,  # [T, V]
    delta,  # this and basis as `common.for_products` makes them
    basis,
    group,  # [S]
    starts,  # [S + 1]: where each single's pairs, of which it is the first, start and end
    second,  # [P], sorted by the first
    clean_lse,  # [T]
    bar,  # [T]: the least of the clean logits that are summed in fp64
    bounds,  # [P, T]
    products,  # [programs, S, BLOCK_T, BLOCK_V] scratch
    gains,  # [2, splits, P, T] partial; the first copy is the result
    totals,  # [2, splits, P, T] partial
    raised,  # [2, splits, P, T] partial
    sizes,  # [2, splits, P, T] partial
    means,  # [2, splits, P, T] partial, or None
    singles,
    pairs,
    positions,
    vocabulary,
    groups,
    stride,
    splits,
    tiles_a_split,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Sums of all pairs at one block of positions over one split of the vocabulary."""
    TILE: tl.constexpr = BLOCK_T * BLOCK_V
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < positions
    t = tl.minimum(row, positions - 1).to(tl.int64)
    products += tl.program_id(0).to(tl.int64) * singles * TILE
    cell = (tl.arange(0, BLOCK_T) * BLOCK_V)[:, None] + tl.arange(0, BLOCK_V)[None, :]
    lse = tl.load(clean_lse + t)
    bar = tl.load(bar + t)
    begin, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    for tile in range(begin, end):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        for single in range(singles):
            home, _poison = existing(tl.load(group + single), groups)
            rows = delta + (single * positions + t) * row_length(RANK, PRECISION)
            left = load_parts(rows, RANK, BLOCK_K, PRECISION)
            product = multiply_basis(left, rows, basis, home, stride, columns, vocabulary, RANK, PRECISION)
            tl.store(products + single * TILE + cell, product)
        tl.debug_barrier()

        clean = clean_tile(base + t * vocabulary, columns, vocabulary)
        p = probability(log_probability(clean, lse, CAP), clean, bar)
        if CAP is not None:
            bent, slope = saturation(clean, CAP)
        # The last tile writes the first copy.
        old = (end - tile) % 2 * splits + split
        new = (end - tile - 1) % 2 * splits + split
        for single in range(singles):
            begun = tl.load(products + single * TILE + cell)
            # Both ends are loaded: Triton 3.6 drops a scalar that this loop would carry from one single to the next.
            for pair in range(tl.load(starts + single), tl.load(starts + single + 1)):
                x = begun + tl.load(products + tl.load(second + pair) * TILE + cell)
                if CAP is not None:
                    x = under_cap(x, bent, slope, CAP)
                source = (old.to(tl.int64) * pairs + pair) * positions + t
                target = (new.to(tl.int64) * pairs + pair) * positions + t
                begun_before = inside & (tile > begin)
                if tl.max(tl.load(bounds + pair * positions + t)) > SMALL:
                    gain, total, more, size = sums_of(p, x, True, 1)
                    total = tl.sum(total, 1) + tl.load(totals + source, begun_before, 0.0)
                    more = tl.sum(more, 1) + tl.load(raised + source, begun_before, 0.0)
                    size = tl.sum(size, 1) + tl.load(sizes + source, begun_before, 0.0)
                    tl.store(totals + target, total, inside)
                    tl.store(raised + target, more, inside)
                    tl.store(sizes + target, size, inside)
                else:
                    gain, _total, _more, _size = sums_of(p, x, False, 1)
                gain = tl.sum(gain, 1) + tl.load(gains + source, begun_before, 0.0)
                tl.store(gains + target, gain, inside)
                if means is not None:
                    mean = tl.sum(p * x, 1) + tl.load(means + source, begun_before, 0.0)
                    tl.store(means + target, mean, inside)
        tl.debug_barrier()


@torch.library.custom_op("pyfastcircuits::joint_nll_triton", mutates_args=())
def joint_nll_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [S]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor,  # [T]
    mean: bool,
    precision: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.joint_nll by Triton: the same arguments and results, and all precisions.

    A pair of an ablation outside [0, S), or with a group outside [0, G), gives NaN: CUDA tensors are not read to check
    this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    sizes = check_shapes(
        base=(base, "T V"),
        delta=(delta, "S T r"),
        basis=(basis, "G r V"),
        tokens=(tokens, "T K", int),
        group=(group, "S", int),
        pairs=(pairs, "P 2", int),
        clean_lse=(clean_lse, "T", float),
    )
    if len(pairs) > 0 and 0 in (sizes["S"], sizes["G"]):
        shapes = f"delta {list(delta.shape)} holds no ablation or basis {list(basis.shape)} no group"
        raise ValueError(f"pairs has shape {list(pairs.shape)}, but {shapes}")
    if 0 in (sizes["P"], *base.shape):
        return nothing(joint_nll_outputs(base, delta, basis, tokens, group, pairs, clean_lse, mean))
    config, kind = configure("joint_nll", sizes, base, precision)
    work, singles, positions = work_dtype(base), len(delta), len(base)
    chosen = pairs.clamp(0, singles - 1)
    order = chosen[:, 0].argsort(stable=True)
    first, second = chosen[order].T.contiguous()
    starts = torch.searchsorted(first, torch.arange(singles + 1, device=base.device))
    base, group, clean_lse = base.contiguous(), group.contiguous(), clean_lse.double().contiguous()
    delta, basis = delta.contiguous(), basis.contiguous()
    left, right = for_products(rounded(delta, kind), rounded(basis, kind), kind)
    of_singles = bounds_of(delta, basis, group, work, kind)
    bounds = of_singles[first] + of_singles[second]
    programs = config.count(positions, "BLOCK_T") * config.splits
    tile = config.blocks["BLOCK_T"] * config.blocks["BLOCK_V"]
    counts = singles, len(pairs), *base.shape, len(basis), right.shape[2], config.splits
    constants = {"RANK": sizes["r"], "PRECISION": kind, "CAP": cap}
    options = config.options | {"num_warps": CAPPED_WARPS if cap else config.num_warps}

    def summed(bar: Tensor) -> tuple[Tensor, ...]:
        products = base.new_empty(programs, singles, tile, dtype=work)
        sums = base.new_zeros(5 if mean and cap else 4, 2, config.splits, *bounds.shape, dtype=work).unbind()
        joint_nll_kernel[(programs,)](
            base, left, right, group, starts, second, clean_lse, bar, bounds, products, *sums,
            *[None] * (5 - len(sums)), *counts, config.tiles(base.shape[1], "BLOCK_V"), **constants, **options,
        )  # fmt: skip
        return tuple(each[0] for each in sums)

    with torch.cuda.device_of(base):
        here = (group >= 0) & (group < len(basis))
        there = (pairs[order] == chosen[order]).all(-1) & here[first] & here[second]
        rows = Rows(base, delta, basis, group, first, second, None, clean_lse)
        found = effects(rows, bounds, tokens, there, mean, cap, summed)
        back = order.argsort()
        gain, log_total, picked, means = (x[back] if len(x) else x for x in found)
        return gain, log_total, picked, means


register_outputs("joint_nll_triton", joint_nll_outputs)
