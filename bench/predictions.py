"""The committed predictions (bench/predictions.json, in ms, by row and GPU), and what they are compared with.

`make predict` writes the table; the rows are those of `bench.gpu`, each named "section: form".
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

Table = Mapping[str, Mapping[str, float]]

FOLDER = Path(__file__).parent
TABLE = FOLDER / "predictions.json"
ALLOWED = 0.1  # of a prediction, that it may be away from the table


def committed() -> Table:
    """The table."""
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def departures(now: Table, table: Table) -> list[str]:
    """In words, the predictions that are worse or better than those of a table, or that it does not have."""
    found = []
    for row, by_gpu in now.items():
        for gpu, ms in by_gpu.items():
            before = table.get(row, {}).get(gpu)
            if before is None:
                found.append(f"{row} on {gpu} is not in bench/predictions.json")
            elif abs(ms - before) > ALLOWED * before:
                word = "slower" if ms > before else "faster"
                found.append(f"{row} on {gpu} is predicted to be {word}: {ms:.4g} ms, before {before:.4g} ms")
    return [f"{text}. `make predict` accepts it: it writes the table anew." for text in found]


def beside(row: dict[str, str], section: str, device: str) -> dict[str, str]:
    """A row of `bench.gpu` with the prediction for its device after the measured time."""
    by_gpu = committed().get(f"{section}: {row['form']}", {})
    predicted = next((f"{ms:.2f}" for gpu, ms in by_gpu.items() if gpu in device), "")
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


def ratios(results: str, sections: list[str], table: Table) -> tuple[str, dict[str, float]]:
    """The GPU that RESULTS.md was measured on, and by row how many times the prediction the measured time is."""
    device = re.search(r"## GPU\n\n(?:NVIDIA )?(\w+)", results)
    gpu = device[1] if device else ""
    found = {row: ms / table[row][gpu] for row, ms in measured(results, sections) if gpu in table.get(row, {})}
    return gpu, found


def summary(gpu: str, found: Mapping[str, float]) -> str:
    """One sentence on how far the predictions are off."""
    if not found:
        return "No prediction has been measured."
    low, *_, high = sorted(found.values())
    return (
        f"On {gpu} the {len(found)} measured times are {low:.1f} to {high:.1f} times those predicted, "
        f"{median(found.values()):.1f} times in the median."
    )
