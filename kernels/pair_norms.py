"""pair_norms on the tile core: the epilogue sums the squares of a tile's products, block of a pair by block of a pair.

A program has the products of BLOCK_N left factors with BLOCK_M right ones. It walks over them by BLOCK_R rows and
BLOCK_S columns of every factor at a time, so that a tile is full whatever the ranks; both factors are read along their
inner dimension. Only the sums [N, M] are stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.configs import arithmetic, choose
from pyfastcircuits.kernels.tile import load_left, multiply
from pyfastcircuits.ops.reference import pair_norms_gradients

__all__ = ["pair_norms_triton"]

ALIGNMENT = 16  # elements between rows of both factors, so that loads are wide and can run ahead
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
    T: tl.constexpr = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
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
                zeros = tl.zeros([BLOCK_N * BLOCK_R, BLOCK_M * BLOCK_S], T)
                end = rights * tl.full([], WIDTH * DEPTH, tl.int64)
                product = multiply(zeros, kept, rows, right, 1, columns, end, DEPTH, BLOCK_K, PRECISION)
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
    """torch.ops.pyfastcircuits.pair_norms by Triton, multiplied out; precision "tf32" as well.

    Raises:
        ValueError: shapes that do not fit, or a precision that the dtype does not have.
    """
    _check(left, right, before, precision)
    (lefts, rank, depth), (rights, _, width) = left.shape, right.shape
    squares = _outputs(left, right, before, precision).zero_()
    if 0 in (lefts, rights, rank, depth, width):
        return squares
    arch = 90
    if left.is_cuda:
        major, minor = torch.cuda.get_device_capability(left.device)
        arch = 10 * major + minor
    sizes = {"N": lefts, "M": rights, "r": rank, "d": depth, "s": width}
    kind = arithmetic(str(left.dtype).removeprefix("torch."), precision)
    config = choose("pair_norms", sizes, kind, arch)
    left, right = (_packed(x, kind) for x in (left, right.mT))
    with torch.cuda.device_of(left):
        pair_norms_kernel[
            (triton.cdiv(lefts, config.blocks["BLOCK_N"]) * triton.cdiv(rights, config.blocks["BLOCK_M"]),)
        ](
            left,
            right,
            None if before is None else before.contiguous(),
            squares,
            lefts,
            rights,
            RANK=rank,
            DEPTH=left.shape[2],
            WIDTH=width,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **config.blocks,
        )
        return squares.sqrt_()


def _packed(factor: Tensor, kind: str) -> Tensor:
    """A factor [heads, rows, d] in the kernel's dtype, d its last axis in memory and padded to the alignment."""
    if kind == "bf16":
        factor = factor.bfloat16()
    padding = -factor.shape[2] % ALIGNMENT
    if padding:
        factor = torch.nn.functional.pad(factor, (0, padding))
    return factor.contiguous()


@pair_norms_triton.register_fake
def _outputs(left: Tensor, right: Tensor, before: Tensor | None, precision: str) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.new_empty(len(left), len(right), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    left, right, norms = ctx.saved_tensors
    return *pair_norms_gradients(left, right, norms, gradient), None, None


pair_norms_triton.register_autograd(_backward, setup_context=_save)


def _check(left: Tensor, right: Tensor, before: Tensor | None, precision: str) -> None:
    if left.dtype == torch.float64 and precision != "ieee":
        raise ValueError(f"precision is {precision!r}, but left is float64, which has only 'ieee'")
    if right.dtype != left.dtype:
        raise ValueError(f"left is {left.dtype} and right {right.dtype}: expected one dtype")
    if left.dim() != 3 or right.dim() != 3 or left.shape[2] != right.shape[1]:
        raise ValueError(
            f"left has shape {list(left.shape)} and right {list(right.shape)}, expected [N, r, d] and [M, d, s]"
        )
    if before is not None and before.shape != right.shape[:1]:
        raise ValueError(f"before has shape {list(before.shape)}, expected {[len(right)]}")
