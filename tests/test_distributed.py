"""Processes of a group share sweeps and composition scores, and all find what one process finds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.command import run

import pyfastcircuits as fc
from pyfastcircuits.processes import Processes, dealt
from pyfastcircuits.sweeps.work import Cut

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of 1, of 2 and of 4 processes has found."""
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, str(ROOT / "tests/support/shared_work.py"), str(folder), "1", "2", "4"]
    out = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert out.returncode == 0, out.stderr
    return {
        size: [json.loads((folder / str(size) / f"{rank}.json").read_text()) for rank in range(size)]
        for size in (1, 2, 4)
    }


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_shared_sweeps_are_those_of_one_process(found, size):
    for of_rank in found[size]:
        apart = {name: x for name, x in of_rank.items() if " by " in name or name == "composition"}
        assert len(apart) == 33
        assert max(apart.values()) < 1e-12, apart


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_return_the_same(found, size):
    first, *others = found[size]
    assert first["settled alike"]
    assert first["composition alike"]
    assert first["size"] == size
    for other in others:
        assert other == first


@pytest.mark.processes
def test_one_process_may_hold_all_columns(found):
    (alone,) = found[1]
    assert len(alone) == 13
    assert max(alone.values()) < 1e-12, alone


@pytest.mark.processes
def test_everything_public_takes_a_sharded_unembedding_or_refuses_it(found):
    """By the one sentence; what it gives is what whole weights give, in fp32."""
    for of_rank in found[2]:
        called = {name: x for name, x in of_rank.items() if name.startswith("called ")}
        refused = {name for name, x in called.items() if isinstance(x, str) and "takes weights that are whole" in x}
        assert {"called sweep", "called pair_ablation", "called FrozenTrace.loss"} <= called.keys() - refused
        assert {"called head_scores", "called FrozenTrace.logits", "called CircuitWeights.save"} <= refused
        others = {name: x for name, x in called.items() if name not in refused}
        assert all(isinstance(x, float) and x < 1e-5 for x in others.values()), others


@pytest.mark.processes
def test_the_command_keeps_its_own_columns(found):
    """While the sweep runs, no tensor but W_E is as large as W_U, and one is as large as its columns."""
    for of_rank in found[2]:
        assert of_rank["held"] == [0.5, 1.0]
        assert of_rank["command"] < 1e-6


@pytest.mark.processes
def test_a_column_that_is_not_finite_is_refused_by_all(found):
    for size in (2, 4):
        for of_rank in found[size]:
            assert of_rank["not finite"] == "W_U[3, 96] is nan: weights must be finite"


@pytest.mark.processes
def test_a_sharded_unembedding_is_refused_with_a_reason(found):
    for of_rank in found[2]:
        assert of_rank["split is"].startswith("split is 'sequences', but W_U of model is sharded, of which each")
        assert of_rank["placed"].startswith("W_U is a sharded tensor of torch.float64 and shape [20, 97], placed ")
        assert "expected Shard(1) on one of 1" in of_rank["placed"]
        assert of_rank["moved"].startswith("target is 'cuda', but W_U is sharded: weights move before")
        assert of_rank["learns"] == "weights require gradients, but W_U is sharded: ask under torch.no_grad()"
        assert of_rank["left"].startswith("left is a sharded tensor of torch.float64 and shape [1, 20, 97], expected a")
        assert of_rank["tied stays whole"]
        assert of_rank["W_E"].startswith(
            "W_E is a sharded tensor of torch.float64 and shape [97, 20], expected a whole"
        )


@pytest.mark.processes
def test_the_error_of_the_first_is_that_of_all(found):
    for of_rank in found[2]:
        assert "a sweep is there already" in of_rank["refused"]


@pytest.mark.processes
def test_torchrun_starts_a_killed_worker_again_and_the_sweep_goes_on(tmp_path):
    """The same command; the first process alone prints, and the table is that of one process."""
    sweep = ["sweep", "--sequences", "24", "--length", "64", "--top", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--standalone", "--monitor-interval", "0.1"]
    command = [*torchrun, "-m", "pyfastcircuits", *sweep, "--out", str(tmp_path / "two")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as agent:
        try:
            killed = _kill_worker(agent, tmp_path / "two" / "manifest.json")
            out, errors = agent.communicate(timeout=120)
        finally:
            agent.terminate()
    assert killed
    assert agent.returncode == 0, errors
    assert out.count("written: ") == 1
    assert run(*sweep, "--out", tmp_path / "one", "--quiet").exit_code == 0
    import pyarrow.parquet as pq

    one, two = (pq.read_table(tmp_path / folder / "sweep.parquet").to_pydict() for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def _kill_worker(agent: subprocess.Popen, begun: Path) -> bool:
    """Kill the second worker as soon as the sweep has begun."""
    until = time.monotonic() + 60
    while time.monotonic() < until and agent.poll() is None:
        if begun.exists():
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            for child in children:
                if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
                    return True
        time.sleep(0.05)
    return False


def test_columns_are_shared_without_gap():
    for size, count in ((3, 100), (4, 4), (4, 7), (7, 50257), (64, 50257)):
        parts = [Processes(rank, size).columns(count) for rank in range(size)]
        assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, count)
        assert [p.stop - p.start for p in parts] == [len(part) for part in torch.arange(count).chunk(size)]
    for count in (3, 5):  # of 5 the first three would have all but one, and the last none
        with pytest.raises(ValueError, match=f"the vocabulary has {count} tokens, too few for 4 processes"):
            Processes(0, 4).columns(count)


def test_processes_keep_their_sequences():
    """With several chunks to a sequence, chunks are the same ones, those of an experiment in order, dealt by sequences."""
    cut = Cut(2, 10)
    alone, shared = list(cut.chunks(9, 35)), list(cut.chunks(9, 35, 3))
    assert sorted(shared, key=lambda chunk: chunk.index) == alone
    assert [chunk.index for chunk in alone] == list(range(20))
    for first in range(0, 40, 10):
        starts = [chunk.sequences.start for chunk in shared if chunk.experiments.start == first]
        assert starts == [0, 2, 4, 6, 8]
    assert [chunk.sequences.start for chunk in shared[:12:3]] == [0] * 4


def test_layers_are_dealt_out_evenly():
    sizes = [layer * 12 for layer in range(12)]
    hands = dealt(sizes, 4)
    assert sorted(layer for hand in hands for layer in hand) == list(range(12))
    held = [sum(sizes[i] for i in hand) for hand in hands]
    assert max(held) <= 1.1 * sum(sizes) / 4


def test_a_split_needs_several_processes():
    weights = fc.load_weights("induction-2l")
    with pytest.raises(ValueError, match="split is 'vocabulary', but there is one process"):
        fc.sweep(weights, torch.zeros(1, 4, dtype=torch.long), "head", split="vocabulary")
