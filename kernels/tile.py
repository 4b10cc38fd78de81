"""The tile core: one tile of a low-rank product, which the op's epilogue consumes before anything is stored.

A kernel holds pointers to the rows of its left factor and to the start of its right one, both contiguous along their
last axis. `multiply` gives one tile of the product, in registers; the op is the epilogue that follows. A left tile that
spans the whole inner dimension is loaded once, by `load_left`, and kept.
"""

import os

import triton
import triton.language as tl

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
