"""The ablated logits base[t] + delta[p, t] @ basis[group[p]], a tile at a time: what sweeps share.

A block's rows are BLOCK_P ablations x BLOCK_T positions: ablations at the same position share a row of clean logits,
those of one group a tile of the basis. Ablations are sorted by group, and a block walks over the vocabulary once for
each group that it has:

    g = next_group(home, -1, groups)
    while g < groups:
        ...
        g = next_group(home, g, groups)
"""

import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.common import configure, for_products, rounded
from pyfastcircuits.kernels.configs import Config
from pyfastcircuits.kernels.exp_sums import capped
from pyfastcircuits.kernels.tile import multiply_basis, work_type

OPTIONS = {"maxnreg": 255}  # left to itself, ptxas would rather spill than have few warps


@triton.jit
def block_and_split(pairs, splits, BLOCK_P: tl.constexpr):
    """A program's block of rows and split of the vocabulary.

    Programs that run together differ in their ablations first: they read the same clean logits from the L2 cache.
    """
    pair_blocks = tl.cdiv(pairs, BLOCK_P)
    place = tl.program_id(0) // pair_blocks
    return place // splits * pair_blocks + tl.program_id(0) % pair_blocks, place % splits


@triton.jit
def existing(asked, groups):
    """The group to read for one that is asked for, and what to add to its results: NaN where there is no such group."""
    home = tl.minimum(tl.maximum(asked, 0), groups - 1)
    return home, tl.where(asked == home, 0.0, float("nan"))


@triton.jit
def rows_of(order, group, pairs, positions, groups, block, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Place in [P, T], position, group, NaN or 0 to add, and whether to store, of every row of a block; all [M].

    Rows past the ends repeat the last ablation or position.
    """
    row = tl.arange(0, BLOCK_P * BLOCK_T)
    pair_blocks = tl.cdiv(pairs, BLOCK_P)
    slot = block % pair_blocks * BLOCK_P + row // BLOCK_T
    t = block // pair_blocks * BLOCK_T + row % BLOCK_T
    pair = tl.load(order + tl.minimum(slot, pairs - 1))
    home, poison = existing(tl.load(group + pair), groups)
    inside = (slot < pairs) & (t < positions)
    t = tl.minimum(t, positions - 1).to(tl.int64)
    return pair * positions + t, t, home.to(tl.int32), poison, inside


@triton.jit
def clean_rows(base, pairs, positions, vocabulary, block, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """Pointers to the clean logits of a block's positions, [BLOCK_T]: its ablations share them."""
    t = block // tl.cdiv(pairs, BLOCK_P) * BLOCK_T + tl.arange(0, BLOCK_T)
    return base + tl.minimum(t, positions - 1).to(tl.int64) * vocabulary


@triton.jit
def next_group(home, after, groups):
    """The lowest group above `after` of a block's rows; `groups` where there is none."""
    return tl.min(tl.where(home > after, home, groups)).to(tl.int64)


@triton.jit
def clean_tile(clean_rows, columns, end):
    """Clean logits [BLOCK_T, N] in the type of sums, without the cap; -inf in columns from `end` on."""
    clean = tl.load(clean_rows[:, None] + columns[None, :], (columns < end)[None, :], float("-inf"))
    return clean.to(work_type(clean.dtype))


@triton.jit
def spread(x, P: tl.constexpr):
    """What positions [BLOCK_T, N] share, for all ablations of the block [P * BLOCK_T, N], by shared memory."""
    T: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (P, T, N)), (P * T, N))


@triton.jit
def logits_of(
    clean,  # [BLOCK_T, N]
    left,  # from tile.load_parts
    rows,
    basis,
    g,
    stride,
    columns,  # [N]
    end,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """The ablated logits [M, N]; -inf in columns from `end` on."""
    # Added after the product: a sum that starts from a large logit would round at every step.
    clean = spread(clean, rows.shape[0] // clean.shape[0])
    logits = multiply_basis(left, rows, basis, g, stride, columns, end, RANK, PRECISION) + clean
    if CAP is not None:
        logits = tl.where((columns < end)[None, :], capped(logits, CAP), float("-inf"))
    return logits


def prepared(
    op: str, sizes: dict[str, int], base: Tensor, delta: Tensor, basis: Tensor, group: Tensor, precision: str
) -> tuple[Config, str, tuple[Tensor, ...], tuple[int, ...], int]:
    """How `op` is launched; what multiplies; base, delta, basis, the order of ablations by group, and group,
    as kernels read them; the sizes P, T, V, G and that basis' stride; and the number of blocks of rows.

    Raises:
        ValueError: no group at all, or a precision that float64 does not have.
    """
    if len(basis) == 0:
        raise ValueError(f"basis has shape {list(basis.shape)}: no groups")
    config, kind = configure(op, sizes, base, precision)
    factors = for_products(rounded(delta, kind), rounded(basis, kind), kind)
    tensors = base.contiguous(), *factors, group.argsort(stable=True), group.contiguous()
    row_blocks = config.count(len(delta), "BLOCK_P") * config.count(len(base), "BLOCK_T")
    return config, kind, tensors, (len(delta), *base.shape, len(basis), factors[1].shape[2]), row_blocks
