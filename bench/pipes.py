"""What an instruction costs: the pipes of a multiprocessor, and the rates of the GPUs that predictions are made for.

A cost is in clocks of a whole multiprocessor, for one instruction of one warp: 32 lanes divided by the results that the
pipe gives in a clock. Rates of arithmetic are those of the table "Throughput of Native Arithmetic Instructions" of the
CUDA C++ Best Practices Guide 13 (compute capability 8.0, 9.0, 10.0).
"""

import math
import re
from dataclasses import dataclass

from bench.sass import Instruction

PIPES = ("tensor", "fma", "alu", "mufu", "fp64", "lsu", "issue")


@dataclass(frozen=True)
class GPU:
    """One GPU: compute capability as 90, multiprocessors, clock in GHz, dense bfloat16 TFLOP/s, memory in TB/s."""

    arch: int
    multiprocessors: int
    clock: float
    tensor: float
    memory: float

    def tensor_clocks(self, flops: float, kind: str) -> float:
        """Clocks that the tensor cores of one multiprocessor take: for TF32 twice as many as for bfloat16."""
        each = self.tensor * 1e3 / (self.clock * self.multiprocessors)
        return flops / each * {"bf16": 1, "tf32": 2, "tf32x3": 6, "fp32": 0}[kind]


# Clocks are the boost clocks at which the published fp32 peaks hold (cores x 2 x clock).
GPUS = {
    # A100 Tensor Core GPU Architecture (whitepaper, table 1), and the datasheet of A100 80 GB SXM for the memory.
    "A100": GPU(80, 108, 1.410, 312, 2.039),
    # H100 Tensor Core GPU Architecture (whitepaper, table 3), H100 SXM5; fp32 66.9 TFLOP/s.
    "H100": GPU(90, 132, 1.980, 989.4, 3.35),
    # H200 datasheet: the multiprocessors of H100 with other memory.
    "H200": GPU(90, 132, 1.980, 989.4, 4.8),
    # Blackwell Architecture Technical Brief (HGX B200, of eight): 2.25 PFLOP/s, 8 TB/s; fp32 75 TFLOP/s.
    "B200": GPU(100, 148, 1.965, 2250, 8.0),
}

ARCHITECTURES = (80, 90, 100)
SCHEDULERS = 4  # each issues one warp instruction in a clock
SHARED = 128  # bytes of shared memory or of the L1 cache in a clock
LANES = 32

# Pipe, results in a clock on each architecture, and opcodes. Multiplication of integers, which compilers also move
# registers by, has half of the fp32 pipe; FFMA2 gives two results a lane.
RATES: tuple[tuple[str, tuple[int, int, int], frozenset[str]], ...] = (
    ("fma", (64, 128, 128), frozenset({"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"})),
    ("fma", (32, 64, 64), frozenset({"FFMA2", "FADD2", "FMUL2"})),
    ("fma", (64, 64, 64), frozenset({"IMAD"})),
    ("alu", (64, 64, 64), frozenset({
        "IADD3", "IADD", "VIADD", "LEA", "LOP3", "SHF", "SGXT", "PRMT", "BMSK", "IABS", "IMNMX", "VIMNMX", "ISETP", "SEL",
        "VIADDMNMX", "FSETP", "FSEL", "FCHK", "MOV", "PLOP3", "P2R", "R2P", "F2FP", "I2FP",
    })),
    ("alu", (64, 64, 128), frozenset({"FMNMX", "FMNMX3"})),
    ("mufu", (16, 16, 16), frozenset({"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO"})),
    ("fp64", (32, 64, 64), frozenset({"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"})),
    ("lsu", (32, 32, 32), frozenset({"SHFL"})),
)  # fmt: skip
LOADS = frozenset({
    "LDS", "STS", "LDG", "STG", "LDL", "STL", "LDSM", "STSM", "LDGSTS", "ATOMS", "ATOMG", "RED", "REDG", "HGMMA",
})  # fmt: skip


def pipe_clocks(instruction: Instruction, arch: int) -> tuple[str, float] | None:
    """The pipe of an instruction and its clocks; None for what only takes an issue slot."""
    if instruction.name in LOADS:
        return "lsu", max(1.0, LANES * bytes_of(instruction) / SHARED)
    for pipe, results, opcodes in RATES:
        if instruction.name in opcodes:
            return pipe, LANES / results[ARCHITECTURES.index(arch)]
    return None


def bytes_of(instruction: Instruction) -> float:
    """Bytes that one lane reads or writes, of shared memory or by the L1 cache.

    Every lane counts: neither banks that two of them want are told by the code, nor addresses that they share.
    HGMMA reads its right factor, and its left one where that is no register, 32 bytes of every row or column; what
    UTCHMMA reads is not counted.
    """
    if instruction.name == "HGMMA":
        in_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
        return 32 * (_shape(instruction)[1] + (0 if in_registers else 64)) / (4 * LANES)
    if matrices := re.search(r"\.MT?88(?:\.(\d))?", instruction.opcode):
        return 4.0 * int(matrices[1] or 1)
    width = re.search(r"\.(64|128)\b", instruction.opcode)
    return int(width[1]) / 8 if width else 4.0


def product_flops(instruction: Instruction) -> float:
    """FLOPs of a warp's share of a product, in fp32 or on tensor cores; 0 for UTCHMMA, which does not tell its shape."""
    if instruction.name in ("FFMA", "FFMA2"):
        return 2.0 * LANES * (2 if instruction.name == "FFMA2" else 1)
    if instruction.name in ("HMMA", "HGMMA"):
        return 2.0 * math.prod(_shape(instruction)) / (4 if instruction.name == "HGMMA" else 1)
    return 0.0


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    shape = instruction.opcode.split(".")[1]
    if instruction.name == "HMMA":  # 16816 is 16 x 8 x 16
        return 16, 8, int(shape[3:])
    m, n, k = map(int, shape.split("x"))
    return m, n, k
