"""`python -m bench.write`: makes docs/performance.md, and the headline ratios of README.md, of what the benches found.

It reads the files that `bench.record` left. A figure that no bench found is shown as "not measured"; none is kept from
an earlier page. The exit status is 1 if a bench failed, did not run or did not meet a goal.
"""

import argparse
import ast
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import mca
from bench.gpu import CAPTIONS, RESULTS
from bench.predictions import committed, ratios, summary
from bench.record import REPORTS, ROOT

BEGIN = "<!-- bench:begin (`make bench` writes what is between these two comments) -->"
END = "<!-- bench:end -->"
FIRST = ("sweep", "models", "experiments", "composition")  # the order of the page; the others are ops, by name


@dataclass(frozen=True)
class Headline:
    """One of the ratios in README.md: where it is found, and what it says there."""

    bench: str
    what: tuple[str, ...]  # parts of the figure's name
    work: str
    beside: str


PAIR_OF_GPT2 = "GPT-2 small's shape"
HEADLINES = (
    Headline(
        "models", ("paths through two heads ablated", "one hooked forward pass / ours"),
        f"ablate the path through a pair of heads, {PAIR_OF_GPT2}", "a hooked TransformerLens forward pass",
    ),
    Headline(
        "experiments", ("heads ablated, attention frozen, fp32", "one hooked forward pass / ours"),
        f"ablate a head, attention frozen, {PAIR_OF_GPT2}", "a hooked TransformerLens forward pass",
    ),
    Headline(
        "experiments", ("heads ablated, attention recomputed", "one hooked forward pass / ours"),
        f"ablate a head, attention recomputed, {PAIR_OF_GPT2}", "a hooked TransformerLens forward pass",
    ),
    Headline(
        "composition", ("composition scores", "TransformerLens / ours"),
        "Q-, K- and V-composition scores of all pairs of 144 heads", "`all_composition_scores` of TransformerLens",
    ),
    Headline(
        "composition", ("copying scores", "TransformerLens' loop / ours"),
        "eigenvalue copying scores of 144 heads", "`FactoredMatrix.eigenvalues` of TransformerLens",
    ),
    Headline(
        "factored_topk", ("top 100 of", "torch in chunks of", "rows / ours"),
        "the 100 largest entries of a head's OV circuit over 50,257 tokens", "torch, the circuit made in chunks of rows",
    ),
)  # fmt: skip

INTRODUCTION = """\
# Performance

`make bench` writes this page and the headline ratios of [README.md](../README.md); nobody edits either by hand.

A ratio compares functions that take turns, round after round, in one process on one machine, so that whatever else the
machine does hits them alike. A ratio "theirs / ours" above 1 means that this library is faster. Times and rates are
medians over the rounds. Times differ between machines and from day to day: compare ratios of one run only.

A limit is what the machine itself can do: loops that stay in registers measure its rates of multiply-adds (FMA) and of
exponentials in the same run. A goal is a bound that this project sets itself; some goals differ by CPU tier.
"""

ESTIMATE = """\
## Estimate of the multiply loop

`make mca` compiles the loop that every CPU op spends most of its time in as each tier does, and asks llvm-mca how many
multiply-adds a cycle it makes on cores that are not at hand. It is an estimate, not a measurement: all data are in the
L1 cache, and LLVM's models are not the cores. Those of `apple-m1` and `apple-m2` are of an older core of Apple's, with
three vector pipes in place of four; those of `icelake-server` and `sapphirerapids` have one pipe for 512-bit
multiply-adds where those servers have two. The peak is the model's.
"""

GPU = """\
## GPU

`make gpu` builds, tests and measures on a machine that has a GPU, and writes
[bench/RESULTS.md](../bench/RESULTS.md): figures of an H200 stand there, beside what torch and torch.compile take, and
not all of ours are the better ones. Other GPUs are not yet measured. Where there is no GPU, the tests compile the kernels
for sm_80, sm_90a and sm_100, check them for register spills, and run them in an interpreter or thread by thread on the
CPU.

`make predict` counts in the machine code of every kernel what each pipe of a multiprocessor has to do (tensor cores,
multiply-adds, integers and comparisons, exponentials, shared memory, issue slots), at the shapes of `make gpu`.
[bench/predictions.json](../bench/predictions.json) has two times for A100, H100, H200 and B200: of the busiest pipe, which
is a lower bound, and of all pipes in turn, as where barriers part what a program does. A test fails where a change moves
one by more than a tenth. They are predicted, not measured: no warp waits in them, and of a call only its largest kernels
are counted. Nearest are products in fp32, which loads from shared memory bind and not multiply-adds; farthest is
`frozen_attention` in "ieee", whose weights are parted anew for every product.

"""


@dataclass
class Bench:
    """What one bench file found.

    Attributes:
        name: that of the file, without "test_bench_" and ".py".
        title: the first line of its docstring.
        machine: the facts of the run; empty if it did not run.
        rows: what, measured, goal, met.
        outcomes: of each test, with its reason: "passed", "failed", "skipped", or "begun" for one that never ended.
    """

    name: str
    title: str
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Tests that failed, crashed or were skipped, in words; a bench that did not run."""
        if not self.machine:
            return ["not measured: this bench has not run"]
        words = {"failed": "failed", "begun": "did not finish", "skipped": "was skipped"}
        return [
            f"`{test}` {words[state]}{': ' + reason if reason else ''}"
            for test, (state, reason) in self.outcomes.items()
            if state in words
        ]

    @property
    def missed(self) -> list[str]:
        """The figures that do not meet their goal."""
        return [f"{_full(row)}: {row['measured']}, goal {row['goal']}" for row in self.rows if row["met"] is False]


def collect(reports: Path, folder: Path = ROOT / "bench") -> list[Bench]:
    """Every bench file of a folder, with what its report says."""
    benches = []
    for file in folder.glob("test_bench_*.py"):
        title = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or file.stem).splitlines()[0]
        bench = Bench(file.stem.removeprefix("test_bench_"), title)
        report = reports / f"{file.stem}.jsonl"
        _read(bench, report.read_text(encoding="utf-8").splitlines() if report.exists() else [])
        benches.append(bench)
    place = {name: i for i, name in enumerate(FIRST)}
    return sorted(benches, key=lambda bench: (place.get(bench.name, len(FIRST)), bench.name))


def _read(bench: Bench, lines: Iterable[str]) -> None:
    shape = ""
    for line in map(json.loads, lines):
        if "machine" in line:
            bench.machine = line["machine"]
        elif "state" in line:
            bench.outcomes[line["test"]] = line["state"], line.get("reason", "")
        else:
            # "shape: quantity" begins a group; an indented name goes on with the last one
            before, colon, after = line["what"].partition(": ")
            if line["what"].startswith(" "):
                before, after = shape, line["what"].strip()
            elif not colon:
                before, after = "", line["what"]
            shape = before
            bench.rows.append({**line, "shape": before, "quantity": after})


def _full(row: Mapping[str, Any]) -> str:
    return f"{row['shape']}: {row['quantity']}" if row["shape"] else row["quantity"]


def ratio_of(headline: Headline, benches: Sequence[Bench]) -> str:
    """The measured ratio of a headline; "not measured" where its bench did not find one."""
    rows = [row for bench in benches if bench.name == headline.bench for row in bench.rows]
    found = [row["measured"] for row in rows if all(part in _full(row) for part in headline.what)]
    return found[0] if found else "not measured"


def headline_block(benches: Sequence[Bench]) -> str:
    """The headline ratios and the machine, from BEGIN to END."""
    lines = [BEGIN, "| work | beside | theirs / ours |", "| --- | --- | --- |"]
    lines += [f"| {h.work} | {h.beside} | {ratio_of(h, benches)} |" for h in HEADLINES]
    machines = _machines([bench for bench in benches if bench.name in {h.bench for h in HEADLINES}])
    facts = machines[0] if machines else {}
    words = [str(facts.get("CPU", "")), f"{facts.get('threads')} threads", f"tier {facts.get('CPU tier')}"]
    words += [
        f"torch {facts.get('torch')}",
        *([f"TransformerLens {v}"] if (v := facts.get("transformer-lens")) else []),
    ]
    words += [f"commit {facts.get('commit')}", str(facts.get("date"))]
    if len(machines) > 1:
        machine = "The benches ran on more than one machine or commit."
    else:
        machine = f"Measured on: {', '.join(words)}." if facts else "None of these benches has run: run `make bench`."
    return "\n".join([*lines, "", machine, END])


def _machines(benches: Sequence[Bench]) -> list[dict[str, Any]]:
    """The different machines, builds and commits that the benches ran on; days count as one."""
    found: dict[str, dict[str, Any]] = {}
    for bench in benches:
        if bench.machine:
            key = json.dumps({k: v for k, v in bench.machine.items() if k != "date"})
            found.setdefault(key, bench.machine)
    return list(found.values())


def page(benches: Sequence[Bench], estimate: str = "Not estimated: run `make mca`.\n") -> str:
    """The text of docs/performance.md, with the table of `bench.mca`."""
    machines = _machines(benches)
    out = [INTRODUCTION, "## Machine\n"]
    if not machines:
        out.append("No bench has run yet: run `make bench`.\n")
    for facts in machines:
        out.append("| fact | value |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items()))
    if len(machines) > 1:
        out.append("These benches ran on more than one machine, build or commit: compare figures of one bench only.\n")
    out += ["## Headline ratios\n", headline_block(benches) + "\n", "## Goals\n", _goals(benches)]
    for bench in benches:
        out += [f"## {bench.name}\n", f"{bench.title} File: `bench/test_bench_{bench.name}.py`.\n"]
        out += [f"- {_capital(problem)}." for problem in bench.problems] + [""] * bool(bench.problems)
        if bench.rows:
            out.append(_table(bench.rows))
    return "\n".join([*out, ESTIMATE, estimate, GPU + distance()]).rstrip() + "\n"


def distance() -> str:
    """How far the predictions are from what RESULTS.md has of a GPU."""
    words = summary(*ratios(RESULTS.read_text(encoding="utf-8"), list(CAPTIONS), committed()))
    return textwrap.fill(words, 120)


def _goals(benches: Sequence[Bench]) -> str:
    met = sum(row["met"] is True for bench in benches for row in bench.rows)
    missed = [miss for bench in benches for miss in bench.missed]
    silent = [f"`{bench.name}`" for bench in benches if not bench.machine]
    broken = [f"`{bench.name}`: {problem}" for bench in benches if bench.machine for problem in bench.problems]
    lines = [f"Goals met: {met}. Goals missed: {len(missed)}.", ""]
    lines += [f"- Missed: {text}." for text in missed] + [f"- Without a result: {text}." for text in broken]
    lines += [f"- Not run: {', '.join(silent)}."] if silent else []
    return "\n".join(lines).rstrip() + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines, shape = ["| figure | measured | goal | met |", "| --- | --- | --- | --- |"], ""
    for row in rows:
        if row["shape"] != shape and row["shape"]:
            lines.append(f"| **{row['shape']}** | | | |")
        shape = row["shape"]
        met = {True: "met", False: "missed", None: ""}[row["met"]]
        lines.append("| " + " | ".join(_cell(x) for x in (row["quantity"], row["measured"], row["goal"], met)) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_block(text: str, block: str) -> str:
    """A text with what is between its markers replaced.

    Raises:
        ValueError: a text without the markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + block + after


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files; the number of things that are wrong is no exit status, only whether there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--reports", type=Path, default=ROOT / REPORTS, help="folder of what the benches left")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    given = parser.parse_args(arguments)
    benches = collect(given.reports)
    estimate = [file.read_text(encoding="utf-8") for file in given.reports.glob(mca.PAGE)]
    (given.root / "docs" / "performance.md").write_text(page(benches, *estimate), encoding="utf-8")
    readme = given.root / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), headline_block(benches)), encoding="utf-8")
    wrong = [f"{bench.name}: {text}" for bench in benches for text in (*bench.problems, *bench.missed)]
    print("\n".join(wrong) if wrong else "every bench ran, and every goal is met")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
