"""pair_norms on the tile core: the epilogue adds the squares of a tile of products to the sum of each pair.

A program has the products of BLOCK_N left factors with BLOCK_M right ones. It walks over them by BLOCK_R rows and
BLOCK_S columns of every factor at a time, so that a tile is full whatever the ranks; both factors are read along their
inner dimension. Only the sums [N, M] are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.gradients import register_pair_norms
from pyfastcircuits.kernels.common import configure, laid_out
from pyfastcircuits.kernels.tile import load_left, multiply, work_type
from pyfastcircuits.shapes import check_product, check_shapes, pair_norms_outputs, register_outputs

GROUP = tl.constexpr(8)  # blocks of left factors that share a block of right ones, from the L2 cache


@triton.jit
def pair_norms_kernel(
    left,  # [N, r, DEPTH]
    right,  # [M, s, DEPTH]
    before,  # [M] or None
    squares,  # [N, M] zeros
    lefts,
    rights,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared norms of one block of pairs."""
    T: tl.constexpr = work_type(left.dtype.element_ty)
    left_blocks = tl.cdiv(lefts, BLOCK_N)
    right_blocks = tl.cdiv(rights, BLOCK_M)
    block = tl.program_id(0)
    left_block, right_block = tl.swizzle2d(
        block // right_blocks, block % right_blocks, left_blocks, right_blocks, GROUP
    )
    i = left_block * BLOCK_N + tl.arange(0, BLOCK_N)
    j = right_block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (i < lefts)[:, None] & (j < rights)[None, :]
    if before is not None:
        here = here & (i[:, None] < tl.load(before + j, j < rights, 0)[None, :])
    if tl.max(here.to(tl.int32)) > 0:
        # Rows and columns of a tile; those past the ends of a factor, or of all factors, repeat the last.
        row = tl.arange(0, BLOCK_N * BLOCK_R)
        column = tl.arange(0, BLOCK_M * BLOCK_S)
        home = tl.minimum(left_block * BLOCK_N + row // BLOCK_R, lefts - 1).to(tl.int64) * RANK
        source = tl.minimum(right_block * BLOCK_M + column // BLOCK_S, rights - 1).to(tl.int64) * WIDTH
        total = tl.zeros([BLOCK_N, BLOCK_M], T)
        for first_row in range(0, RANK, BLOCK_R):
            within = first_row + row % BLOCK_R
            rows = left + (home + tl.minimum(within, RANK - 1)) * DEPTH
            kept = load_left(rows, 0, DEPTH, BLOCK_K)
            for first_column in range(0, WIDTH, BLOCK_S):
                across = first_column + column % BLOCK_S
                columns = (source + tl.minimum(across, WIDTH - 1)) * DEPTH
                end = rights * tl.full([], WIDTH * DEPTH, tl.int64)
                product = multiply(kept, rows, right, 1, columns, end, DEPTH, PRECISION)
                product = tl.where((within < RANK)[:, None] & (across < WIDTH)[None, :], product, 0.0)
                sums = tl.sum(tl.reshape(product * product, [BLOCK_N * BLOCK_R, BLOCK_M, BLOCK_S]), 2)
                total += tl.sum(tl.reshape(sums, [BLOCK_N, BLOCK_R, BLOCK_M]), 1)
        tl.store(squares + i.to(tl.int64)[:, None] * rights + j[None, :], total, here)


@torch.library.custom_op("pyfastcircuits::pair_norms_triton", mutates_args=())
def pair_norms_triton(
    left: Tensor,  # [N, r, d]
    right: Tensor,  # [M, d, s]
    before: Tensor | None,  # [M]
    precision: str,
) -> Tensor:
    """torch.ops.pyfastcircuits.pair_norms by Triton, multiplied out, in all precisions.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a precision that the dtype does not have.
    """
    sizes = check_product(left=(left, "N r d"), right=(right, "M d s"))
    check_shapes(left=(left, "N r d"), before=(before, str(sizes["M"]), int))
    squares = pair_norms_outputs(left, right).zero_()
    if 0 in sizes.values():
        return squares
    config, kind = configure("pair_norms", sizes, left, precision)
    left, right = (laid_out(x, kind) for x in (left, right.mT))
    before = None if before is None else before.contiguous()
    grid = (config.count(len(left), "BLOCK_N") * config.count(len(right), "BLOCK_M"),)
    constants = {"RANK": sizes["r"], "DEPTH": left.shape[2], "WIDTH": sizes["s"], "PRECISION": kind}
    with torch.cuda.device_of(left):
        pair_norms_kernel[grid](left, right, before, squares, len(left), len(right), **constants, **config.options)
        return squares.sqrt_()


register_outputs("pair_norms_triton", pair_norms_outputs)
register_pair_norms(pair_norms_triton)
