"""What holds for every command: plain text, progress, what made a file, JSON, exit codes, and how it ends."""

import errno
import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from support.command import COMMANDS, command, refused, run
from support.random_models import random_tokens, random_weights
from typer.testing import CliRunner

import pyfastcircuits as fc
from pyfastcircuits.adapters import texts
from pyfastcircuits.adapters.texts import quoted, visible
from pyfastcircuits.command import report
from pyfastcircuits.command.cli import app
from pyfastcircuits.command.plain import in_nats, significant


@pytest.fixture
def padded(model):
    """The same with a tokenizer of six words for its 97 ids, one of which looks like an id without a token."""
    from tokenizers import Tokenizer, models

    words = {"[START]": 0, **{f"a{i}": i for i in range(1, 5)}, "<id 7>": 5}
    Tokenizer(models.WordLevel(words, unk_token="[START]")).save(str(model / "tokenizer.json"))
    return model


class TestPlainText:
    @pytest.mark.parametrize(
        "name", ["o[/]ut", "we[red]ird", ":smile:", "a$b$c^", "$x_{$", "\x1b[31mred", "\u202eback"]
    )
    def test_paths_are_plain_text(self, name, tmp_path, tokens):
        (tmp_path / name).mkdir(parents=True)
        random_weights(2, dtype=torch.float32).save(tmp_path / name / "model.safetensors")
        for which in ("sweep", "composition", "heads"):
            result = run(*command(which, tmp_path / name, tokens, tmp_path / name))
            assert result.exit_code == 0, result.output
            assert f"{visible(tmp_path / name / 'out')}/" in result.output
            assert "\x1b" not in result.output
        for option in ("--text", "--tokens"):
            output = refused("sweep", tmp_path / name, option, tmp_path / f"{name}.npy", "--out", tmp_path / "o")
            assert visible(repr(str(tmp_path / f"{name}.npy"))) in output
            assert "\x1b" not in output

    def test_tokens_are_plain_text(self, model, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers

        odd = ["\x1b[31m", "\n", "[red]", "\\n", "\t", ":smile:", "\u202e", "[/]", "\x07", "'"]
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(odd)} | {f"a{i}": i for i in range(10, 97)})
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
        tokenizer.save(str(model / "tokenizer.json"))
        text = tmp_path / "text"
        text.write_text("|".join(odd * 9) + "|a10" * 600)
        outputs = [run("sweep", model, "--text", text, "--length", 10, "--top", 40, "--out", tmp_path / "out")]
        outputs += [run("tables", model, "--head", "0.1", "-k", 40), run("tables", model, "-k", 90)]
        outputs += [run("tables", model, *(x for word in odd[:3] for x in ("--source", word)), "-k", 90)]
        for result in outputs:
            assert result.exit_code == 0, result.output
            assert not set(result.output) & {"\x1b", "\t", "\u202e", "\x07"}
        seen = "".join(outputs[1].output + outputs[2].output)
        for word in ("\x1b[31m", "\n", "[red]", ":smile:"):
            assert quoted(word) in seen

    def test_ids_without_a_token(self, padded, tmp_path):
        """A vocabulary is often padded to a multiple of 64 or 128, and a tokenizer has no token for the rest."""
        text = texts.TokenText(padded)
        assert text.decode([1, 2, 50, 3, 60, 61]) == "a1 a2<id 50>a3<id 60><id 61>"
        assert [text.quoted(i) for i in (0, 4, 5, 96)] == ["'[START]'", "'a4'", "'<id 7>'", "<id 96>"]
        ids = random_tokens(3, 12)
        np.save(tmp_path / "tokens.npy", ids.numpy())
        out = ["--out", tmp_path / "out"]
        outputs = [
            run("sweep", padded, "--tokens", tmp_path / "tokens.npy", "--top", 20, *out),
            run("tables", padded, "-k", 40),
            run("tables", padded, "--source", "a4", "-k", 90),
            run("tables", padded, "--head", "0.1", "-k", 40),
            run("tables", padded, "--all-heads", *out),
        ]
        for result in outputs:
            assert result.exit_code == 0, result.output
            assert "''" not in result.output
        for result in outputs[:-1]:
            assert re.search(r"<id \d\d>", result.output)
        rows = pq.read_table(tmp_path / "out" / "ov.parquet").to_pylist()
        assert all(row["output_text"] == text.decode([row["output"]]) for row in rows)
        assert {row["output_text"] for row in rows} & {f"<id {i}>" for i in range(6, 97)}
        assert all(row["output_text"] for row in rows)

    def test_a_line_break_is_shown_alike_everywhere(self, tmp_path):
        result = run("sweep", "--sequences", 2, "--length", 64, "--out", tmp_path, "--top", 20)
        assert "-> '\\n'" in result.output
        assert "'\\\\n'" not in result.output
        assert "'\\n'" in run("tables", "--source", "\\n").output

    def test_visible(self):
        assert visible("a\nb\x1b[0m\u202e\ud800é日 [x]") == "a\\nb\\x1b[0m\\u202e\\ud800é日 [x]"
        assert quoted(" " * 7) == "' ' * 7"


class TestProgress:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_phase_is_on_the_bar(self, name, model, tokens, tmp_path, monkeypatch):
        seen = []

        class Watched(report.Bar):
            def __exit__(self, *exception):
                seen.append((self._task.completed, self._task.total, self._task.description))
                super().__exit__(*exception)

        monkeypatch.setattr(report, "Bar", Watched)
        assert run(*command(name, model, tokens, tmp_path)).exit_code == 0
        ((done, total, phase),) = seen
        assert done == pytest.approx(total)
        assert phase == "done"

    def test_phases_follow_each_other_with_an_estimate(self):
        bar = report.Bar(Console(file=io.StringIO(), force_terminal=True, width=80), shown=True)
        with bar:
            phases = [bar._task.description]
            bar.plan({"run": 1, "nothing": 0, "orders": 2, "ablations": 4})
            for step in (1, 0.5, 1.5, 4):
                phases.append(bar._task.description)
                time.sleep(0.01)
                bar.advance(step)
            assert bar._task.time_remaining == 0
        assert phases == ["loading", "run", "orders", "orders", "ablations"]
        assert "done" in bar._console.file.getvalue()

    def test_the_rate_is_shown_and_an_end_may_be_unknown(self):
        bar = report.Bar(Console(file=io.StringIO(), force_terminal=True, width=120), shown=True)
        with bar:
            bar.plan({"sequences": float("inf")})
            for _ in range(4):
                time.sleep(0.01)
                bar.advance(5)
            assert (bar._task.total, bar._task.description) == (None, "sequences")
            assert bar._task.speed > 0
            bar._progress.refresh()
            bar.plan({"writing": 2})
            assert (bar._task.total, bar._task.completed, bar._task.description) == (2, 0, "writing")
            bar.advance(2)
        assert "/s" in bar._console.file.getvalue()

    def test_lines_without_a_terminal(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "SECONDS", 0.01)
        result = CliRunner().invoke(app, ["sweep", "--sequences", "12", "--out", str(tmp_path / ("deep" * 40))])
        assert result.exit_code == 0, result.output
        lines = [line for line in result.stderr.splitlines() if " so far" in line]
        assert len(lines) > 3
        form = r"sequences: \d+%, 0:00:\d\d so far, [\d.]+/s, about 0:00:\d\d left"
        assert any(re.fullmatch(form, line) for line in lines), lines
        assert "━━ " not in result.output
        assert f"{tmp_path}/{'deep' * 40}/pairs.png\n" in result.output

    @pytest.mark.parametrize("name", COMMANDS)
    def test_tables_fit_80_columns_without_breaking_words(self, name, tokens, tmp_path):
        first, *rest = name.split()
        given = ["--sequences", 2, "--length", 32] if first == "sweep" else []
        words = []
        for columns in (80, 300):
            result = run(first, *rest, *given, "--out", tmp_path / str(columns), columns=columns)
            assert result.exit_code == 0, result.output
            lines = [line for line in result.output.splitlines() if line[:1] in ("│", "┃", "┏", "└")]
            assert len(lines) > 3 or "--all-heads" in name
            words.append({word for line in lines for word in re.split(r"[│┃\s]+", line) if not set(word) & set("━┳─┴")})
            assert columns == 300 or all(len(line) <= 80 for line in lines)
        assert words[0] == words[1]


class TestWhatMadeAFile:
    def test_every_file_says_it(self, model, tokens, tmp_path):
        assert run(*command("sweep", model, tokens, tmp_path)).exit_code == 0
        files = {file.name for file in (tmp_path / "out").iterdir()}
        assert files == {"sweep.parquet", "orders.parquet", "pairs.png", "effects", "manifest.json", ".lock"}
        made = {name: made_by(tmp_path / "out" / name) for name in files if name.endswith((".parquet", ".png"))}
        assert all(x == made["sweep.parquet"] for x in made.values())
        found = made["sweep.parquet"]
        assert (found["command"], found["model"], found["source"]) == ("sweep", str(model), str(tokens))
        assert found["version"] == fc.__version__
        assert found["command_line"].split()[0] == "pyfastcircuits"
        assert (found["options"]["scope"], found["options"]["metric"]) == ("path", "nll")
        assert len(found["model_files_sha256"]) == len(found["tokens_sha256"]) == 64
        metadata = pq.read_schema(tmp_path / "out" / "sweep.parquet").metadata
        assert metadata[b"metric"] == b"nll"

    @pytest.mark.parametrize("name", ["sweep", "heads", "composition", "tables --all-heads"])
    def test_another_run_is_kept_and_the_same_is_not(self, name, model, tokens, tmp_path, monkeypatch):
        arguments = command(name, model, tokens, tmp_path)
        again = ["--resume"] if name == "sweep" else []
        assert run(*arguments).exit_code == 0
        assert run(*arguments, *again).exit_code == 0
        before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.p*")}
        random_weights(2, norm="rmsnorm", dtype=torch.float32, seed=1).save(model / "model.safetensors")
        for work in ("sweep", "head_scores", "composition_scores", "skip_trigrams"):
            monkeypatch.setattr(fc, work, pytest.fail)
        output = refused(*arguments, *again)
        assert re.search(r"--out is '.*': \S+\.parquet there was made by another run, .*; take another folder", output)
        assert "--force" in output
        assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.p*")}
        monkeypatch.undo()
        assert run(*arguments, "--force").exit_code == 0
        kept = [file for file, content in before.items() if file.exists() and file.read_bytes() == content]
        assert {file.suffix for file in kept} <= {".png"}

    def test_any_difference_makes_another_run(self, model, tokens, tmp_path, monkeypatch):
        arguments = command("sweep", model, tokens, tmp_path)
        assert run(*arguments).exit_code == 0
        for more in (
            ["--scope", "edge"],
            ["--mode", "mean"],
            ["--metric", "rank"],
            ["--length", 5],
            ["--dtype", "float64"],
        ):
            assert "was made by another run" in refused(*arguments, *more)
        monkeypatch.setattr(fc, "__version__", "9.9")
        assert "was made by another run" in refused(*arguments)
        monkeypatch.undo()
        assert run(*arguments, "--top", 1, "--sequences", 3, "--resume").exit_code == 0

    @pytest.mark.parametrize("name", ["sweep.parquet", "orders.parquet", "pairs.png"])
    def test_files_that_say_nothing_are_kept(self, name, model, tokens, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        assert f"{name} there does not say what made it" in refused(*command("sweep", model, tokens, tmp_path))
        assert (tmp_path / "out" / name).read_text() == "mine"

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    @pytest.mark.parametrize("name", ["sweep", "heads", "composition", "tables --all-heads"])
    def test_a_full_disk(self, name, code, model, tokens, tmp_path, monkeypatch):
        def write(table, file):
            file.write_bytes(b"PAR1")
            raise OSError(code, "of pyarrow")

        monkeypatch.setattr(pq, "write_table", write)
        result = run(*command(name, model, tokens, tmp_path))
        assert result.exit_code == 1
        assert f"error: --out is '{tmp_path / 'out'}': " in result.output
        assert re.search(r"\S+.parquet cannot be written \((No space|Read-only|Disk quota).*\)\n", result.output)
        assert "rrno" not in result.output
        left = {file.name for file in (tmp_path / "out").iterdir()}
        assert left == ({"effects", "manifest.json", ".lock"} if name == "sweep" else set())


def made_by(file):
    """What a file says of what made it."""
    if file.suffix == ".png":
        with Image.open(file) as image:
            return json.loads(image.info["made_by"])
    return json.loads(pq.read_schema(file).metadata[b"made_by"])


class TestOutput:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_json_is_all_there_is_on_stdout(self, name, model, tokens, tmp_path):
        result = run(*command(name, model, tokens, tmp_path, "--json"))
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout, parse_constant=pytest.fail)
        assert found
        for file in found.get("files", []):
            if file.endswith(".parquet"):
                rows = pq.read_table(file).to_pylist()
                assert found[file.split("/")[-1].removesuffix(".parquet")] == json.loads(json.dumps(rows))
                assert found["made_by"] == made_by(tmp_path / file)

    def test_json_of_tables_is_what_the_library_says(self, worded):
        weights = fc.load_weights(worded)
        found = json.loads(run("tables", worded, "--head", "0.1", "-k", 3, "--json").stdout)["skip-trigrams"]
        triples = fc.skip_trigrams(weights, (0, 1), k=3).top(3)
        assert [(x["source"], x["destination"], x["output"]) for x in found] == [t[:3] for t in triples]
        found = json.loads(run("tables", worded, "--head", "0.1", "--source", "a5", "-k", 3, "--json").stdout)
        expected = fc.skip_trigrams(weights, (0, 1), [5], 3)
        assert [x["destination"] for x in found["destinations"]] == expected.destinations[0].tolist()
        assert [x["output_text"] for x in found["outputs"]] == [
            f"a{x}" if x else "[START]" for x in expected.outputs[0].tolist()
        ]
        found = json.loads(run("tables", worded, "--source", "a5", "-k", 3, "--json").stdout)["bigrams"]
        best = fc.top_per_row(fc.bigrams(weights), 3, [5], normalize="center")
        assert [(x["token"], x["next"]) for x in found] == [(5, x) for x in best.columns[0].tolist()]
        assert json.loads(run("info", "--json").stdout) == fc.build_info()

    @pytest.mark.parametrize("name", COMMANDS)
    def test_quiet(self, name, model, tokens, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "SECONDS", 0.01)
        result = run(*command(name, model, tokens, tmp_path, "--quiet"))
        assert (result.exit_code, result.output) == (0, "")
        assert "error: " in refused(*command(name, model / "missing", tokens, tmp_path, "--quiet"))

    def test_small_effects_keep_their_digits(self, tmp_path):
        weights = random_weights(2, norm="rmsnorm", dtype=torch.float32)
        small = {name: x * (1e-5 if name == "W_O" else 1) for name, x in weights.tensors() if name[:2] != "b_"}
        fc.CircuitWeights(**small, norm="rmsnorm", positional="shortformer").save(tmp_path / "m.safetensors")
        (tmp_path / "t.txt").write_text("1 2 3 4 5 6 7 8\n")
        result = run(
            "sweep", tmp_path / "m.safetensors", "--tokens", tmp_path / "t.txt", "--scope", "head", "--out", tmp_path
        )
        assert "(micronats)" in result.output
        assert not re.search(r"[^.\d]0\.00+[^\d]", result.output)

    @pytest.mark.filterwarnings("default")
    def test_warnings_are_one_line(self, tmp_path):
        weights = random_weights(2, dtype=torch.float32)
        weights.W_O[0, 1] = 0
        weights.save(tmp_path / "m.safetensors")
        result = run("composition", tmp_path / "m.safetensors", "--out", tmp_path)
        assert result.stderr.splitlines()[0].startswith("warning: the OV matrix of head 0.1 is zero: its composition")
        assert ".py" not in result.stderr

    def test_figures(self):
        assert [significant(x) for x in (0, -0.0, 12.345, 0.00123, -4.56e-5, 1234567, float("nan"))] == [
            "0", "0", "12.3", "0.00123", "-4.6e-5", "1.2e6", "nan",
        ]  # fmt: skip
        assert significant(0.5, signed=True) == "+0.500"
        assert in_nats([0.5, 2e-4]) == ("millinats", ["500.0", "0.2000"])
        assert in_nats([3.2, 0.1]) == ("nats", ["3.200", "0.1000"])
        assert in_nats([4e-6]) == ("micronats", ["4.000"])
        assert in_nats([]) == ("nats", [])

    def test_version_help_and_exit_codes(self):
        assert run("--version").output.strip() == fc.__version__
        started = subprocess.run([sys.executable, "-m", "pyfastcircuits", "--version"], capture_output=True, text=True)
        assert started.stdout.strip() == fc.__version__
        for arguments in ([], ["--help"], ["sweep", "--help"], ["info", "--help"]):
            text = " ".join(run(*arguments).output.split())
            assert "1 a check failed, or files could not be written; 2 bad input; 130 interrupted" in text

    def test_a_check_that_fails(self, monkeypatch):
        from pyfastcircuits.command import check, validation

        tokens = []  # the same each time

        def held_out_tokens(shown, held_out):
            if not tokens:
                tokens.append(texts.corpus_tokens(shown, True))
            return tokens[0]

        monkeypatch.setattr(check, "corpus_tokens", held_out_tokens)
        for errors, code in (((0.0, 1e-9), 0), ((0.0, 1e-3), 1), ((0.0, float("nan")), 1)):
            monkeypatch.setattr(validation, "rebuilt_errors", lambda *a, errors=errors: errors)
            result = run("tables", "bigram-0l", "--check", "--json")
            assert result.exit_code == code
            assert ("error: --check: what the tables give differs" in result.stderr) == (code == 1)


PHASES = {
    "loading": "options.load_model = lambda *a: time.sleep(60)",
    "in C": "fc.sweep = lambda *a, **k: torch.linalg.svd(torch.randn(6000, 6000))",
    "in an op": "fc.sweep = lambda *a, **k: torch.ops.pyfastcircuits.cpu_rate('fma', 60.0)",
    "reading": "texts.held_out_text = lambda: 'word ' * 20_000_000",
    "the work": "",
}


@pytest.mark.alone
@pytest.mark.processes
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_within_a_second(phase, tmp_path):
    script = f"""
import time, torch
import pyfastcircuits as fc
from pyfastcircuits.adapters import texts
from pyfastcircuits.command import cli, options
{PHASES[phase]}
print("started", flush=True)
cli.app(["sweep", "--out", {str(tmp_path)!r}])
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as started:
        assert started.stdout.readline() == "started\n"
        time.sleep(1)
        start = time.monotonic()
        started.send_signal(signal.SIGINT)
        *_, last = iter(started.stderr.readline, "")
        assert last.startswith("interrupted")
        assert started.wait() == 130
        assert time.monotonic() - start < 1
    assert not list(tmp_path.glob("*.partial"))
