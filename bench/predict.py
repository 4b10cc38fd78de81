"""`make predict`: the time that every kernel should take on each GPU, counted in its machine code.

The instructions of a program are summed over the loops that they lie in, pipe by pipe, and by the programs of the
multiprocessor with the most. A kernel takes at least as long as the busiest pipe, or as its bytes from memory: no warp
ever waits in that, for a result, at a barrier or for a bank of shared memory. Where few programs are resident and
barriers part what they do, pipes take turns: the sum of all is the second prediction.
"""

import argparse
import functools
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from math import ceil, prod

from support.gpu_resources import CUDA_LIBRARY, cuobjdump, sass

from bench.gpu import CAPTIONS, RESULTS
from bench.launches import CUDA_THREADS, Launch, Nest, Work, works
from bench.pipes import ARCHITECTURES, GPU, GPUS, PIPES, SCHEDULERS, pipe_clocks, product_flops
from bench.predictions import committed, departures, ratios, summary, write
from bench.sass import Block, Instruction, Region, blocks_of, functions, region_of, way_through

REQUIRED_THREADS = b"\x04\x10\x0c\x00"  # before the attribute REQNTID of a cubin
LEEWAY = 0.5  # of its work: compilers leave out products that nobody reads, and other work looks like products


@dataclass(frozen=True)
class Count:
    """What one program executes: warp instructions, and FLOPs by those that multiply its factors."""

    instructions: Counter[Instruction]
    flops: float

    def opcodes(self) -> Counter[str]:
        """Warp instructions by opcode."""
        found: Counter[str] = Counter()
        for instruction, times in self.instructions.items():
            found[instruction.opcode] += times
        return found


@functools.lru_cache
def count(launch: Launch) -> Count:
    """Counts the instructions of a launch on the way through its loops."""
    code, warps = machine_code(launch)
    blocks = blocks_of(code)
    whole = region_of(blocks)
    runs: dict[int, float] = {}
    for nest in launch.nests:
        runs |= _runs(launch, nest, blocks, whole, warps, runs)
    found: Counter[Instruction] = Counter()
    flops = 0.0

    def marks(instruction: Instruction) -> int:
        return not launch.skips and re.match(rf"(?:{launch.marks})\b", instruction.opcode) is not None

    def add(region: Region, times: float) -> None:
        nonlocal flops
        passed, inner = way_through(blocks, region, runs, marks, launch.most)
        for block in passed:
            for instruction in blocks[block].instructions:
                found[instruction] += times * warps
                flops += times * _flops(instruction, launch, warps)
        for loop in inner:
            add(loop, runs.get(loop.head, times))

    add(whole, 1.0)
    return Count(found, flops)


def machine_code(launch: Launch) -> tuple[list[Instruction], int]:
    """The instructions of a kernel, and the warps of a program."""
    if launch.compiler is None:
        [code] = [code for name, code in _library(launch.arch) if f"{launch.name}Iff" in name]
        return code, CUDA_THREADS // 32
    cubin = launch.compiler(launch.variant).cubin
    [(_, _, code)] = functions(sass(cubin))
    threads = struct.unpack_from("<3I", cubin, cubin.index(REQUIRED_THREADS) + len(REQUIRED_THREADS))
    return code, prod(threads) // 32


@functools.lru_cache
def _library(arch: int) -> list[tuple[str, list[Instruction]]]:
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    return [(name, code) for _, name, code in functions(cuobjdump(CUDA_LIBRARY, "-sass", "-arch", name))]


def _runs(
    launch: Launch, nest: Nest, blocks: list[Block], whole: Region, warps: int, known: dict[int, float]
) -> dict[int, float]:
    """How often the loops around some work run, each by its first block; those of earlier nests are known.

    Raises:
        ValueError: no loop with as much work.
    """

    def work(region: Region) -> float:
        code = (x for i in region.own for x in blocks[i].instructions)
        if nest.products:
            return sum(_flops(x, launch, warps) for x in code)
        return sum(32 * warps for x in code if x.opcode.startswith(nest.opcode))

    once = sum(2 * prod(shape) for shape in nest.products) or nest.lanes
    chains = [chain for chain in _chains(whole, []) if work(chain[-1]) >= LEEWAY * once]
    if known:
        inside = [chain for chain in chains if len(chain) > 1 and known.get(chain[-2].head) == nest.runs[-2]]
        chains = inside or chains
    if not chains:
        raise ValueError(f"{launch.name} on sm_{launch.arch} has no loop that does the work of one run")
    # The innermost; of several forms that are chosen between at run time, the longest.
    chain = max(
        chains, key=lambda chain: (len(chain), [sum(len(blocks[i].instructions) for i in x.blocks) for x in chain])
    )
    times = nest.runs[-1] / max(1, round(work(chain[-1]) / once))
    found = {chain[-1].head: times}
    left = [n for n in nest.runs if n < times]
    for loop in reversed(chain[:-1]):
        found[loop.head] = left.pop() if left else 1.0
    return {head: n for head, n in found.items() if n <= nest.runs[0]} if launch.skips else found


def _chains(region: Region, outer: list[Region]) -> list[list[Region]]:
    """Every region with those around it, outermost first."""
    here = [*outer, region]
    return [here, *(chain for loop in region.inner for chain in _chains(loop, here))]


def _flops(instruction: Instruction, launch: Launch, warps: int) -> float:
    """What a program multiplies by an instruction, where it is one of the launch's own arithmetic."""
    if launch.kind == "fp32" or instruction.name in ("HMMA", "HGMMA"):
        return warps * product_flops(instruction)
    if instruction.name == "UTCHMMA":  # one warp starts it; it is as large as the tile, and 32 bytes deep
        shapes = [shape for nest in launch.nests for shape in nest.products]
        depth = 16 if launch.kind == "bf16" else 8
        started = sum(ceil(m / 128) * ceil(n / 256) * ceil(k / depth) for m, n, k in shapes)
        return sum(2 * prod(shape) for shape in shapes) / started
    return 0.0


@dataclass(frozen=True)
class Prediction:
    """Milliseconds that each pipe takes, and memory."""

    name: str
    pipes: dict[str, float]

    @property
    def binding(self) -> str:
        """The pipe that takes longest."""
        return max(self.pipes, key=self.pipes.__getitem__)

    @property
    def ms(self) -> float:
        """The time of the binding pipe."""
        return self.pipes[self.binding]

    @property
    def in_turn(self) -> float:
        """The time of all pipes that execute, one after another; at least that of the binding one."""
        return max(self.ms, sum(self.pipes[pipe] for pipe in PIPES if pipe != "issue"))

    def line(self) -> str:
        """Name, time and binding pipe, and what each pipe takes of that time."""
        shares = "  ".join(f"{pipe} {time / self.ms:4.0%}" for pipe, time in self.pipes.items())
        return f"{self.name:28} {self.ms:8.3f} to {self.in_turn:8.3f} ms  {self.binding:7} {shares}"


def predict(launch: Launch, counted: Count, gpu: GPU) -> Prediction:
    """The time of a launch on a GPU."""
    clocks = dict.fromkeys(PIPES, 0.0) | {"tensor": gpu.tensor_clocks(counted.flops, launch.kind)}
    for instruction, times in counted.instructions.items():
        clocks["issue"] += times / SCHEDULERS
        if cost := pipe_clocks(instruction, gpu.arch):
            clocks[cost[0]] += times * cost[1]
    programs = ceil(launch.programs / gpu.multiprocessors)
    pipes = {pipe: clock * programs / gpu.clock / 1e6 for pipe, clock in clocks.items()}
    return Prediction(launch.name, pipes | {"memory": launch.memory / gpu.memory / 1e9})


def predictions(work: Work) -> dict[str, list[Prediction]]:
    """For every kernel of a row, by GPU of its architecture."""
    gpus = {name: gpu for name, gpu in GPUS.items() if gpu.arch == work.launches[0].arch}
    return {name: [predict(launch, count(launch), gpu) for launch in work.launches] for name, gpu in gpus.items()}


def table_of(work: Work) -> dict[str, dict[str, list[float]]]:
    """The row as it stands in the table of predictions."""
    row = {}
    for gpu, kernels in predictions(work).items():
        times = sum(kernel.ms for kernel in kernels), sum(kernel.in_turn for kernel in kernels)
        row[gpu] = [float(f"{ms:.4g}") for ms in times]
    return {work.name: row}


def main() -> int:
    """Print all predictions, and what has been measured beside them; write or check the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the table in place of writing it")
    check = parser.parse_args().check
    table: dict[str, dict[str, list[float]]] = {}
    for work in (work for arch in ARCHITECTURES for work in works(arch)):
        for row, by_gpu in table_of(work).items():
            table.setdefault(row, {}).update(by_gpu)
        for gpu, kernels in predictions(work).items():
            low, high = table[work.name][gpu]
            print(f"{work.name}, {gpu}: {low} to {high} ms")
            print("\n".join(f"    {kernel.line()}" for kernel in kernels), flush=True)
    if check:
        problems = departures(table, committed())
        print("\n".join(problems) or "no prediction departs from bench/predictions.json")
        return len(problems)
    write(table)
    gpu, found = ratios(RESULTS.read_text(encoding="utf-8"), list(CAPTIONS), table)
    for row, (low, high) in found.items():
        print(f"{row}: measured on {gpu}, {low:.1f} and {high:.1f} times the predictions")
    print(summary(gpu, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
