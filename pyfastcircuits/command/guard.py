"""How every command ends: a result, one line of error, or Ctrl-C; each with its exit code."""

import inspect
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from pyfastcircuits.command import processes
from pyfastcircuits.command.report import Report

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
EXIT_CODES = "Exit codes: 0 done; 1 a check failed, or files could not be written; 2 bad input; 130 interrupted."
GIVES = "What it shows and writes"  # the group of such options in the help
_GRACE = 0.4  # seconds in which Python may end by itself after Ctrl-C
_COMMON = {
    "as_json": Annotated[
        bool, typer.Option("--json", help="print the findings as JSON, and nothing else", rich_help_panel=GIVES)
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", help="show no tables and no progress, only errors", rich_help_panel=GIVES)
    ],
}


class Failed(Exception):
    """The work was done and what came of it is bad: exit code 1."""


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Give a function of a Report and options --json and --quiet too, and end it as this module says."""
    _, *own = inspect.signature(function).parameters.values()
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        for name, hint in _COMMON.items()
    ]
    options = {x.name: _option(x) for x in own}
    options |= {"name_or_path": "MODEL", "tokens": "--tokens", "text": "--text"}

    @wraps(function)
    def command(*, as_json: bool, quiet: bool, **given: Any) -> None:
        first = processes.rank() == 0
        report = Report(as_json=as_json and first, quiet=quiet or not first)
        try:
            with _ended_by_ctrl_c(report), warnings.catch_warnings():
                warnings.showwarning = lambda message, *where, **more: report.warn(str(message))
                function(report, **given)
                report.end()
        except KeyboardInterrupt:
            report.error(_interrupted(report))
            raise typer.Exit(INTERRUPTED) from None
        except Failed as error:
            report.error(f"error: {error}")
            raise typer.Exit(FAILED) from None
        except (ValueError, TypeError, IndexError, OSError, RuntimeError, ImportError) as error:
            if isinstance(error, BrokenPipeError):  # nobody reads any more
                raise
            report.error(f"error: {_named(str(error), options)}")
            raise typer.Exit(REFUSED) from None

    command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {x.name: x.annotation for x in (*own, *common)}
    return command


def _option(parameter: inspect.Parameter) -> str:
    """The option of a parameter: the one that it declares, or the one that typer makes of its name."""
    given = (x for x in getattr(parameter.annotation, "__metadata__", ()) if isinstance(x, OptionInfo))
    declared = (name for x in given for name in (x.default, *(x.param_decls or ())))  # typer's first is the default
    long = (name for name in declared if isinstance(name, str) and name.startswith("--"))
    return next(long, f"--{parameter.name.replace('_', '-')}")


def _named(message: str, options: dict[str, str]) -> str:
    """A message that starts with the name of an argument, with the name of its option instead."""
    return re.sub(r"^\w+(?= is | has |=|\[)", lambda found: options.get(found[0], found[0]), message)


def _interrupted(report: Report) -> str:
    return f"interrupted; this goes on from there: {report.going_on}" if report.going_on else "interrupted"


@contextmanager
def _ended_by_ctrl_c(report: Report) -> Iterator[None]:
    """End the process soon after Ctrl-C even where a library keeps Python from raising KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, ended = signal.set_wakeup_fd(writer), threading.Event()

    def watch() -> None:
        for byte in iter(lambda: os.read(reader, 1), b""):
            if byte[0] == signal.SIGINT and not ended.wait(_GRACE):
                shown = b"\x1b[?25h" if os.isatty(2) else b""  # the cursor, which the bar hides
                os.write(2, shown + f"{_interrupted(report)}\n".encode())
                os._exit(INTERRUPTED)
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
