"""The tile core: one tile of a low-rank product, which the op's epilogue consumes before anything is stored.

A kernel holds pointers to the rows of its left factor and to the start of its right one, both contiguous along their
last axis. `multiply` gives one tile of the product, in registers; the op is the epilogue that follows. A left tile that
spans the whole inner dimension is loaded once, by `load_left`, and kept.
"""

import os

import triton
import triton.language as tl

from pyfastcircuits.kernels.configs import BY_COLUMNS

# The interpreter multiplies the bit patterns of bfloat16 operands.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.constexpr_function
def work_type(element):
    """The type of sums: the factors' own, and float32 for bfloat16."""
    return tl.float64 if element == tl.float64 else tl.float32


@triton.constexpr_function
def input_precision(kind):
    """How tl.dot multiplies fp32 operands, by the name that `configs.arithmetic` has for it; others it does not ask."""
    return kind if kind in ("tf32", "tf32x3") else "ieee"


@triton.constexpr_function
def by_columns(kind):
    """Whether a basis is read column by column."""
    return kind in BY_COLUMNS


@triton.jit
def tiles_of(split, tiles_a_split, columns, BLOCK: tl.constexpr):
    """The first tile of columns of a split, and the end of its tiles."""
    return split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tl.cdiv(columns, BLOCK))


@triton.jit
def load_left(
    rows,  # [M] pointers
    first,  # inner index
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile [M, BLOCK_K] of the left factor, zero past DEPTH."""
    inner = first + tl.arange(0, BLOCK_K)
    return tl.load(rows[:, None] + inner[None, :], (inner < DEPTH)[None, :], 0.0)


@triton.jit
def rows_of_product(A, rows, splits, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program's rows [M], whether they exist, pointers to them, and their first tile.

    Rows past the end repeat the last. Programs are numbered by block of rows, then split of the columns.
    """
    row = tl.program_id(0) // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = tl.minimum(row, rows - 1).to(tl.int64)
    pointers = A + kept * DEPTH
    return kept, row < rows, pointers, load_left(pointers, 0, DEPTH, BLOCK_K)


@triton.jit
def load_right(
    start,  # pointer to [DEPTH, end]
    stride,
    columns,  # [N], consecutive or not
    end,
    first,  # inner index
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile [BLOCK_K, N] of the right factor, zero past DEPTH and in columns from `end` on."""
    inner = first + tl.arange(0, BLOCK_K)
    pointers = start + inner[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointers, (inner < DEPTH)[:, None] & (columns < end)[None, :], 0.0)


@triton.jit
def nearest_tf32(x):
    """The same as kernels.common.rounded makes of a factor, for one that a kernel makes."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True), x)


@triton.jit
def dot(
    left,  # [M, BLOCK_K]
    right,  # [BLOCK_K, N]
    total,  # [M, N]
    PRECISION: tl.constexpr,
):
    """total + left @ right, by the arithmetic that configs.arithmetic names."""
    if PRECISION == "bf16":
        left = left.to(tl.bfloat16)
        right = right.to(tl.bfloat16)
    if INTERPRETED and left.dtype == tl.bfloat16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=input_precision(PRECISION), out_dtype=total.dtype)


@triton.jit
def multiply(
    left,  # [M, BLOCK_K], used where DEPTH <= BLOCK_K
    rows,  # [M] pointers, used where DEPTH > BLOCK_K
    start,
    stride,
    columns,  # [N]
    end,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product [M, N] of rows of the left factor and columns of the right one, in the type of sums."""
    BLOCK_K: tl.constexpr = left.shape[1]
    total = tl.zeros([rows.shape[0], columns.shape[0]], work_type(left.dtype))
    if DEPTH <= BLOCK_K:
        total = dot(left, load_right(start, stride, columns, end, 0, DEPTH, BLOCK_K), total, PRECISION)
    else:
        for first in range(0, DEPTH, BLOCK_K):
            here = load_left(rows, first, DEPTH, BLOCK_K)
            right = load_right(start, stride, columns, end, first, DEPTH, BLOCK_K)
            total = dot(here, right, total, PRECISION)
    return total


@triton.jit
def multiply_parts(
    left,  # the first parts of all its tiles [M, BLOCK_K], then the second ones; used where they are all there are
    rows,  # [M] pointers to rows of two parts of DEPTH
    start,
    rest,  # from the first part of a column to the second
    columns,  # [N] offsets
    end,
    DEPTH: tl.constexpr,
):
    """The product [M, N] in fp32 of factors in two parts of TF32, but for that of both second parts.

    Tiles are summed by themselves: tensor cores cut off what they add up, and fp32 rounds it.
    """
    M: tl.constexpr = rows.shape[0]
    BLOCK_K: tl.constexpr = left[0].shape[1]
    COUNT: tl.constexpr = len(left) // 2
    total = tl.zeros([M, columns.shape[0]], tl.float32)
    if DEPTH <= BLOCK_K * COUNT:
        for tile in tl.static_range(COUNT):
            total += dot_of_parts(left[tile], left[COUNT + tile], start, rest, columns, end, tile * BLOCK_K, DEPTH)
    else:
        for first in range(0, DEPTH, BLOCK_K):
            here = load_left(rows, first, DEPTH, BLOCK_K)
            here_rest = load_left(rows + DEPTH, first, DEPTH, BLOCK_K)
            total += dot_of_parts(here, here_rest, start, rest, columns, end, first, DEPTH)
    return total


@triton.jit
def dot_of_parts(
    left,  # [M, BLOCK_K]
    left_rest,
    start,
    rest,
    columns,  # [N] offsets
    end,
    first,  # inner index
    DEPTH: tl.constexpr,
):
    """What one tile adds to multiply_parts."""
    BLOCK_K: tl.constexpr = left.shape[1]
    right = load_right(start, 1, columns, end, first, DEPTH, BLOCK_K)
    right_rest = load_right(start + rest, 1, columns, end, first, DEPTH, BLOCK_K)
    total = tl.zeros([left.shape[0], columns.shape[0]], tl.float32)
    total = dot(left_rest, right, total, "tf32")
    total = dot(left, right_rest, total, "tf32")
    return dot(left, right, total, "tf32")


@triton.constexpr_function
def row_length(rank, kind):
    """Numbers in a row of the left factor, as `common.for_products` lays it out."""
    return 2 * rank if kind == "tf32x3" else rank


@triton.jit
def load_parts(
    rows,  # [M] pointers
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What multiply_basis keeps of the left factor: a tile; of one in two parts two tiles of each, if that is all."""
    if PRECISION != "tf32x3":
        return (load_left(rows, 0, RANK, BLOCK_K),)
    elif RANK > BLOCK_K and RANK <= 2 * BLOCK_K:
        return (
            load_left(rows, 0, RANK, BLOCK_K),
            load_left(rows, BLOCK_K, RANK, BLOCK_K),
            load_left(rows + RANK, 0, RANK, BLOCK_K),
            load_left(rows + RANK, BLOCK_K, RANK, BLOCK_K),
        )
    else:  # a branch that is not compiled
        return load_left(rows, 0, RANK, BLOCK_K), load_left(rows + RANK, 0, RANK, BLOCK_K)


@triton.jit
def multiply_basis(
    left,  # from load_parts
    rows,
    basis,  # as `common.for_products` lays it out
    g,  # group
    stride,
    columns,  # [N]
    vocabulary,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product [M, N] of rows of the left factor and columns of a group's basis."""
    if by_columns(PRECISION):
        start = basis + g * vocabulary * stride
        columns = columns.to(tl.int64) * stride
        end = tl.cast(vocabulary, tl.int64) * stride
        if PRECISION == "tf32x3":
            return multiply_parts(left, rows, start, stride // 2, columns, end, RANK)
        else:
            return multiply(left[0], rows, start, 1, columns, end, RANK, PRECISION)
    else:  # a branch that is not compiled
        start = basis + g * RANK * stride
        return multiply(left[0], rows, start, stride, columns, stride, RANK, PRECISION)
