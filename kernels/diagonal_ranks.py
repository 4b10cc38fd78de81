"""diagonal_ranks on the tile core: the epilogue counts the entries of each row that are greater than one of them.

That one comes from a tile of its own, the columns asked for by a block's rows, multiplied as all tiles are: entries of
equal columns are equal to the bit, and none counts against itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.configs import arithmetic, choose
from pyfastcircuits.kernels.tile import load_left, multiply

__all__ = ["diagonal_ranks_triton"]

ALIGNMENT = 16  # elements between rows of B, so that loads are wide and can run ahead


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
    """Adds what one block of rows finds in one split of the columns."""
    T: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    pointers = A + tl.minimum(row, rows - 1).to(tl.int64) * DEPTH
    left = load_left(pointers, 0, DEPTH, BLOCK_K)

    own = tl.minimum(block * BLOCK_M + tl.arange(0, BLOCK_N), rows - 1)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], T)
    tile = multiply(zeros, left, pointers, B, stride, tl.load(asked + own), stride, DEPTH, BLOCK_K, "ieee")
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_N)[None, :]
    bar = tl.sum(tl.where(diagonal, tile, 0.0), 1)

    count = tl.zeros([BLOCK_M], tl.int32)
    last = tl.minimum((split + 1) * tiles_a_split, tl.cdiv(columns, BLOCK_N))
    for place in range(split * tiles_a_split, last):
        here = place * BLOCK_N + tl.arange(0, BLOCK_N)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], T)
        entries = multiply(zeros, left, pointers, B, stride, here, stride, DEPTH, BLOCK_K, "ieee")
        count += tl.sum(((entries > bar[:, None]) & (here < columns)[None, :]).to(tl.int32), 1)
    tl.atomic_add(ranks + row, count.to(tl.int64), row < rows, sem="relaxed")  # of integers: in any order the same


@torch.library.custom_op("pyfastcircuits::diagonal_ranks_triton", mutates_args=())
def diagonal_ranks_triton(
    A: Tensor,  # [N, r]
    B: Tensor,  # [r, M]
    columns: Tensor,  # [N]
) -> Tensor:
    """torch.ops.pyfastcircuits.diagonal_ranks by Triton: the same arguments and result.

    A column outside [0, M) gives -1: CUDA tensors are not read to check this.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(A, B, columns)
    ranks = _outputs(A, B, columns).zero_()
    (rows, rank), width = A.shape, B.shape[1]
    if rows == 0:
        return ranks
    arch = 90
    if A.is_cuda:
        major, minor = torch.cuda.get_device_capability(A.device)
        arch = 10 * major + minor
    kind = arithmetic(str(A.dtype).removeprefix("torch."), "ieee")
    config = choose("diagonal_ranks", {"N": rows, "M": width, "r": rank}, kind, arch)
    B = torch.nn.functional.pad(B, (0, -width % ALIGNMENT)).contiguous()
    with torch.cuda.device_of(A):
        diagonal_ranks_kernel[(triton.cdiv(rows, config.blocks["BLOCK_M"]) * config.splits,)](
            A.contiguous(),
            B,
            columns.clamp(0, width - 1),
            ranks,
            rows,
            width,
            B.shape[1],
            config.splits,
            triton.cdiv(triton.cdiv(width, config.blocks["BLOCK_N"]), config.splits),
            DEPTH=rank,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **config.blocks,
        )
        return torch.where((columns < 0) | (columns >= width), -1, ranks)


@diagonal_ranks_triton.register_fake
def _outputs(A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
    return A.new_empty(len(A), dtype=torch.long)


def _check(A: Tensor, B: Tensor, columns: Tensor) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(f"A has shape {list(A.shape)} and B {list(B.shape)}, expected [N, r] and [r, M]")
    if B.dtype != A.dtype:
        raise ValueError(f"A is {A.dtype} and B {B.dtype}: expected one dtype")
    if columns.shape != A.shape[:1] or columns.dtype != torch.long:
        raise ValueError(
            f"columns has shape {list(columns.shape)} and dtype {columns.dtype}, expected {[len(A)]} and torch.int64"
        )
    if len(A) and not B.shape[1]:
        raise ValueError(f"B has shape {list(B.shape)}: no columns")
