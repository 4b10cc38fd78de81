"""joint_nll on the tile core: a tile of the vocabulary is multiplied for all single ablations, then added up by pairs.

Which single ablations a pair adds is known at run time alone, and registers cannot be chosen then: a program stores its
products in a scratch of its own, which is small enough for the caches, and reads them back for every pair. The running
maximum and sum of each pair's online softmax lie beside it, in two copies: tiles read one and write the other, in turn,
so that no thread can see what another has already written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.common import configure, laid_out, rounded
from pyfastcircuits.kernels.exp_sums import LOG2E, capped, clean_means, expected, logsumexp, online_sum
from pyfastcircuits.kernels.sweep import existing
from pyfastcircuits.kernels.tile import load_left, multiply, tiles_of, work_type
from pyfastcircuits.shapes import check_shapes, joint_nll_outputs, register_outputs, work_dtype

CHANGES_WARPS = 2  # times as many where changes are summed too: the registers of fewer would spill


@triton.jit
def joint_nll_kernel(
    base,  # [T, V]
    delta,  # [S, T, r]
    basis,  # [G, r, stride]
    tokens,  # [T, K]
    group,  # [S]
    starts,  # [S + 1]: where each single's pairs, of which it is the first, start and end
    first,  # [P], sorted
    second,  # [P]
    clean_lse,  # [T], or None for no changes
    products,  # [programs, S, BLOCK_T, BLOCK_V] scratch
    highest,  # [2, splits, P, T] partial; the first copy is the result
    totals,  # [2, splits, P, T] partial
    changes,  # [2, splits, P, T] partial
    picked,  # [P, T, K] zeros
    singles,
    pairs,
    positions,
    vocabulary,
    groups,
    choices,
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
    """Sums of exponentials of all pairs at one block of positions over one split of the vocabulary."""
    T: tl.constexpr = work_type(base.dtype.element_ty)
    TILE: tl.constexpr = BLOCK_T * BLOCK_V
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < positions
    t = tl.minimum(row, positions - 1).to(tl.int64)
    products += tl.program_id(0).to(tl.int64) * singles * TILE
    row = tl.arange(0, BLOCK_T) * BLOCK_V
    cell = row[:, None] + tl.arange(0, BLOCK_V)[None, :]
    if clean_lse is not None:
        clean_lse = tl.load(clean_lse + t).to(T)
    begin, end = tiles_of(split, tiles_a_split, vocabulary, BLOCK_V)
    for tile in range(begin, end):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        there = (columns < vocabulary)[None, :]
        for single in range(singles):
            home, poison = existing(tl.load(group + single), groups)
            rows = delta + (single * positions + t) * RANK
            left = load_left(rows, 0, RANK, BLOCK_K)
            start = basis + home * RANK * stride
            product = multiply(left, rows, start, stride, columns, stride, RANK, PRECISION)
            tl.store(products + single * TILE + cell, product + poison.to(T))
        tl.debug_barrier()

        clean = tl.load(base + t[:, None] * vocabulary + columns[None, :], there, float("-inf")).to(T)
        # The last tile writes the first copy.
        old = (end - tile) % 2 * splits + split
        new = (end - tile - 1) % 2 * splits + split
        for single in range(singles):
            begun = clean + tl.load(products + single * TILE + cell)
            # Both ends are loaded: Triton 3.6 drops a scalar that this loop would carry from one single to the next.
            for p in range(tl.load(starts + single), tl.load(starts + single + 1)):
                logits = begun + tl.load(products + tl.load(second + p) * TILE + cell)
                logits = tl.where(there, capped(logits, CAP), float("-inf"))
                source = (old.to(tl.int64) * pairs + p) * positions + t
                target = (new.to(tl.int64) * pairs + p) * positions + t
                before = tl.load(highest + source, inside & (tile > begin), float("-inf"))
                total = tl.load(totals + source, inside & (tile > begin), 0.0)
                tallest, total = online_sum(before, total, logits)
                tl.store(highest + target, tallest, inside)
                tl.store(totals + target, total, inside)
                if clean_lse is not None:
                    change = tl.load(changes + source, inside & (tile > begin), 0.0)
                    change += expected(logits, clean, clean_lse, there, CAP)
                    tl.store(changes + target, change, inside)

        for k in range(choices):
            token = tl.load(tokens + t * choices + k)
            offset = token - tile * BLOCK_V
            here = inside & (offset >= 0) & (offset < BLOCK_V) & (token < vocabulary)
            if tl.max(here.to(tl.int32)) > 0:
                start = tl.load(base + t * vocabulary + token, here, 0.0).to(T)
                for p in range(pairs):
                    one = tl.load(products + tl.load(first + p) * TILE + row + offset, here, 0.0)
                    other = tl.load(products + tl.load(second + p) * TILE + row + offset, here, 0.0)
                    logit = capped(start + one + other, CAP).to(tl.float64)
                    tl.store(picked + (p * positions + t) * choices + k, logit, here)
        tl.debug_barrier()


@torch.library.custom_op("pyfastcircuits::joint_nll_triton", mutates_args=())
def joint_nll_triton(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [S, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    group: Tensor,  # [S]
    pairs: Tensor,  # [P, 2]
    clean_lse: Tensor | None,  # [T]
    precision: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.pyfastcircuits.joint_nll by Triton: the same arguments and results, and precision "tf32" as well.

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
    lse, picked, change = joint_nll_outputs(base, delta, basis, tokens, group, pairs, clean_lse)
    if lse.numel() == 0:
        return lse, picked, change
    config, kind = configure("joint_nll", sizes, base, precision)
    work, singles, positions = work_dtype(base), len(delta), len(base)
    chosen = pairs.clamp(0, singles - 1)
    order = chosen[:, 0].argsort(stable=True)
    first, second = chosen[order].T.contiguous()
    starts = torch.searchsorted(first, torch.arange(singles + 1, device=base.device))
    delta, basis = rounded(delta, kind), laid_out(basis, kind)
    shape = (2, config.splits, len(pairs), positions)
    highest, totals = base.new_full(shape, -torch.inf, dtype=work), base.new_zeros(shape, dtype=work)
    changes, moved = None, None
    if clean_lse is not None and cap:
        clean_lse, changes = clean_lse.contiguous(), torch.zeros_like(totals)
    elif clean_lse is not None:
        moved, clean_lse = _singles_change(base, delta, basis, group, clean_lse, work), None
    programs = config.count(positions, "BLOCK_T") * config.splits
    products = base.new_empty(programs, singles, config.blocks["BLOCK_T"] * config.blocks["BLOCK_V"], dtype=work)
    sorted_picked = torch.zeros_like(picked)
    tensors = base.contiguous(), delta, basis, tokens.contiguous(), group.contiguous(), starts, first, second
    results = clean_lse, products, highest, totals, changes, sorted_picked
    counts = singles, len(pairs), *base.shape, len(basis), tokens.shape[1], basis.shape[2], config.splits
    options = config.options | {"num_warps": config.num_warps * (1 if changes is None else CHANGES_WARPS)}
    constants = {"RANK": sizes["r"], "PRECISION": precision, "CAP": cap}
    with torch.cuda.device_of(base):
        tiles = config.tiles(base.shape[1], "BLOCK_V")
        joint_nll_kernel[(programs,)](*tensors, *results, *counts, tiles, **constants, **options)
        tallest = highest[0]
        references = torch.where(tallest.isfinite(), tallest * LOG2E.value, 0.0)
        poison = torch.where((pairs == chosen).all(-1), 0.0, torch.nan).double()[:, None]
        lse[order] = logsumexp(references, totals[0])
        picked[order] = sorted_picked
        if moved is not None:
            change = moved[chosen].sum(1) + poison
        elif changes is not None:
            change[order] = changes[0].sum(0, dtype=torch.float64)
            change += poison
        lse += poison
        picked += poison[..., None]
    return lse, picked, change


def _singles_change(
    base: Tensor, delta: Tensor, basis: Tensor, group: Tensor, clean_lse: Tensor, work: torch.dtype
) -> Tensor:
    """Expected changes [S, T] of the single ablations under the clean run: without a cap a pair's is their sum."""
    _, mean_basis = clean_means(base, basis, clean_lse, work)
    home = group.clamp(0, len(basis) - 1)
    moved = (delta.to(work) * mean_basis[home]).sum(-1, dtype=torch.float64)
    return torch.where((group == home)[:, None], moved, torch.nan)


register_outputs("joint_nll_triton", joint_nll_outputs)
