"""Stored sweeps: nothing is lost, nothing is there twice, nothing is mixed, however a run ends."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support.command import run as run_command
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.sweeps import store as stores
from pyfastcircuits.sweeps import sweep as sweeps
from pyfastcircuits.sweeps import work as works

ROOT = Path(__file__).parents[1]
WEIGHTS, TOKENS = random_weights(2, dtype=torch.float32), random_tokens(7, 12)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of two sequences, each a file of its own."""
    monkeypatch.setattr(works, "WORK", {"cpu": 1e6})
    monkeypatch.setattr(stores, "WAIT", (0.0, 0.0))
    assert works.work(WEIGHTS, WEIGHTS, "path", "zero", "frozen", {}, sweeps.Given(TOKENS)).cut(12).sequences == 2


@pytest.fixture(scope="module")
def whole():
    """The sweep in memory."""
    return fc.sweep(WEIGHTS, TOKENS)


def sweep(folder, **more):
    return fc.sweep(WEIGHTS, TOKENS, out=folder, **more)


def parts(folder):
    return sorted((folder / "effects").iterdir())


def assert_same(found, expected):
    """Bit for bit."""
    for name in ("values", "delta", "kl", "standard_error", "baseline"):
        assert torch.equal(getattr(found.result, name), getattr(expected.result, name)), name
    assert torch.equal(found.orders, expected.orders)
    assert all(map(torch.equal, found.marginals, expected.marginals))
    assert torch.equal(found.loss, expected.loss)


def test_the_table_is_that_of_the_sweep_in_memory(tmp_path, whole):
    done = []
    found = sweep(tmp_path, progress=done.append)
    assert list(found.result.labels) == list(whole.result.labels)
    for name in ("values", "delta", "kl"):
        torch.testing.assert_close(
            getattr(found.result, name), getattr(whole.result, name).double(), rtol=1e-5, atol=1e-7
        )
    torch.testing.assert_close(found.orders.float(), whole.orders)
    torch.testing.assert_close(found.loss.float(), whole.loss)
    assert sum(done) == pytest.approx(len(TOKENS))
    assert (found.sequences, found.settled) == (7, None)
    assert [x.target for x in found.examples(3)] == [x.target for x in whole.examples(3)]


def test_every_sequence_and_experiment_has_one_row(tmp_path):
    import duckdb
    import pandas as pd
    import polars as pl

    sweep(tmp_path)
    assert len(parts(tmp_path)) == 4
    single = fc.pair_ablation(fc.trace(WEIGHTS, TOKENS), kl=True, per_sequence=True).table().to_pandas()
    names = ["sequence", "source_layer", "source_head", "dest_layer", "dest_head"]
    expected = single.sort_values(names, ignore_index=True)
    glob = f"{tmp_path}/effects/*.parquet"
    for rows in (
        pd.read_parquet(tmp_path / "effects"),
        pl.read_parquet(glob).to_pandas(),
        duckdb.sql(f"select * from '{glob}'").df(),
    ):
        rows = rows.sort_values(names, ignore_index=True)
        assert list(rows.columns) == [*names, "positions", "delta_nll", "kl"]
        pd.testing.assert_frame_equal(rows[[*names, "delta_nll", "kl"]], expected[[*names, "delta_nll", "kl"]],
                                      check_dtype=False, rtol=1e-4, atol=1e-6)  # fmt: skip
        assert (rows["positions"] == 11).all()


def test_a_finished_sweep_runs_nothing_again(tmp_path, monkeypatch):
    first = sweep(tmp_path)
    before = {file: file.read_bytes() for file in parts(tmp_path)}
    monkeypatch.setattr(works.Work, "run", pytest.fail)
    done = []
    assert_same(sweep(tmp_path, resume=True, progress=done.append), first)
    assert {file: file.read_bytes() for file in parts(tmp_path)} == before
    assert sum(done) == pytest.approx(len(TOKENS))


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    expected, ran, run = sweep(tmp_path / "whole"), [], works.Work.run

    def watched(self, chunk, *args):
        ran.append(chunk.index)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run(self, chunk, *args)

    monkeypatch.setattr(works.Work, "run", watched)
    monkeypatch.setattr(stores, "WAIT", (1e9, 1e9))
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "cut")
    assert len(parts(tmp_path / "cut")) == 1  # what waited has been written
    assert_same(sweep(tmp_path / "cut", resume=True), expected)
    assert ran == [0, 1, 2, 2, 3]


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.extend({paths})
import torch
torch.set_num_threads(1)
import pyarrow.parquet, pyarrow as pa
pa.set_cpu_count(1), pa.set_io_thread_count(1)
import pyfastcircuits as fc
from pyfastcircuits.sweeps import store, work
from support.random_models import random_tokens, random_weights
work.WORK, store.WAIT = {{"cpu": 2e5}}, (0.0, 0.0)
folder, random = Path(sys.argv[1]), random.Random(3)
weights, tokens = random_weights(2, dtype=torch.float32), random_tokens(60, 12)

def sweep(out):
    found = fc.sweep(weights, tokens, out=out, resume=True)
    values = (found.result.delta, found.result.kl, found.result.standard_error, found.orders)
    return [x.numpy().tobytes().hex() for x in values]

def child(work):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid

def told(name):
    start = time.monotonic()
    pid = child(lambda: (folder / "told").write_text(json.dumps(sweep(folder / name))))
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads((folder / "told").read_text()), time.monotonic() - start

def stored():
    return len(list((folder / "killed").glob("effects/part*.parquet")))

expected, whole = told("whole")
_, start = told("whole")  # what a run takes that finds everything there
kills, grown = 0, [stored()]
for i in range(20):
    pid = child(lambda: sweep(folder / "killed"))
    until = time.monotonic() + (random.random() * start if i % 3 else whole)
    while time.monotonic() < until and (i % 3 or stored() == grown[-1]):  # every third has stored a chunk
        time.sleep(1e-3)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    grown.append(stored())
found, _ = told("killed")
print(json.dumps([found == expected, kills, sorted(set(grown)), grown == sorted(grown)]))
"""


@pytest.mark.processes
def test_killed_twenty_times_it_is_the_same_bit_for_bit(tmp_path):
    """The lock of a process that was killed is gone with it."""
    code = KILLED.format(paths=[str(ROOT), str(ROOT / "tests")])
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    same, kills, stored, only_grows = json.loads(found.stdout)
    assert same
    assert only_grows
    assert kills >= 10
    assert len(stored) > 3, stored
    rows = pq.read_table(tmp_path / "killed" / "effects").to_pandas()
    assert len(rows) == 60 * 16
    assert not rows.duplicated(["sequence", "source_head", "dest_head"]).any()
    assert not list((tmp_path / "killed").rglob("*.partial"))


OTHERS = {
    "model": (lambda: (random_weights(2, dtype=torch.float32, seed=1), TOKENS), {}, 'model_sha256 is "'),
    "tokens": (lambda: (WEIGHTS, TOKENS.flip(0)), {}, 'tokens is "'),
    "fewer tokens": (lambda: (WEIGHTS, TOKENS[:-1]), {}, 'tokens is "'),
    "scope": (lambda: (WEIGHTS, TOKENS), {"scope": "edge"}, 'scope is "path" there, but "edge" here'),
    "metric": (lambda: (WEIGHTS, TOKENS), {"metric": "rank"}, 'metric is "nll" there, but "rank" here'),
    "target": (lambda: (WEIGHTS, TOKENS), {"targets": 4}, "targets is null there, but 4 here"),
    "precision": (lambda: (WEIGHTS, TOKENS), {"low_memory": True}, "low_memory is false there, but true here"),
}


def test_what_is_of_something_else_is_not_mixed(tmp_path, monkeypatch):
    sweep(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    for made, options, says in OTHERS.values():
        with pytest.raises(ValueError, match=f"out is '.*': another sweep is there: {re.escape(says)}"):
            fc.sweep(*made(), out=tmp_path, resume=True, **options)
    monkeypatch.setattr(sweeps, "build_info", lambda: {"version": "9.9"})
    with pytest.raises(ValueError, match=r'version is "0\.1\.0" there, but "9.9" here'):
        sweep(tmp_path, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


def test_results_are_not_overwritten_unless_by_force(tmp_path):
    first = sweep(tmp_path)
    with pytest.raises(ValueError, match=r"a sweep is there already, started .*; resume=True \(--resume\) goes on"):
        sweep(tmp_path)
    assert_same(sweep(tmp_path, resume=True), first)
    again = fc.sweep(WEIGHTS, TOKENS[:3], out=tmp_path, force=True)
    assert again.sequences == 3
    assert len(pq.read_table(tmp_path / "effects")) == 3 * 16
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"its manifest.json is not readable"):
        sweep(tmp_path, resume=True)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"there are results, but no manifest.json that says what of"):
        sweep(tmp_path, resume=True)
    assert_same(sweep(tmp_path, force=True), first)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-7])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def emptied(file):
    file.write_bytes(b"")


def twice(file):
    """The same chunk once more, in a part whose own checksum is right."""
    name = file.with_name(f"part-00000099-{file.name[14:]}")
    name.write_bytes(file.read_bytes())


@pytest.mark.filterwarnings("ignore:out. 1 of its files are not what was written; their chunks run again")
@pytest.mark.parametrize("tear", [cut_off, flipped, emptied, twice])
def test_a_torn_part_is_redone(tear, tmp_path):
    first = sweep(tmp_path)
    names = [file.name for file in parts(tmp_path)]
    tear(parts(tmp_path)[1])
    (tmp_path / "effects" / ".part-1.parquet.99.partial").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="1 of its files are not what was written"):
        assert_same(sweep(tmp_path, resume=True), first)
    assert [file.name for file in parts(tmp_path)] == names


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_loses_nothing(code, tmp_path, monkeypatch):
    expected, synced, sync = sweep(tmp_path / "whole"), [], os.fsync

    def full(opened):
        synced.append(opened)
        if len(synced) > 4:  # the manifest and the first part, each with its folder
            raise OSError(code, os.strerror(code))
        sync(opened)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"part-.* cannot be written \({os.strerror(code)}\); what is stored is whole"):
        sweep(tmp_path / "full")
    assert len(parts(tmp_path / "full")) == 1
    monkeypatch.setattr(os, "fsync", sync)
    assert_same(sweep(tmp_path / "full", resume=True), expected)


def test_a_file_that_may_grow_no_further(tmp_path):
    """The kernel ends the write itself: no byte of it is left."""
    resource = pytest.importorskip("resource")
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large"):
            sweep(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not parts(tmp_path / "out")
    assert sweep(tmp_path / "out", resume=True).sequences == 7


def test_a_second_run_is_refused(tmp_path, monkeypatch):
    run, refused = works.Work.run, []

    def meanwhile(self, *args):
        if not refused:
            with pytest.raises(ValueError, match=f"another run is writing there .process {os.getpid()}.") as error:
                sweep(tmp_path, resume=True)
            refused.append(error)
        return run(self, *args)

    monkeypatch.setattr(works.Work, "run", meanwhile)
    assert sweep(tmp_path).sequences == 7
    assert refused


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_halves_a_chunk(error, tmp_path, monkeypatch):
    expected, run, shapes = sweep(tmp_path / "whole"), works.Work.run, []

    def short(self, chunk, *args):
        shapes.append(chunk.shape)
        if chunk.shape[0] * chunk.shape[1] > 8:
            raise error
        return run(self, chunk, *args)

    monkeypatch.setattr(works.Work, "run", short)
    done = []
    with pytest.warns(UserWarning, match="with 2 sequences and 16 ablations at a time: going on with 1 and 16"):
        found = sweep(tmp_path / "short", progress=done.append)
    assert shapes[:3] == [(2, 16), (1, 16), (1, 8)]
    assert shapes[3:].count((1, 8)) == len(shapes[3:])
    assert sum(done) == pytest.approx(7)
    torch.testing.assert_close(found.result.delta, expected.result.delta, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.orders, expected.orders)
    assert len(parts(tmp_path / "short")) == 4


def test_too_little_memory_for_anything_is_said(tmp_path, monkeypatch):
    def never(*args):
        raise MemoryError

    monkeypatch.setattr(works.Work, "run", never)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MemoryError, match="one experiment on one sequence of 12 tokens does not fit into memory"),
    ):
        sweep(tmp_path)

    def other(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(works.Work, "run", other)
    with pytest.raises(RuntimeError, match="something else"):
        sweep(tmp_path, resume=True)


def test_quick_chunks_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "WAIT", (5.0, 60.0))
    sweep(tmp_path)
    assert len(parts(tmp_path)) == 1


def test_the_manifest_says_what_made_it(tmp_path):
    sweep(tmp_path)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["identity"]["scope"] == "path"
    assert found["made_with"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{40}", found["made_with"]["commit"] or "0" * 40)
    assert found["cut"] == {"sequences": 2, "experiments": 16}


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="out is None, but resume is True"):
        fc.sweep(WEIGHTS, TOKENS, resume=True)
    with pytest.raises(ValueError, match="settle is 0, expected at least 1"):
        fc.sweep(WEIGHTS, TOKENS, settle=0)
    with pytest.raises(ValueError, match=r"confidence is 1.0, expected a number between 0 and 1"):
        fc.sweep(WEIGHTS, TOKENS, settle=1, confidence=1.0)
    with pytest.raises(ValueError, match="per_token is True, but in chunks a sweep gives means"):
        fc.sweep(WEIGHTS, TOKENS, settle=1, per_token=True)
    with pytest.raises(ValueError, match=r"targets has shape \[3\], but there are 7 sequences in `tokens`"):
        fc.sweep(WEIGHTS, TOKENS, settle=1, targets=torch.tensor([1, 2, 3]))


def test_the_command_says_how_to_go_on(model, tokens, tmp_path, monkeypatch):
    given = ["sweep", model, "--tokens", tokens, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["pyfastcircuits", *map(str, given), "--force"])

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    run = fc.sweep
    monkeypatch.setattr(fc, "sweep", interrupted)
    result = run_command(*given, "--force")
    assert result.exit_code == 130
    assert f"interrupted; this goes on from there: pyfastcircuits {' '.join(map(str, given))} --resume" in result.output
    monkeypatch.setattr(fc, "sweep", run)
    assert run_command(*given, "--resume").exit_code == 0
    refused = run_command(*given)
    assert refused.exit_code == 2
    assert "error: --out is" in refused.output
    assert run_command(*given, "--resume", "--json").exit_code == 0
