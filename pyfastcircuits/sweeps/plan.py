"""`fc.plan`: what a sweep costs, before anything runs, and what splitting it over processes does."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from pyfastcircuits.arguments import public, takes_sharded
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Precision
from pyfastcircuits.processes import Processes
from pyfastcircuits.sweeps import machines
from pyfastcircuits.sweeps.architectures import ARCHITECTURES, Architecture
from pyfastcircuits.sweeps.costs import FLOAT, Task, Work
from pyfastcircuits.sweeps.footprint import footprint
from pyfastcircuits.sweeps.machines import Machine
from pyfastcircuits.sweeps.units import amount, duration, size
from pyfastcircuits.sweeps.work import FIRST, PATTERNS, WORK, Cut, Split, SweepScope

MERGED = 32  # bytes of the sums of one experiment at one position, which processes with parts of the vocabulary join
DTYPES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Shares:
    """What each process does when a sweep is split in one way.

    Attributes:
        split: by what.
        steps: the work of each phase, of the process that has most.
        seconds: of each phase on the machine, and "merging".
        memory: bytes of each part of a process' memory at its peak.
        sent: bytes that a process gets from the others.
        why_not: why this split cannot be, or "".
    """

    split: Split
    steps: Mapping[str, Work]
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    sent: float
    why_not: str = ""

    @property
    def total_seconds(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())

    @property
    def peak(self) -> int:
        """Bytes of a process' memory at its peak."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What a sweep costs; see `plan`.

    Attributes:
        architecture: the model's sizes.
        machine: whose rates they are, and where those are from.
        experiments: the number of ablations.
        processes: that share the sweep, on a device each, or on one CPU's cores.
        options: all that was asked for.
        splits: every way to share it, that of the choice first.
    """

    architecture: Architecture
    machine: Machine
    experiments: int
    processes: int
    options: Mapping[str, str | int | bool]
    splits: tuple[Shares, ...]

    @property
    def chosen(self) -> Shares:
        """The fastest split that fits into memory; of equals, by sequences, by experiments, by vocabulary."""
        return self.splits[0]

    @property
    def flops(self) -> float:
        """Floating-point operations of a process, of products and on changed logits; two for each multiply-add."""
        return sum(work.flops for work in self.chosen.steps.values())

    @property
    def moved(self) -> float:
        """Bytes that elementwise work of a process reads and writes; factors of products are not counted."""
        return sum(work.moved for work in self.chosen.steps.values())

    @property
    def exponentials(self) -> float:
        """Exponentials that a process takes: of attention scores and clean logits."""
        return sum(work.exponentials for work in self.chosen.steps.values())

    @property
    def seconds(self) -> float:
        """The time of the sweep."""
        return self.chosen.total_seconds

    @property
    def memory(self) -> int:
        """Bytes of a process' memory at its peak, its libraries not counted."""
        return self.chosen.peak

    def __str__(self) -> str:
        """Time, operations and memory, in words."""
        many = f"{self.processes:,} processes, split by {self.chosen.split}" if self.processes > 1 else "1 process"
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.chosen.seconds.items())
        parts = ", ".join(f"{name} {size(held)}" for name, held in self.chosen.memory.items())
        tokens = f"{self.options['sequences']:,} sequences of {self.options['length']:,} tokens"
        sent = f"; {size(self.chosen.sent)} from the others" if self.processes > 1 else ""
        return "\n".join(
            (
                f"{self.architecture.name}: {self.experiments:,} experiments; {tokens}; {many}",
                f"{self.machine.name} ({self.machine.source})",
                f"time: {duration(self.seconds)} ({phases})",
                f"of each process: {amount(self.flops)}FLOP, {amount(self.exponentials)} exponentials, "
                f"{amount(self.moved)}B moved{sent}",
                f"memory of each process: {size(self.memory)} ({parts}); there are {size(self.machine.memory)}",
            )
        )


@public
@takes_sharded
def plan(
    model: str | CircuitWeights,
    scope: SweepScope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    sequences: int = 1,
    length: int = 512,
    machine: str = "here",
    processes: int = 1,
    split: Literal["auto", "none", "sequences", "experiments", "vocabulary"] = "auto",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    precision: Precision = "ieee",
    low_memory: bool = False,
    chunks: bool = True,
) -> Plan:
    """FLOPs, bytes, memory and time of `fc.sweep`, before anything runs.

    Work is counted from the algorithm and multiplied by the machine's rates: of this one measured in a few seconds and
    kept in the user's cache, of another from data sheets, and from what the machine code of our GPU kernels is
    predicted to take. Loading the model is not counted.

    Args:
        model: weights, or a published model's name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "pythia-70m" to
            "pythia-12b", "llama-3-8b", "llama-3-70b".
        scope, mode, attention, precision, low_memory: as of the sweep.
        sequences, length: B and T.
        machine: "here" (this CPU), "A100", "H100", "H200", "B200" or "laptop".
        processes: that share the sweep: each has a GPU of its own, or its part of a CPU's cores.
        split: by what they share it; "auto" is the fastest that fits.
        dtype: of the weights.
        chunks: whether the sweep goes in chunks, as with `out` or a corpus, and always where processes share it; else
            all sequences are run at once.

    Weights are counted as the command holds them: of a model that is its circuits alone, split by the vocabulary, each
    process has its own columns of W_U.

    Raises:
        ValueError: no such model, machine or option; a number that is too small; a split that cannot be.
    """
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2), ("processes", processes, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if scope == "path" and attention == "recomputed":
        raise ValueError("attention is 'recomputed', but scope is 'path': paths exist under frozen patterns alone")
    if split != "auto" and (split == "none") != (processes == 1):
        raise ValueError(f"split is {split!r}, but processes is {processes}")
    if isinstance(model, str) and model not in ARCHITECTURES:
        raise ValueError(f"model is {model!r}, expected weights, or one of {', '.join(ARCHITECTURES)}")
    sizes = ARCHITECTURES[model] if isinstance(model, str) else Architecture.of(model, "weights")
    there = machines.machine(machine, precision)
    whole = Task(
        sizes, scope, mode, attention, low_memory, sequences, length,
        share=1.0, columns=sizes.vocabulary, orders=1.0, block=there.block, clean_block=there.clean_block,
    )  # fmt: skip
    ways: tuple[Split, ...] = ("sequences", "experiments", "vocabulary") if processes > 1 else ("none",)
    in_chunks = chunks or processes > 1
    found = [_shares(whole, way, processes, there, DTYPES[dtype], in_chunks) for way in ways]
    if split != "auto":
        found.sort(key=lambda x: x.split != split)
        if found[0].split == split and found[0].why_not:
            raise ValueError(f"split is {split!r}, but {found[0].why_not}")
    else:
        fits = there.memory / (1 if there.cores is None else processes)
        found.sort(key=lambda x: (bool(x.why_not), x.peak > fits, x.total_seconds))
    options = {
        "scope": scope, "mode": mode, "attention": attention, "sequences": sequences, "length": length,
        "dtype": dtype, "precision": precision, "low_memory": low_memory, "chunks": in_chunks,
    }  # fmt: skip
    return Plan(sizes, there, whole.experiments, processes, options, tuple(found))


def _shares(whole: Task, split: Split, processes: int, there: Machine, weight_bytes: int, chunks: bool) -> Shares:
    """What each process does: its part of the sequences, of the experiments, or of the vocabulary."""
    sent = 16.0 * whole.experiments * whole.sequences * (processes > 1)  # effects on each sequence, told to all
    task = replace(whole, columns=ceil(whole.columns / processes)) if split == "vocabulary" else whole
    if split == "vocabulary":
        sent = float(MERGED) * whole.experiments * whole.sequences * (whole.length - 1) * (processes - 1)
    if not chunks:
        steps, part = task.steps, task
    else:
        steps, part = _in_chunks(task, split, processes, there)
    seconds = {name: there.seconds(work, processes) for name, work in steps.items()}
    merging = {"merging": sent / there.link} if processes > 1 else {}
    why_not = _why_not(whole, split, processes)
    return Shares(split, steps, seconds | merging, footprint(part, weight_bytes), sent, why_not)


def _why_not(whole: Task, split: Split, processes: int) -> str:
    """See Shares."""
    if split == "vocabulary":
        try:
            Processes(size=processes).columns(whole.columns)
        except ValueError as error:
            return str(error)
    pieces = {"sequences": whole.sequences, "experiments": whole.experiments}.get(split, processes)
    return f"there are {pieces} {split} for {processes} processes" if pieces < processes else ""


def _in_chunks(task: Task, split: Split, processes: int, there: Machine) -> tuple[dict[str, Work], Task]:
    """The work of the process that runs most chunks, and a chunk as a task."""
    a, total = task.architecture, max(task.experiments, 1)
    patterns = FLOAT * a.layers * a.heads * task.length**2
    sizes = a.layers, a.d_model, a.d_head, a.vocabulary
    most = WORK["cuda" if there.cores is None else "cpu"]
    cut = Cut.of(sizes, task.scope, task.attention, total, task.length, patterns, most)
    cut = cut.for_processes(split, processes, task.sequences, total)
    blocks, pieces = ceil(task.sequences / cut.sequences), ceil(total / cut.experiments)
    hands = processes if split in ("sequences", "experiments") else 1
    mine = ceil(blocks * pieces / hands)
    chunk = replace(task, sequences=min(cut.sequences, task.sequences), share=min(1.0, cut.experiments / total))
    full = task.sequences * total / (blocks * cut.sequences * pieces * cut.experiments)  # the last chunks are smaller
    first = replace(task, sequences=min(FIRST, task.sequences, max(1, PATTERNS // max(patterns, 1))))
    of_chunk = chunk.steps
    runs = ceil(blocks / hands) if split == "sequences" else blocks
    steps = {
        "clean run": of_chunk["clean run"] * (full * runs) + first.steps["clean run"],
        "orders": of_chunk["orders"] * (full * runs),
        "ablations": of_chunk["ablations"] * (full * mine),
    }
    return steps, chunk
