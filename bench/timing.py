"""Ratios measured side by side: functions run in turn, round after round, so that a noisy machine hits them alike."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one run of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def cpu_rate(kind: str) -> float:
    """Operations a second now: "fma", "bf16" (FLOP/s) or "exp"."""
    return float(torch.ops.pyfastcircuits.cpu_rate(kind, 0.3))


def peak_bytes(function: Callable[[], object]) -> int:
    """How far the resident set rises above where it stands while the function runs (Linux).

    Scratch that earlier calls left to the kernel does not count as standing.
    """

    def status(field: str, file: str = "status") -> int:
        line = next(x for x in Path(f"/proc/self/{file}").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that earlier work freed would hide what this takes
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS") - status("LazyFree", "smaps_rollup")
    kept = function()
    peak = status("VmHWM")
    del kept
    return peak - before
