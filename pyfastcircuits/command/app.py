"""The application `pyfastcircuits`, to which each command's module adds its command."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from typer.core import TyperGroup

import pyfastcircuits as fc
from pyfastcircuits.command.guard import EXIT_CODES, guarded
from pyfastcircuits.command.report import Report

# The tasks by which the help groups commands, in this order.
RUNS = "What a model does on a text"
WEIGHTS = "What its weights alone say"
MACHINE = "This build and machine"
MORE = "More"
TASKS = (RUNS, WEIGHTS, MORE, MACHINE)


class ByTask(TyperGroup):
    """Commands in the order of TASKS."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return sorted(self.commands, key=lambda name: (_place(self.commands[name]), name))


def _place(listed: Any) -> int:
    task = getattr(listed, "rich_help_panel", None)
    return TASKS.index(task) if task in TASKS else TASKS.index(MORE)


app = typer.Typer(
    cls=ByTask, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    epilog="COMMAND --help says more, and gives examples. MODEL is induction-2l unless it is named. " + EXIT_CODES,
)  # fmt: skip


def command(function: Callable[..., None] | None = None, *, task: str = MORE, example: str = "") -> Callable[..., Any]:
    """Make a function a subcommand, which `guard` ends.

    Args:
        function: its docstring's first sentence stands in the list of commands, the whole in its own help.
        task: one of TASKS: what people want when they look for it.
        example: a command line that works as it stands.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        paragraphs = [" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n")]
        listed = paragraphs[0] + (f"\n[dim]{example}[/dim]" if example else "")
        epilog = f"Example: {example}\n\n{EXIT_CODES}" if example else EXIT_CODES
        whole = "\n\n".join(filter(None, paragraphs))
        return app.command(help=whole, epilog=epilog, short_help=listed, rich_help_panel=task)(guarded(function))

    return add if function is None else add(function)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """What the heads of a transformer do, alone and in pairs: "A Mathematical Framework for Transformer Circuits"."""
    if version:
        print(fc.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def end(report: Report, made: dict[str, Any], tables: dict[str, pa.Table], files: list[Path]) -> None:
    """Tell what has been written, and by what."""
    report.found({name: table.to_pylist() for name, table in tables.items()})
    report.found({"made_by": made, "files": list(map(str, files))})
    report.line(f"written: {', '.join(map(str, files))}")
