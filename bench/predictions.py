"""The committed predictions (bench/predictions.json), and what they are compared with.

`make predict` writes the table: by row of `bench.gpu`, named "section: form", and by GPU, two times in ms. The first is
that of a kernel's busiest pipe, as if all others worked beside it; the second is that of its pipes in turn, as if none did.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

Table = Mapping[str, Mapping[str, Sequence[float]]]

FOLDER = Path(__file__).parent
TABLE = FOLDER / "predictions.json"
TIMES = ("by the busiest pipe", "by all pipes in turn")
ALLOWED = 0.1  # of a prediction, that it may be away from the table


def committed() -> Table:
    """The table."""
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write(table: Table) -> None:
    """Replaces the table, a line for each row."""
    lines = [f" {json.dumps(row)}: {json.dumps(by_gpu)}" for row, by_gpu in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def departures(now: Table, table: Table) -> list[str]:
    """In words, the predictions that are worse or better than those of a table, or that it does not have."""
    found = []
    for row, by_gpu in now.items():
        for gpu, times in by_gpu.items():
            before = table.get(row, {}).get(gpu)
            if before is None:
                found.append(f"{row} on {gpu} is not in bench/predictions.json")
                continue
            for what, ms, old in zip(TIMES, times, before, strict=True):
                if abs(ms - old) > ALLOWED * old:
                    change = "slower" if ms > old else "faster"
                    found.append(f"{row} on {gpu} is predicted to be {change} {what}: {ms:.4g} ms, before {old:.4g} ms")
    return [f"{text}. `make predict` accepts it: it writes the table anew." for text in found]


def beside(row: dict[str, str], section: str, device: str) -> dict[str, str]:
    """A row of `bench.gpu` with the predictions for its device after the measured time."""
    by_gpu = committed().get(f"{section}: {row['form']}", {})
    predicted = next((f"{low:.2f} to {high:.2f}" for gpu, (low, high) in by_gpu.items() if gpu in device), "")
    columns = list(row.items())
    return dict([*columns[:2], ("predicted ms", predicted), *columns[2:]])


def measured(results: str, sections: list[str]) -> Iterator[tuple[str, float]]:
    """Row and ms of every row of the GPU part of RESULTS.md, whose tables stand below a caption for each section."""
    section, columns = iter(sections), []
    current = ""
    _facts, *parts = results.partition("## GPU\n")[2].partition("\n## ")[0].strip().split("\n\n")
    for part in parts:
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines()]
        if part.startswith("|"):
            columns, _, *rows = lines
            yield from ((f"{current}: {row[0]}", float(row[columns.index("ms")])) for row in rows)
        elif not part.startswith("-"):
            current = next(section)


# Rows whose kernels are others since RESULTS.md was measured: drop this when `make gpu` has run again.
CHANGED = re.compile(r"joint: |sweep: .*triton (ieee|tf32)$")


def ratios(results: str, sections: list[str], table: Table) -> tuple[str, dict[str, tuple[float, ...]]]:
    """The GPU that RESULTS.md was measured on, and by row how many times both predictions the measured time is.

    Rows whose kernels have changed since are left out.
    """
    device = re.search(r"## GPU\n\n(?:NVIDIA )?(\w+)", results)
    gpu = device[1] if device else ""
    rows = [
        (row, ms) for row, ms in measured(results, sections) if gpu in table.get(row, {}) and not CHANGED.match(row)
    ]
    return gpu, {row: tuple(ms / predicted for predicted in table[row][gpu]) for row, ms in rows}


def summary(gpu: str, found: Mapping[str, Sequence[float]]) -> str:
    """One sentence on how far the predictions are off."""
    if not found:
        return "No prediction has been measured."
    parts = []
    for what, values in zip(TIMES, zip(*found.values(), strict=True), strict=True):
        parts.append(
            f"{min(values):.1f} to {max(values):.1f} times those predicted {what} ({median(values):.1f} in the median)"
        )
    return f"On {gpu} the {len(found)} measured times are {' and '.join(parts)}."
