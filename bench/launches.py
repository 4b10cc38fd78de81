"""The kernels that `bench.gpu` times, at its shapes: how many programs there are, and how often their loops run.

What they are compiled of stands in tests/support/gpu_resources.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from support.gpu_resources import (
    AttentionVariant,
    Compiled,
    PairVariant,
    ProductVariant,
    Variant,
    compile_attention,
    compile_pairs,
    compile_product,
    compile_sweep,
)

from bench.gpu import BEST, LONG, ROW_BEST, H, L, P, S, T, V, d, r
from bench.pipes import GPUS
from pyfastcircuits.kernels.configs import Config, arithmetic, choose
from pyfastcircuits.kernels.factored_topk import segment_width

PRECISIONS = ("bf16", "tf32", "ieee")
ARITHMETIC = r"MUFU\.EX2|FFMA2?|HMMA|HGMMA|UTCHMMA"
CUDA_TILE, CUDA_DEPTH, CUDA_THREADS = 128, 16, 256  # Tile<float> of csrc/cuda/tile.cuh


class Nest(NamedTuple):
    """Loops around one kind of work, outermost first.

    `runs` is how often each of them runs in a program. One run of the innermost multiplies `products` (m, n and the
    inner dimension of each), or executes `opcode` in `lanes` lanes.
    """

    runs: tuple[float, ...]
    products: tuple[tuple[int, int, int], ...] = ()
    opcode: str = ""
    lanes: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel of a row: of a Triton kernel's variant, what compiles it; of the CUDA library's, the name."""

    name: str
    arch: int
    kind: str  # of arithmetic: "fp32", "tf32" or "bf16"
    programs: int
    nests: tuple[Nest, ...]
    memory: float  # bytes that are read or written at least once
    variant: object = None
    compiler: Callable[..., Compiled] | None = None
    marks: str = ARITHMETIC  # opcodes of what it has to do, for sass.way_through
    most: int = 1 << 30
    skips: bool = False  # nearly all tiles, without multiplying them


class Work(NamedTuple):
    """A row of `bench.gpu`: its section, its form, and the kernels that take its time."""

    section: str
    form: str
    launches: tuple[Launch, ...]

    @property
    def name(self) -> str:
        """As in the table of predictions."""
        return f"{self.section}: {self.form}"


def works(arch: int) -> Iterator[Work]:
    """All rows that are predicted."""
    yield from (Work("sweep", f"triton {x}", (_swept("sweep_nll", x, arch),)) for x in PRECISIONS)
    yield from (Work("sweep", f"target_ranks: triton {x}", (_swept("target_ranks", x, arch),)) for x in PRECISIONS)
    for rank in (d, r):
        yield from (Work("joint", f"r={rank}: triton {x}", (_joint(x, rank, arch),)) for x in PRECISIONS)
    yield from (Work("pairs", f"triton {x}", (_pairs(x, arch),)) for x in PRECISIONS)
    yield from _entries(arch)
    yield from (Work("attention", f"triton {x}", (_attention(x, arch),)) for x in PRECISIONS)
    yield from (Work("attention", f"attention_lse: triton {x}", (_attention_lse(x, arch),)) for x in PRECISIONS)


def _swept(op: str, precision: str, arch: int) -> Launch:
    config, kind = _chosen(op, {"P": P, "T": T, "V": V, "r": r, "G": 1}, precision, arch)
    block = config.blocks
    rows, tiles = block["BLOCK_P"] * block["BLOCK_T"], config.count(V, "BLOCK_V") / config.splits
    programs = config.count(P, "BLOCK_P") * config.count(T, "BLOCK_T") * config.splits
    nest = _product((tiles,), rows, block["BLOCK_V"], r, block["BLOCK_K"])
    memory = 4 * T * V + _bytes(kind) * r * (P * T + V)
    variant = Variant(op, "float32", precision, r, False, arch)
    return Launch(op, arch, kind, programs, (nest,), memory, variant, compile_sweep)


def _joint(precision: str, rank: int, arch: int) -> Launch:
    config, kind = _chosen("joint_nll", {"T": T, "V": V, "r": rank}, precision, arch)
    rows, columns = config.blocks["BLOCK_T"], config.blocks["BLOCK_V"]
    tiles, pairs = config.count(V, "BLOCK_V") / config.splits, H * (H - 1) // 2
    nests = (
        _product((tiles, tiles * H), rows, columns, rank, config.blocks["BLOCK_K"]),
        Nest((tiles, tiles * H, tiles * pairs), opcode="MUFU.EX2", lanes=rows * columns),
    )
    memory = 4 * T * V + _bytes(kind) * rank * (H * T + V * (1 if rank == d else H))
    variant = Variant("joint_nll", "float32", precision, rank, rank == r, arch)
    programs = config.count(T, "BLOCK_T") * config.splits
    return Launch("joint_nll", arch, kind, programs, nests, memory, variant, compile_sweep)


def _pairs(precision: str, arch: int) -> Launch:
    heads = (L - 1) * H
    config, kind = _chosen("pair_norms", {"N": heads, "M": heads, "r": r, "d": d, "s": r}, precision, arch)
    block = config.blocks
    rows, columns = block["BLOCK_N"] * block["BLOCK_R"], block["BLOCK_M"] * block["BLOCK_S"]
    parts = _ceil(r, block["BLOCK_R"]) * _ceil(r, block["BLOCK_S"])
    # Programs whose pairs are all in the wrong order end at once; no block holds heads of two layers.
    programs = L * (L - 1) // 2 * _ceil(H, block["BLOCK_N"]) * _ceil(H, block["BLOCK_M"])
    nest = _product((parts,), rows, columns, d, block["BLOCK_K"])
    variant, memory = PairVariant("float32", precision, r, d, True, arch), 2 * _bytes(kind) * heads * r * d
    return Launch("pair_norms", arch, kind, programs, (nest,), memory, variant, compile_pairs)


def _entries(arch: int) -> Iterator[Work]:
    wide, narrow = segment_width(V * V, BEST), segment_width(V, ROW_BEST)
    best, row = f"best {BEST}", f"best {ROW_BEST} of each row"
    screen, segments, entries = (f"factored_topk_{name}" for name in ("screen", "segments", "entries"))

    def pass_over(name: str, segment: int, arrays: int, bounded: bool = False, skips: bool = False) -> Launch:
        """A pass that reads or writes so many arrays of a number for each segment."""
        op = "diagonal_ranks" if name == "diagonal_ranks" else "factored_topk"
        precision = "bf16" if name == screen else "ieee"
        config, kind = _chosen(op, {"N": V, "M": V, "r": r}, precision, arch)
        m, n, k = (config.blocks[f"BLOCK_{x}"] for x in "MNK")
        nest = _product((config.count(V, "BLOCK_N") / config.splits,), m, n, r, k)
        memory = 2 * _bytes(kind) * V * r + 4 * arrays * V * _ceil(V, segment)
        variant = ProductVariant(name, "float32", precision, r, segment, bounded, arch)
        programs = config.count(V, "BLOCK_M") * config.splits
        return Launch(name, arch, kind, programs, (nest,), memory, variant, compile_product, skips=skips)

    few = pass_over(entries, wide, 1, skips=True)  # tiles that hold one of the best of all
    most = pass_over(entries, narrow, 1)  # tiles that hold one of the best of some row
    bounded = (pass_over(screen, wide, 2), pass_over(segments, wide, 2, bounded=True, skips=True), few)
    yield Work("entries", f"{best}: triton, screen bf16", bounded)
    yield Work("entries", f"{best}: triton, screen none", (pass_over(segments, wide, 1), few))
    yield Work("entries", f"{best}: cuda, screen none", (_cuda_product("factored_topk_kernel", arch),))
    bounded = (pass_over(screen, narrow, 2), pass_over(segments, narrow, 2, bounded=True), most)
    yield Work("entries", f"{row}: triton, screen bf16", bounded)
    yield Work("entries", f"{row}: triton, screen none", (pass_over(segments, narrow, 1), most))
    yield Work("entries", f"{row}: cuda, screen none", (_cuda_product("factored_topk_rows_kernel", arch),))
    yield Work("entries", "ranks: triton", (pass_over("diagonal_ranks", 128, 0),))


def _attention(precision: str, arch: int) -> Launch:
    config, kind = _chosen("frozen_attention", {"r": r, "C": S * r}, precision, arch)
    m, n, c, k = (config.blocks[f"BLOCK_{x}"] for x in "MNCK")
    tiles = (_ceil(LONG, m) + 1) / 2 * m / n  # of a program with as many sources as they have on average
    scores = _product((1, tiles), m, n, r, k)
    # Where scores take one step, they are multiplied in the loop that multiplies the values too.
    nest = scores if len(scores.runs) > 2 else scores._replace(products=(*scores.products, (m, c, n)))
    programs = _ceil(LONG, m) * H * config.count(S * r, "BLOCK_C")
    variant = AttentionVariant("frozen_attention", "float32", precision, r, False, arch)
    memory = LONG * H * r * (_bytes(kind) * (2 + S) + 4 * S)
    return Launch("frozen_attention", arch, kind, programs, (nest,), memory, variant, compile_attention)


def _attention_lse(precision: str, arch: int) -> Launch:
    config, kind = _chosen("frozen_attention", {"r": r, "C": S * r}, precision, arch)
    m, n, k = (config.blocks[f"BLOCK_{x}"] for x in "MNK")
    nest = _product(((_ceil(LONG, m) + 1) / 2 * m / n,), m, n, r, k)
    variant = AttentionVariant("attention_lse", "float32", precision, r, False, arch)
    programs, memory = _ceil(LONG, m) * H, 2 * _bytes(kind) * LONG * H * r
    return Launch("attention_lse", arch, kind, programs, (nest,), memory, variant, compile_attention)


def _cuda_product(name: str, arch: int) -> Launch:
    programs = 2 * next(gpu.multiprocessors for gpu in GPUS.values() if gpu.arch == arch)  # as many as run at a time
    nests = _cuda_nests(_ceil(V, CUDA_TILE) ** 2 / programs)
    return Launch(name, arch, "fp32", programs, nests, 8 * V * r)


def _cuda_nests(tiles: float) -> tuple[Nest, ...]:
    """The loop over steps of the rank, and that which stages both factors for each of them."""
    steps, staged = tiles * _ceil(r, CUDA_DEPTH), CUDA_DEPTH * CUDA_TILE // CUDA_THREADS
    return (
        Nest((tiles, steps), ((CUDA_TILE, CUDA_TILE, CUDA_DEPTH),)),
        Nest((tiles, steps, steps * staged), opcode="STS", lanes=2 * CUDA_THREADS),
    )


def _chosen(op: str, shape: dict[str, int], precision: str, arch: int) -> tuple[Config, str]:
    """The launch of an op on fp32 tensors, and its arithmetic."""
    kind = arithmetic(op, "float32", precision)
    return choose(op, shape, kind, arch), kind


def _product(outer: tuple[float, ...], m: int, n: int, depth: int, step: int) -> Nest:
    """A tile of a product, by steps of the inner dimension where it is longer than one."""
    steps = _ceil(depth, step)
    runs = (*outer, outer[-1] * steps) if steps > 1 else outer
    return Nest(runs, ((m, n, step),))


def _bytes(kind: str) -> int:
    return 2 if kind == "bf16" else 4


def _ceil(size: int, block: int) -> int:
    return math.ceil(size / block)
