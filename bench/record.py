"""What the benches find, kept for `bench.write`: a file of JSON lines for each bench file.

A line is written as soon as it is known, so a bench that crashes leaves everything that it found before.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyfastcircuits as fc

ROOT = Path(__file__).resolve().parent.parent
REPORTS = "build/bench"  # below the root of the repository
_NUMBER = re.compile(r"(?P<number>-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)\s*(?P<unit>%|kB|[KMG]i?B)?")
_BYTES = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_HOLDS = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__, ">": float.__gt__}

Goal = str | Mapping[str, str]


def machine() -> dict[str, Any]:
    """The facts that a measurement depends on: CPU, build, libraries, commit and date."""
    build = fc.build_info()
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    libraries = {}
    for name in ("transformer-lens", "transformers", "numpy"):
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "CPU": _cpu_name(),
        "logical CPUs": os.cpu_count(),
        "threads": build["threads"],
        "CPU tier": build["cpu_tier"],
        **{name.replace("_", " "): value for name, value in build.items() if "cache" in name},
        "compiler": build["compiler"],
        "Python": platform.python_version(),
        "torch": build["torch"],
        **libraries,
        "commit": git.stdout.strip() or "unknown",
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def goal_of_tier(goal: Goal, tier: str) -> str:
    """The goal on a CPU tier; a mapping from tiers to goals has none for the tiers that it leaves out."""
    return goal if isinstance(goal, str) else goal.get(tier, "")


def is_met(measured: str, goal: str) -> bool | None:
    """Whether the first number of `measured` meets a goal such as ">= 25" or "< 1 GB"; None without a goal.

    A goal without a unit is in the unit of what was measured.

    Raises:
        ValueError: a goal or a measurement that cannot be compared.
    """
    if not goal:
        return None
    if goal == "True":
        return measured == "True"
    sign, _, bound = goal.partition(" ")
    found, wanted = _NUMBER.search(measured), _NUMBER.fullmatch(bound)
    if sign not in _HOLDS or found is None or wanted is None:
        raise ValueError(f"goal is {goal!r} and measured is {measured!r}: they cannot be compared")
    value, limit = (float(match["number"].replace(",", "")) for match in (found, wanted))
    if wanted["unit"] in _BYTES:
        if found["unit"] not in _BYTES:
            raise ValueError(f"goal is {goal!r}, but measured is {measured!r}, which is not in bytes")
        value, limit = value * _BYTES[found["unit"]], limit * _BYTES[wanted["unit"]]
    return bool(_HOLDS[sign](value, limit))


class Recorder:
    """A pytest plugin that writes what each bench file finds to `<folder>/<file's stem>.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[tuple[str, str, str]] = []  # (what, measured, goal) of this session
        self._begun: set[Path] = set()

    def found(self, test: str, what: str, measured: str, goal: Goal = "") -> None:
        """Keep one figure of a test. Goals are compared here, so that one that cannot be is an error of the bench."""
        text = goal_of_tier(goal, fc.build_info()["cpu_tier"])
        line = {"what": what, "measured": measured, "goal": text, "met": is_met(measured, text)}
        self._write(test, line)
        self.lines.append((what, measured, text))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test that is begun and never ends has crashed."""
        self._write(nodeid, {"state": "begun"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The outcome of each test, with the reason where it is not a success."""
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, {"state": report.outcome, "reason": _reason(report)})

    def _write(self, test: str, line: dict[str, Any]) -> None:
        module, _, name = test.partition("::")
        file = self.folder / f"{Path(module).stem}.jsonl"
        if file not in self._begun:
            self._begun.add(file)
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"machine": machine()}) + "\n")
        with file.open("a") as out:
            out.write(json.dumps({"test": name, **line}) + "\n")


def _reason(report: Any) -> str:
    """The last line of a failure, the message of a skip."""
    if report.passed:
        return ""
    if report.skipped:
        return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).splitlines()
    return lines[0] if lines else "failed"
