"""The application `pyfastcircuits`, to which each command's module adds its command."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import pyfastcircuits as fc
from pyfastcircuits.command.guard import EXIT_CODES, guarded
from pyfastcircuits.command.report import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a subcommand; see guard."""
    return app.command(epilog=EXIT_CODES)(guarded(function))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Transformer-circuit analysis as fused kernels."""
    if version:
        print(fc.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def end(report: Report, made: dict[str, Any], tables: dict[str, pa.Table], files: list[Path]) -> None:
    """Tell what has been written, and by what."""
    report.found({name: table.to_pylist() for name, table in tables.items()})
    report.found({"made_by": made, "files": list(map(str, files))})
    report.line(f"written: {', '.join(map(str, files))}")
