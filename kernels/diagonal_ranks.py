"""diagonal_ranks on the tile core: the epilogue counts the entries of each row that are greater than the one asked for.

That entry comes from a tile of its own, of the columns that a block's rows ask for, multiplied as all tiles are:
entries of equal columns are equal to the bit, and none counts against itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.common import configure, laid_out
from pyfastcircuits.kernels.tile import multiply, rows_of_product, tiles_of
from pyfastcircuits.shapes import check_product, check_shapes, diagonal_ranks_outputs, register_outputs


@triton.jit
def diagonal_ranks_kernel(
    A,  # [N, DEPTH]
    B,  # [DEPTH, stride]
    asked,  # [N] columns
    ranks,  # [N] zeros
    rows,
    columns,
    stride,
    splits,
    tiles_a_split,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the counts of one block of rows in one split of the columns."""
    row, inside, pointers, left = rows_of_product(A, rows, splits, DEPTH, BLOCK_M, BLOCK_K)
    tile = multiply(left, pointers, B, stride, tl.load(asked + row), stride, DEPTH, "ieee")
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_N)[None, :]
    bar = tl.sum(tl.where(diagonal, tile, 0.0), 1)

    count = tl.zeros([BLOCK_M], tl.int32)
    first, end = tiles_of(tl.program_id(0) % splits, tiles_a_split, columns, BLOCK_N)
    for place in range(first, end):
        here = place * BLOCK_N + tl.arange(0, BLOCK_N)
        entries = multiply(left, pointers, B, stride, here, stride, DEPTH, "ieee")
        count += tl.sum(((entries > bar[:, None]) & (here < columns)[None, :]).to(tl.int32), 1)
    tl.atomic_add(ranks + row, count.to(tl.int64), inside, sem="relaxed")  # integers, in any order


@torch.library.custom_op("pyfastcircuits::diagonal_ranks_triton", mutates_args=())
def diagonal_ranks_triton(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    columns: Tensor,  # [N]
) -> Tensor:
    """torch.ops.pyfastcircuits.diagonal_ranks by Triton: the same arguments and result.

    A column outside [0, M) gives -1: CUDA tensors are not read to check this.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    sizes = check_product(A=(A, "N r"), B=(B, "r M"))
    check_shapes(A=(A, "N r"), columns=(columns, "N", int))
    ranks = diagonal_ranks_outputs(A, B, columns).zero_()
    rows, width = len(A), B.shape[1]
    if rows == 0:
        return ranks
    if width == 0:
        raise ValueError(f"B has shape {list(B.shape)}: no columns")
    config, kind = configure("diagonal_ranks", sizes, A)
    B = laid_out(B, kind)
    tensors = A.contiguous(), B, columns.clamp(0, width - 1), ranks
    counts = rows, width, B.shape[1], config.splits, config.tiles(width, "BLOCK_N")
    with torch.cuda.device_of(A):
        grid = (config.count(rows, "BLOCK_M") * config.splits,)
        diagonal_ranks_kernel[grid](*tensors, *counts, DEPTH=sizes["r"], **config.options)
        return torch.where((columns < 0) | (columns >= width), -1, ranks)


register_outputs("diagonal_ranks_triton", diagonal_ranks_outputs)
