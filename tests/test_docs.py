"""README and docs: their snippets run, their links lead somewhere, their figures are those that the benches found."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pages import blocks, executed
from support.run_notebook import words_and_numbers
from typer.main import get_command
from typer.testing import CliRunner

import pyfastcircuits as fc
from pyfastcircuits.command.cli import app

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is no installed package

from bench import record, write  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def page_id(page: Path) -> str:
    return page.stem


def code(page: Path) -> list[str]:
    """Every line of code that is no Python block: in the text, and in other blocks."""
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [*inline, *(line for block in blocks for line in block.splitlines())]


def calls(page: Path) -> list[str]:
    """The code that stands alone in the last column of a page's tables."""
    return re.findall(r"\| `((?:fc\.|trace\.|found\.|1 / )[^`]*)` \|$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_snippets_run_in_the_order_of_the_page_and_print_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, printed in executed(page, {}):
        if block.printed is not None:
            (words, numbers), (held, held_numbers) = words_and_numbers(printed), words_and_numbers(block.printed)
            assert words == held
            assert numbers == pytest.approx(held_numbers, rel=2e-2, abs=2e-2)
    saved = {x.name for x in tmp_path.glob("*.png")}
    shown = re.findall(r"\]\(pictures/([\w-]+\.png)\)", page.read_text())
    assert set(shown) <= saved, "python -m support.pages writes them"


@pytest.mark.parametrize("name", ["README.md", "docs/transformer-lens.md", "docs/figures.md"])
def test_calls_in_tables_run(name):
    page = ROOT / name
    assert len(calls(page)) >= 8
    model = weights = fc.load_weights("induction-2l")
    tokens, other = torch.randint(1, weights.d_vocab, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    trace = clean = fc.trace(weights, tokens)
    names = {"fc": fc, "model": model, "weights": weights, "tokens": tokens, "trace": trace, "clean": clean}
    names |= {
        "torch": torch,
        "head": (1, 6),
        "texts": [str(i) for i in range(12)],
        "found": fc.pair_ablation(trace, kl=True),
    }
    for call in calls(page):
        assert eval(call, names | {"corrupted": fc.trace(weights, other)}) is not None, call


COMMANDS = {line for page in PAGES for line in code(page) if line.startswith("pyfastcircuits ")}
COMMANDS |= {x.epilog.partition("\n")[0].removeprefix("Example: ") for x in get_command(app).commands.values()}
CHECKS = {line for line in COMMANDS if line.endswith(" --check")}  # of which tests/test_cli.py has what is found
LESS = {
    "sweep": "--sequences 2 --length 16 --out out",
    "heads": "--batches 1 --out out",
    "report": "--sequences 1 --length 16",
    "circuit": "--pairs 2 --steps 2 --out out",
}  # for a smaller job


def test_there_are_commands_on_the_pages():
    assert {line.split()[1] for line in COMMANDS} >= {"info", "sweep", "heads", "tables"}


@pytest.mark.parametrize("line", sorted(COMMANDS - CHECKS))
def test_commands_run(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *options = shlex.split(line)[1:]
    found = CliRunner().invoke(app, [name, *options, *LESS.get(name, "").split()])
    assert found.exit_code == 0, found.output


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    variables = set(re.findall(r"^(\w+) \?= ", makefile, re.MULTILINE))
    lines = {line for page in PAGES for line in code(page) if line.startswith("make ")}
    assert len(lines) >= 8
    for line in lines:
        target, *settings = line.split()[1:]
        assert target in targets, line
        assert {setting.partition("=")[0] for setting in settings} <= variables, line


def test_extras_that_pip_is_told_exist():
    extras = re.findall(r"^([\w-]+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {extra for page in PAGES for line in code(page) for extra in re.findall(r"'\.\[([\w-]+)\]'", line)}
    assert named >= {"report", "hf", "transformer-lens"}
    assert named <= set(extras)


def test_files_and_names_that_pages_speak_of_exist():
    for page in PAGES:
        for line in code(page):
            for name in re.findall(r"\bfc\.(\w+)", line):
                assert hasattr(fc, name), (page.name, line)
            if re.fullmatch(r"(tests|docs|bench|examples|csrc|kernels|pyfastcircuits|\.ci)/[\w./]*", line):
                assert "my_op" in line or (ROOT / line).exists(), (page.name, line)


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size < 8_000


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            assert to.exists(), target
            if anchor:
                assert anchor in {heading_anchor(line) for line in to.read_text().splitlines()}, target


def heading_anchor(line: str) -> str:
    title = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
    return title.replace(" ", "-") if line.startswith("#") else ""


def block(text: str) -> str:
    return text[text.index(write.BEGIN) : text.index(write.END)]


def test_headline_figures_are_those_of_the_performance_page():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert block((ROOT / "README.md").read_text()) == block(page)
    measured = page[page.index(write.END) :]
    ratios = re.findall(r"\| ([^|]*) \|$", block(page), re.MULTILINE)[2:]
    assert len(ratios) == len(write.HEADLINES) == 6
    for ratio in ratios:
        assert ratio == "not measured" or f"| {ratio} |" in measured


def test_every_bench_is_on_the_performance_page():
    page = (ROOT / "docs" / "performance.md").read_text()
    for file in (ROOT / "bench").glob("test_bench_*.py"):
        assert f"`bench/{file.name}`" in page, "run `python -m bench.write`"


def test_every_op_has_a_bench_of_its_name():
    ops = {file.stem for file in (ROOT / "kernels").glob("*.py")} & {name for name in dir(fc.ops) if name[0] != "_"}
    assert ops >= {"sweep_nll", "joint_nll", "target_ranks", "pair_norms", "factored_topk", "diagonal_ranks"}
    for op in ops:
        assert (ROOT / "bench" / f"test_bench_{op}.py").exists()


def test_headlines_name_what_their_benches_find():
    for headline in write.HEADLINES:
        source = (ROOT / "bench" / f"test_bench_{headline.bench}.py").read_text()
        assert all(part in source for part in headline.what), headline


def test_a_glossary_term_stands_once():
    text = (ROOT / "docs" / "glossary.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    terms = [row[0].removeprefix("| ") for row in rows if row[0] != "| term"]
    assert len(terms) > 60
    assert len(terms) == len({term.lower() for term in terms})
    for row in rows:
        if row[0] != "| term":
            assert len(row) == 3, row
            assert row[1].endswith("."), row


@pytest.mark.parametrize(
    ("measured", "goal", "met"),
    [
        ("47.8", ">= 25", True),
        ("1.16", "<= 1.15", False),
        ("0.37 GiB", "<= 2 GB", True),
        ("1.95 GiB", "<= 2 GB", False),
        ("98 MiB and 120 of inputs", "< 1 GB", True),
        ("48 MiB", "<= 128", True),
        ("1,600 of 1,600", ">= 1,600", True),
        ("True", "True", True),
        ("False", "True", False),
        ("9.6 ms a pair", "", None),
    ],
)
def test_goals_are_compared_in_their_units(measured, goal, met):
    assert record.is_met(measured, goal) is met


@pytest.mark.parametrize(("measured", "goal"), [("fast", ">= 2"), ("2", "about 2"), ("3 ms", "<= 1 GB")])
def test_a_goal_that_cannot_be_compared_is_an_error(measured, goal):
    with pytest.raises(ValueError, match="goal is"):
        record.is_met(measured, goal)


def test_goals_by_tier():
    assert record.goal_of_tier({"avx512": "<= 1.15"}, "avx512") == "<= 1.15"
    assert record.goal_of_tier({"avx512": "<= 1.15"}, "avx2") == ""


FAKE = '''"""A bench of nothing."""
import os


def test_good(found):
    found("nothing fp32, N=3: time", "2 ms")
    found("nothing fp32, N=3: theirs / ours", "7.5", ">= 5")
    found("  memory", "3 MiB", "<= 1")


def test_bad(found):
    found("nothing fp32, N=4: time", "1 | 2 ms")
    assert False, "it does not work"


def test_that_crashes(found):
    found("nothing fp32, N=5: time", "3 ms")
    os._exit(9)
'''


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with one bench, and the reports that a run of it leaves."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "test_bench_nothing.py").write_text(FAKE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
        "-p",
        "bench.conftest",
    ]
    command += ["-p", "no:cacheprovider", "--reports", str(folder / "reports"), str(folder / "test_bench_nothing.py")]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 9
    return folder


def test_a_crash_leaves_what_was_found(fake):
    (bench,) = write.collect(fake / "reports", fake)
    assert [row["quantity"] for row in bench.rows] == ["time", "theirs / ours", "memory", "time", "time"]
    assert bench.rows[2]["shape"] == "nothing fp32, N=3"
    assert bench.machine["CPU tier"] == fc.build_info()["cpu_tier"]
    assert bench.problems == [
        "`test_bad` failed: AssertionError: it does not work",
        "`test_that_crashes` did not finish",
    ]
    assert bench.missed == ["nothing fp32, N=3: memory: 3 MiB, goal <= 1"]


def test_the_page_says_what_is_met_missed_failed_and_not_measured(fake):
    benches = write.collect(fake / "reports", fake)
    page = write.page(benches)
    assert "| theirs / ours | 7.5 | >= 5 | met |" in page
    assert "| memory | 3 MiB | <= 1 | missed |" in page
    assert "1 \\| 2 ms" in page
    assert "Goals met: 1. Goals missed: 1." in page
    assert page.count("`test_bad` failed: AssertionError: it does not work.") == 2  # under the goals, and at its bench
    assert page.count("not measured |") == len(write.HEADLINES)
    assert f"| torch | {torch.__version__} |" in page


def test_what_has_not_run_is_not_made_up(tmp_path):
    benches = write.collect(tmp_path)
    assert all(bench.problems == ["not measured: this bench has not run"] for bench in benches)
    assert not re.search(r"\d", "".join(re.findall(r"\| ([^|]*) \|$", write.headline_block(benches), re.MULTILINE)))


def test_writing_fills_the_readme_and_reports_by_its_status(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{write.BEGIN}\nold\n{write.END}\nafter\n")
    reports = tmp_path / "reports"
    reports.mkdir()
    for file in (ROOT / "bench").glob("test_bench_*.py"):
        name = file.stem.removeprefix("test_bench_")
        lines = [{"machine": {"CPU": "a CPU", "threads": 2, "CPU tier": "avx2", "torch": "2.13.0", "commit": "abc"}}]
        for i, headline in enumerate(write.HEADLINES):
            if headline.bench == name:
                what = "a shape: " + ", ".join(headline.what)
                lines.append({"test": "test_it", "what": what, "measured": f"{i + 2}.5", "goal": ">= 2", "met": True})
        lines.append({"test": "test_it", "state": "passed", "reason": ""})
        (reports / f"{file.stem}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--reports", str(reports), "--root", str(tmp_path)]
    assert write.main(given) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert all(f"| {i + 2}.5 |" in readme for i in range(6))
    assert block(readme) == block((tmp_path / "docs" / "performance.md").read_text())
    assert "a CPU" in readme

    (reports / "test_bench_sweep.jsonl").unlink()
    assert write.main(given) == 1
    assert "sweep: not measured" in capsys.readouterr().out


def test_snippets_that_need_another_library_are_python():
    """`make lens` runs them: tests/adapters/test_lens_docs.py."""
    for page in PAGES:
        for block in blocks(page):
            compile(block.code, page.name, "exec")
