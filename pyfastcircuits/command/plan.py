"""The command `plan`: what a sweep costs, before it runs."""

from typing import Annotated

import typer
from rich.table import Table

import pyfastcircuits as fc
from pyfastcircuits.command import options
from pyfastcircuits.command.app import RUNS, command
from pyfastcircuits.command.options import READS, Dtype, Model, ModelOption, Precision
from pyfastcircuits.command.report import Report
from pyfastcircuits.command.sweep import MODES, PATTERNS_BEHIND, SCOPES
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.sweeps.architectures import ARCHITECTURES
from pyfastcircuits.sweeps.plan import Plan, Shares
from pyfastcircuits.sweeps.units import amount, duration, size
from pyfastcircuits.sweeps.work import SweepScope


@command(task=RUNS, example="pyfastcircuits plan gpt2 --machine H100 --sequences 64")
def plan(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    scope: Annotated[SweepScope, typer.Option(help=SCOPES)] = "path",
    mode: Annotated[Mode, typer.Option(help=MODES)] = "zero",
    attention: Annotated[Attention, typer.Option(help=PATTERNS_BEHIND)] = "frozen",
    sequences: Annotated[int, typer.Option(min=1, help=options.MOST, rich_help_panel=READS)] = 256,
    length: Annotated[int, typer.Option(min=2, help=options.LONGEST, rich_help_panel=READS)] = 512,
    machine: Annotated[
        str, typer.Option(help="here: this CPU, measured once; A100, H100, H200, B200, laptop: from data sheets")
    ] = "here",
    processes: Annotated[int, typer.Option(min=1, help="that share the sweep")] = 1,
    split: options.Split = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
    low_memory: options.LowMemory = False,
) -> None:
    """What a sweep would take, before it runs: operations, memory and time, here or on another machine.

    MODEL may be gpt2 to gpt2-xl, pythia-70m to pythia-12b, llama-3-8b or llama-3-70b too: sizes are enough.
    """
    model = options.named(name, option)
    known = model if model in ARCHITECTURES else options.weights_of(model, "float32", "cpu")
    found = fc.plan(
        known, scope, mode, attention, sequences=sequences, length=length, machine=machine, processes=processes,
        split=split, dtype=dtype, precision=precision, low_memory=low_memory,
    )  # fmt: skip
    a = found.architecture
    report.line(
        f"{model}: {a.layers} layers, {a.heads} heads, {a.vocabulary} tokens; "
        f"{sequences} sequences of {length} tokens; {found.experiments} experiments"
    )
    report.line(f"{found.machine.name}: {found.machine.source}")
    report.show(_phases(found))
    report.show(_memory(found))
    if processes > 1:
        report.show(_splits(found))
    report.found(record(found))


def record(found: Plan) -> dict[str, object]:
    """The plan as plain values, for --json."""
    return {
        "experiments": found.experiments, "machine": found.machine.name, "source": found.machine.source,
        "flops": found.flops, "bytes": found.moved, "exponentials": found.exponentials,
        "seconds": found.seconds, "memory": found.memory, "split": found.chosen.split,
        "phases": dict(found.chosen.seconds), "memory_by_part": dict(found.chosen.memory),
        "splits": [
            {"split": x.split, "seconds": x.total_seconds, "memory": x.peak, "sent": x.sent, "why_not": x.why_not}
            for x in found.splits
        ],
    }  # fmt: skip


def _phases(found: Plan) -> Table:
    each = "" if found.processes == 1 else f" of each of {found.processes} processes, split by {found.chosen.split}"
    table = Table("phase", title=f"work{each}", title_justify="left")
    for column in ("FLOP", "bytes", "exponentials", "time"):
        table.add_column(column, justify="right")
    for phase, work in found.chosen.steps.items():
        figures = amount(work.flops), amount(work.moved), amount(work.exponentials)
        table.add_row(phase, *figures, duration(found.chosen.seconds[phase]))
    if "merging" in found.chosen.seconds:
        table.add_row("merging", "", amount(found.chosen.sent), "", duration(found.chosen.seconds["merging"]))
    table.add_section()
    figures = amount(found.flops), amount(found.moved), amount(found.exponentials)
    table.add_row("all", *figures, duration(found.seconds))
    return table


def _memory(found: Plan) -> Table:
    each = "" if found.processes == 1 else " of each process"
    table = Table(title=f"memory at its peak{each}", title_justify="left")
    for part in (*found.chosen.memory, "all"):
        table.add_column(part, justify="right")
    table.add_row(*map(size, (*found.chosen.memory.values(), found.memory)))
    return table


def _splits(found: Plan) -> Table:
    table = Table("split by", title=f"{found.processes} processes", title_justify="left")
    for column in ("time", "memory", "exchanged"):
        table.add_column(column, justify="right")
    table.add_column("")
    for shares in found.splits:
        table.add_row(
            shares.split, duration(shares.total_seconds), size(shares.peak), size(shares.sent), _remark(found, shares)
        )
    return table


def _remark(found: Plan, shares: Shares) -> str:
    if shares.why_not:
        return f"not possible: {shares.why_not}"
    room = found.machine.memory / (1 if found.machine.cores is None else found.processes)
    over = f"more than the {size(room)} there are" if shares.peak > room else ""
    return ", ".join(filter(None, ("chosen" if shares is found.chosen else "", over)))
