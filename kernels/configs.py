"""Block sizes of the Triton kernels: a pure function of op, shape, arithmetic and architecture.

No result's meaning depends on them. A block is as large as the registers of its warps hold, and the columns are split
into as many parts as it takes to give every multiprocessor work.
"""

from dataclasses import dataclass
from typing import Any

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
WAVES = 8  # blocks wanted for each multiprocessor, so that the last ones do not leave most of them idle
ROWS = {"bf16": 128, "tf32": 128, "tf32x3": 128, "fp32": 64, "fp64": 32}  # of a tile, by arithmetic
DEEPEST = {
    "bf16": 128,
    "tf32": 64,
    "tf32x3": 64,
    "fp32": 32,
    "fp64": 16,
}  # inner indices of a tile that holds all there are
BY_COLUMNS = ("tf32", "tf32x3")  # arithmetic that reads a basis column by column
CUDA_CORES = ("factored_topk", "diagonal_ranks")  # what they compare is multiplied as fp32 is everywhere else


@dataclass(frozen=True)
class Config:
    """How an op is launched: its BLOCK_* constants, the parts the columns are cut into, warps and stages."""

    blocks: dict[str, int]
    splits: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.blocks}

    def count(self, size: int, block: str) -> int:
        """Blocks that cover `size`, by the name of the block."""
        return _blocks(size, self.blocks[block])

    def tiles(self, columns: int, block: str) -> int:
        """Tiles of columns in a split."""
        return _blocks(self.count(columns, block), self.splits)


def arithmetic(op: str, dtype: str, precision: str) -> str:
    """What multiplies: "fp64", "fp32", "tf32x3", "tf32" or "bf16". Tensor cores multiply bfloat16 inputs exactly.

    "tf32x3" splits each fp32 factor into two of TF32 and leaves out the product of the lesser ones: as right as fp32 to
    a few of its roundings, on tensor cores.

    Raises:
        ValueError: a precision that float64 does not have.
    """
    if dtype == "float64" and precision != "ieee":
        raise ValueError(f"precision is {precision!r}, but float64 tensors have only 'ieee'")
    if dtype in ("bfloat16", "float64"):
        return {"bfloat16": "bf16", "float64": "fp64"}[dtype]
    if precision == "ieee":
        return "fp32" if op in CUDA_CORES else "tf32x3"
    return precision


def choose(op: str, shape: dict[str, int], dtype: str, arch: int) -> Config:
    """The launch of `op` on `shape` (its letters, as in its docstring) by `dtype` arithmetic on compute capability
    `arch`, as 90."""
    ops = {
        "sweep_nll": _sweep_nll,
        "logits_lse": _sweep_nll,
        "target_ranks": _sweep_nll,
        "joint_nll": _joint_nll,
        "pair_norms": _pair_norms,
        "factored_topk": _factored_topk,
        "diagonal_ranks": _diagonal_ranks,
        "frozen_attention": _frozen_attention,
    }
    return ops[op](shape, dtype, arch)


def _sweep_nll(shape: dict[str, int], dtype: str, arch: int) -> Config:
    pairs, positions, vocabulary, rank = (shape[name] for name in "PTVr")
    rows = ROWS[dtype]
    # Ablations of a block share a tile of clean logits: it has as many as a group holds, and at least 16 positions.
    block_p = min(rows // 16, _power_above(pairs // max(shape["G"], 1)))
    wide = dtype != "fp64" if arch == 90 else dtype == "bf16" and arch < 90
    block_t, block_v = rows // block_p, 64 if wide else 32
    row_blocks = _blocks(pairs, block_p) * _blocks(positions, block_t)
    splits = _splits(row_blocks, _blocks(vocabulary, block_v), arch)
    block_k = _depth(rank, dtype)
    if dtype == "tf32x3":
        block_k = min(block_k, 32)  # what is summed by itself, see tile.multiply_parts
    blocks = {"BLOCK_P": block_p, "BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_K": block_k}
    # Four warps hold a tile on sm_90, but not beside a left factor that is in two parts, or loaded anew at every step.
    crowded = rows > 64 and (rank > DEEPEST[dtype] or arch != 90)
    num_warps = 8 if crowded or dtype in BY_COLUMNS else 4
    # Copies that run ahead of products in parts would take the last registers but on sm_90.
    num_stages = {"bf16": 3, "tf32x3": 2 if arch == 90 else 1}.get(dtype, 2)
    return Config(blocks, splits, num_warps, num_stages)


def _joint_nll(shape: dict[str, int], dtype: str, arch: int) -> Config:
    positions, vocabulary, rank = (shape[name] for name in "TVr")
    block_t = min(ROWS[dtype], 64, max(16, _power_above(positions)))
    parted = dtype == "tf32x3" and arch != 90
    block_v = 64 if dtype == "bf16" and arch == 90 else 16 if parted and arch >= 100 else 32
    # Each program has a scratch, so there are few, that scratches may stay in the L2 cache; on an H200 twice as many as
    # fit it were faster still.
    wanted = _blocks((4 if arch == 90 else 2) * MULTIPROCESSORS.get(arch, 132), _blocks(positions, block_t))
    splits = max(1, min(wanted, _blocks(vocabulary, block_v)))
    block_k = min(_depth(rank, dtype), 32 if dtype == "tf32x3" else 128)
    blocks = {"BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_K": block_k}
    num_warps = 8 if parted or dtype == "fp64" else 4
    return Config(blocks, splits, num_warps, num_stages=1 if parted and arch >= 100 else 2)


def _pair_norms(shape: dict[str, int], dtype: str, arch: int) -> Config:
    size = 32 if dtype == "fp64" else 128
    block_r, block_s = (_part(shape[rank], shape[heads], size) for heads, rank in ("Nr", "Ms"))
    blocks = {"BLOCK_N": size // block_r, "BLOCK_R": block_r, "BLOCK_M": size // block_s, "BLOCK_S": block_s}
    blocks["BLOCK_K"] = {"bf16": 64, "tf32": 32}.get(dtype, 16)
    deep = size > 64 and not (dtype == "tf32x3" and arch < 90)  # there pointers would take the last registers
    return Config(blocks, 1, _warps(size), num_stages=3 if deep else 2)


def _factored_topk(shape: dict[str, int], dtype: str, arch: int) -> Config:
    # Tiles are as wide in every arithmetic: the segments that one screens, another confirms.
    return _product(shape, dtype, arch, 128)


def _diagonal_ranks(shape: dict[str, int], dtype: str, arch: int) -> Config:
    # Tiles are square: that of a block's diagonal entries is multiplied as all others are.
    return _product(shape, dtype, arch, ROWS[dtype])


def _product(shape: dict[str, int], dtype: str, arch: int, block_n: int) -> Config:
    """Row blocks that walk over the tiles of their columns."""
    rows, columns, rank = (shape[name] for name in "NMr")
    blocks = {"BLOCK_M": ROWS[dtype], "BLOCK_N": block_n, "BLOCK_K": _depth(rank, dtype)}
    splits = _splits(_blocks(rows, ROWS[dtype]), _blocks(columns, block_n), arch)
    return Config(blocks, splits, _warps(block_n), num_stages=2)


def _splits(row_blocks: int, column_blocks: int, arch: int) -> int:
    """Parts of the columns, so that there is work for the whole GPU."""
    wanted = WAVES * MULTIPROCESSORS.get(arch, 132)
    return max(1, min(_blocks(wanted, row_blocks), column_blocks))


def _frozen_attention(shape: dict[str, int], dtype: str, arch: int) -> Config:
    # Scores are made again for every block of columns, so that is as wide as registers hold.
    widest = 256 if dtype == "bf16" and arch >= 90 else ROWS[dtype]
    block_c = min(widest, _power_above(max(shape["C"], 16)))
    block_m, block_k = ROWS[dtype], _depth(max(shape["r"], 16), dtype)
    if dtype == "tf32x3":  # both parts of queries and weights are in registers
        block_m, block_c = 64 if arch != 90 else block_m, min(block_c, 64 if arch >= 100 else 128)
        block_k = min(block_k, 64 if arch >= 100 else 32)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Config(blocks, 1, num_warps=8, num_stages=3 if dtype in ("bf16", "tf32") else 2)


def _warps(size: int) -> int:
    """Warps that share a tile of `size` rows or columns."""
    return 8 if size > 64 else 4


def _depth(rank: int, dtype: str) -> int:
    """Inner indices of a tile: all of them up to DEEPEST, so that the left factor is loaded once."""
    deepest = DEEPEST[dtype]
    return _power_above(max(rank, 16)) if rank <= deepest else min(deepest, 64)


def _part(rank: int, heads: int, size: int) -> int:
    """Rows of each head in a tile of `size`: those that leave the least of all tiles unused; of equal counts the most.

    It is at least 16 where heads have as many: the more heads a tile has, the fewer tiles there are to go round.
    """

    def tiled(part: int) -> int:
        return _blocks(rank, part) * _blocks(heads, size // part)

    parts = [1 << n for n in range(size.bit_length()) if 1 << n >= min(_power_above(rank), 16)]
    return min(parts, key=lambda part: (tiled(part), -part))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power_above(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
