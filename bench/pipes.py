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
        """Clocks that the tensor cores of one multiprocessor take; a TF32 product takes twice as long as a bfloat16 one."""
        each = self.tensor * 1e3 / (self.clock * self.multiprocessors)
        return flops / each * (2 if kind == "tf32" else 1)


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

# Results in a clock and multiprocessor.
FP32 = {80: 64, 90: 128, 100: 128}  # add, multiply, multiply-add
FP64 = {80: 32, 90: 64, 100: 64}
INTEGER_MULTIPLY = 64  # IMAD, which compilers also move registers with, by half of the fp32 pipe
ALU = 64  # integer addition, logic, shifts, comparisons, selections, moves
MINIMUM = {80: 64, 90: 64, 100: 128}  # of fp32
SPECIAL = 16  # exponentials, reciprocals, and conversions to and from 64 bits
SHUFFLE = 32
SCHEDULERS = 4  # each issues one warp instruction in a clock
SHARED = 128  # bytes of shared memory or of the L1 cache

_FMA = {"FFMA", "FADD", "FMUL", "FFMA32I", "FADD32I", "FMUL32I", "HFMA2", "HADD2", "HMUL2"}
_TWO = {"FFMA2", "FADD2", "FMUL2"}  # both halves of 64 bits
_ALU = {
    *("IADD3", "IADD", "VIADD", "LOP3", "LOP", "SHF", "SHL", "SHR", "LEA", "ISETP", "IMNMX", "VIMNMX", "IABS", "SEL"),
    *(
        "FSEL",
        "FSETP",
        "FSET",
        "FCHK",
        "MOV",
        "PRMT",
        "SGXT",
        "BMSK",
        "PLOP3",
        "P2R",
        "R2P",
        "F2FP",
        "I2FP",
        "VIADDMNMX",
    ),
}
_MEMORY = {
    "LDS",
    "STS",
    "LDG",
    "STG",
    "LDL",
    "STL",
    "LD",
    "ST",
    "LDSM",
    "STSM",
    "LDGSTS",
    "ATOMS",
    "ATOMG",
    "RED",
    "REDG",
}
_FP64 = {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"}
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO"}


def pipe_clocks(instruction: Instruction, arch: int) -> tuple[str, float] | None:
    """The pipe of an instruction and its clocks; None for what only takes an issue slot."""
    name = instruction.name
    if name in _FMA:
        return "fma", 32 / FP32[arch]
    if name in _TWO:
        return "fma", 64 / FP32[arch]
    if name == "IMAD":
        return "fma", 32 / INTEGER_MULTIPLY
    if name in ("FMNMX", "FMNMX3"):
        return "alu", 32 / MINIMUM[arch]
    if name in _ALU:
        return "alu", 32 / ALU
    if name in _SPECIAL:
        return "mufu", 32 / SPECIAL
    if name in _FP64:
        return "fp64", 32 / FP64[arch]
    if name == "SHFL":
        return "lsu", 32 / SHUFFLE
    if name in _MEMORY or name == "HGMMA":
        return "lsu", max(1.0, 32 * bytes_of(instruction) / SHARED)
    return None


def bytes_of(instruction: Instruction) -> float:
    """Bytes of shared memory or of the L1 cache that one lane reads or writes."""
    if instruction.name == "HGMMA":  # the right factor, and the left one where that is no register: 32 bytes a row
        rows = _shape(instruction)[1] + (0 if re.match(r"R\d+, R\d+, gdesc", instruction.operands) else 64)
        return 32 * rows / 128
    if matrices := re.search(r"\.MT?88(?:\.(\d))?", instruction.opcode):
        return 4.0 * int(matrices[1] or 1)
    width = re.search(r"\.(64|128)\b", instruction.opcode)
    return int(width[1]) / 8 if width else 4.0


def product_flops(instruction: Instruction) -> float:
    """FLOPs of one warp's share of a product in fp32 or on tensor cores, but for UTCHMMA, which does not tell its shape."""
    if instruction.name in ("FFMA", "FFMA2"):
        return 128.0 if instruction.name == "FFMA2" else 64.0
    if instruction.name in ("HMMA", "HGMMA"):
        return 2.0 * math.prod(_shape(instruction)) / (4 if instruction.name == "HGMMA" else 1)
    return 0.0


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    shape = instruction.opcode.split(".")[1]
    if instruction.name == "HMMA":  # 16816 is 16 x 8 x 16
        return 16, 8, int(shape[3:])
    m, n, k = map(int, shape.split("x"))
    return m, n, k
