"""Stored sweeps: what the store costs of a sweep, and how long a million finished rows take to be found again."""

import time

import pyarrow.parquet  # noqa: F401 (an import is no cost of the store)
import pytest
import torch

import pyfastcircuits as fc
from pyfastcircuits.sweeps import sweep as sweeps
from pyfastcircuits.sweeps.store import Store
from pyfastcircuits.sweeps.work import Findings, Work

PAIRS = 64  # of induction-2l


@pytest.fixture
def weights():
    return fc.load_weights("induction-2l")


def test_a_million_finished_rows(weights, tmp_path, monkeypatch, found):
    """Their effects are made up, which takes less long than to measure them."""
    sequences = -(-1_000_000 // PAIRS)
    tokens = torch.randint(1, weights.d_vocab, (sequences, 16))
    run, normal = Work.run, torch.Generator().manual_seed(0)

    def made_up(self, chunk, *args):
        count, experiments = chunk.shape
        effects = {name: torch.randn(count, experiments, generator=normal) for name in self.metrics}
        losses = torch.randn(count, 3 * weights.n_layers + 2, generator=normal, dtype=torch.float64)
        return Findings(chunk, torch.full((count,), 15), effects, losses[:, 0], losses)

    monkeypatch.setattr(Work, "run", made_up)
    first = fc.sweep(weights, tokens, out=tmp_path)
    monkeypatch.setattr(Work, "run", run)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        again = fc.sweep(weights, tokens, out=tmp_path, resume=True)
        times.append(time.perf_counter() - start)
    assert torch.equal(again.result.delta, first.result.delta)
    size = sum(file.stat().st_size for file in (tmp_path / "effects").iterdir())
    found(f"{sequences * PAIRS:,} finished rows: seconds to go on", f"{min(times):.2f} s", "<= 2")
    found("  bytes a row", f"{size / sequences / PAIRS:.1f}")


def test_the_cost_of_the_store(weights, tmp_path, monkeypatch, found):
    """Of everything that a sweep with `out` does and one without does not, in the same run."""
    tokens = torch.randint(1, weights.d_vocab, (200, 128))
    spent = []

    def timed(owner, name):
        whole = getattr(owner, name)

        def function(*args, **options):
            start = time.perf_counter()
            try:
                return whole(*args, **options)
            finally:
                spent.append(time.perf_counter() - start)

        monkeypatch.setattr(owner, name, function)

    for owner, name in ((Store, "__init__"), (Store, "add"), (Store, "__exit__"), (sweeps, "model_hash")):
        timed(owner, name)
    start = time.perf_counter()
    fc.sweep(weights, tokens, out=tmp_path)
    whole = time.perf_counter() - start
    found(
        f"induction-2l, {len(tokens)} sequences of 128 tokens: percent of it that the store takes",
        f"{100 * sum(spent) / whole:.2f}",
        "<= 2",
    )
    found("  seconds of the sweep", f"{whole:.1f} s")
