"""What a command tells: tables and remarks on stdout, or JSON alone; progress, warnings and errors on stderr."""

import json
import math
import threading
from collections.abc import Mapping
from datetime import timedelta
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pyfastcircuits.adapters.texts import visible
from pyfastcircuits.command.plain import significant

SECONDS = 10.0  # between two lines of progress where there is no terminal
_AVERAGED = 3600.0  # seconds over which the speed is averaged: phases differ in theirs


class Report:
    """The findings of one command, shown as they come, or with `--json` all at once; with `--quiet` not at all.

    Everything that is printed is plain text: no markup, no control characters, and lines are not wrapped.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._shows = as_json, not (as_json or quiet)
        self._out, self._errors = (
            Console(stderr=stderr, markup=False, highlight=False, emoji=False) for stderr in (False, True)
        )
        self._found: dict[str, Any] = {}
        self.going_on = ""  # the command that goes on after an interruption, if there is one
        self.bar = Bar(self._out if self._shows and self._out.is_terminal else self._errors, shown=not quiet)

    def line(self, text: str) -> None:
        """Show a remark."""
        if self._shows:
            self._out.print(visible(text), soft_wrap=True)

    def show(self, table: Table | str) -> None:
        """Show a table, or a finding in a sentence."""
        if isinstance(table, str):
            self.line(table)
        elif self._shows:
            self._out.print(table)

    def found(self, findings: Mapping[str, Any]) -> None:
        """Add findings by their names to the JSON."""
        self._found.update(findings)

    def warn(self, text: str) -> None:
        """Warn, on stderr."""
        self._errors.print(f"warning: {visible(text)}", style="yellow", soft_wrap=True)

    def error(self, text: str) -> None:
        """Say in one line what ends the command, on stderr."""
        self._errors.print(visible(text), style="red", soft_wrap=True)

    def end(self) -> None:
        """Print the JSON, if that is wanted."""
        if self._as_json:
            print(json.dumps(_finite(self._found), allow_nan=False))


class Bar:
    """The progress of a command through its phases; without a terminal, a line of it now and then."""

    def __init__(self, console: Console, *, shown: bool) -> None:
        self._console = console
        self._lines = shown and not console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._lines,
            speed_estimate_period=_AVERAGED,
        )
        self._phases: dict[str, float] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Bar":
        """Start in the phase "loading", whose end nobody knows."""
        self._progress.add_task("loading", total=None)
        (self._task,) = self._progress.tasks
        self._progress.start()
        if self._lines:
            threading.Thread(target=self._write_lines, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the bar as it is."""
        self._ended.set()
        self._progress.stop()

    def plan(self, phases: Mapping[str, float]) -> None:
        """The phases that come now, each with its number of steps; of the last, infinity where nobody knows it."""
        self._phases = {name: steps for name, steps in phases.items() if steps}
        total = sum(phases.values())
        started = self._task.start_time
        self._progress.reset(self._task.id)
        self._task.start_time = started  # the time so far is that of the whole command
        self._task.total = total if math.isfinite(total) else None
        self._progress.update(self._task.id, description=self._phase())

    def advance(self, steps: float = 1) -> None:
        """Move on by so many steps."""
        self._progress.advance(self._task.id, steps)
        self._progress.update(self._task.id, description=self._phase())

    def _phase(self) -> str:
        ends = zip(self._phases, accumulate(self._phases.values()), strict=True)
        return next((name for name, end in ends if self._task.completed < end - 1e-6), "done")

    def _write_lines(self) -> None:
        while not self._ended.wait(SECONDS):
            task = self._task
            elapsed, left = (
                None if x is None else timedelta(seconds=round(x)) for x in (task.elapsed, task.time_remaining)
            )
            share = "" if task.total is None else f" {task.percentage:.0f}%,"
            rest = "" if left is None else f", about {left} left"
            self._console.print(f"{task.description}:{share} {elapsed} so far{_rate(task)}{rest}", soft_wrap=True)


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """See rich."""
        return Text(_rate(task).removeprefix(", "), style="progress.data.speed")


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return f", {significant(speed)}/s" if speed else ""


def _finite(found: Any) -> Any:
    """The same with null for every number that is none, which JSON does not know."""
    if isinstance(found, Mapping):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
