"""The screen returns what the exhaustive sweep returns, and its intervals hold in every cell."""

import pytest
import torch
from support.deep_models import KINDS, run_of

import pyfastcircuits as fc
from pyfastcircuits.experiments import screen
from pyfastcircuits.experiments.options import measurement
from pyfastcircuits.experiments.second_order import Basis, Moments, parts
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.losses import Unembedding
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.paths import path_z


@pytest.mark.parametrize("pays", [(True, False), (True, True), (False, False), None])  # screen, covariance
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_top_as_the_sweep(kind, pays, monkeypatch):
    if pays is not None:
        monkeypatch.setattr(screen, "screen_pays", lambda *_: pays[0])
        monkeypatch.setattr(screen, "covariance_pays", lambda _, open_cells, __: pays[1] and open_cells > 0)
    run = run_of(kind)
    whole = fc.pair_ablation(run)
    for n in (1, 9):
        found = fc.screened_pairs(run, n)
        best = whole.top(n)
        assert found.cells == len(whole.labels) * int(measurement(run, {}).asked.count)
        errors = found.error + 1e-9 * whole.delta.abs().max()
        assert ((found.delta - torch.tensor([x for _, x in best], dtype=torch.float64)).abs() <= errors).all()
        if kind != "silent":  # there some are the same
            assert found.labels == [label for label, _ in best]
    assert (found.share == 1) == (pays == (False, False))
    torch.testing.assert_close(found.baseline, whole.baseline)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_in_every_cell(kind, dtype):
    run = run_of(kind, dtype=dtype)
    pairs = [((0, h), (2, 1)) for h in range(4)] + [((1, h), (2, 1)) for h in range(4)]
    true = fc.pair_ablation(run, pairs=pairs, per_token=True).delta.double()
    how = measurement(run, {})
    for rows in parts(run, how, Unembedding(run.weights)):
        delta = rows.deltas(path_z(run, [tuple(map(Head._make, pair)) for pair in pairs]))
        exact = true[:, how.asked.where[:, : true.shape[2]]]
        widths = []
        for squares in (False, True):
            low, high = Moments.of(rows, Basis(rows.unembedding, Head(2, 1)), squares=squares).interval(delta)
            assert (low <= exact).all()
            assert (exact <= high).all()
            widths.append(float((high - low).mean()))
        assert widths[1] <= widths[0]


def test_second_moments_are_those_of_every_position():
    run = run_of("plain")
    (rows,) = parts(run, measurement(run, {}), Unembedding(run.weights))
    basis = Basis(rows.unembedding, Head(1, 3))
    moments = Moments.of(rows, basis, squares=True)
    p, m = rows.logits.softmax(-1), basis.columns
    mean = torch.einsum("nv,rv->nr", p, m)
    second = torch.einsum("nv,rv,sv->nrs", p, m, m) - mean[:, :, None] * mean[:, None]
    torch.testing.assert_close(moments.covariance, second)
    torch.testing.assert_close(moments.mean, mean)


def test_most_cells_are_left_alone():
    run = run_of("plain", layers=4)
    found = fc.screened_pairs(run, 3)
    assert found.share < 0.5


def test_covariances_leave_fewer_cells(monkeypatch):
    run = run_of("plain", layers=4)
    shares = []
    for pays in (False, True):
        monkeypatch.setattr(screen, "covariance_pays", lambda *_, pays=pays: pays)
        shares.append(fc.screened_pairs(run, 3).share)
    assert 2 * shares[1] < shares[0]


def test_covariances_keep_what_was_exact(monkeypatch):
    run = run_of("plain", layers=4)
    whole, exact, enclosed = fc.pair_ablation(run, per_token=True), [], []
    where = measurement(run, {}).asked.where
    true = whole.delta[:, where[:, : whole.delta.shape[2]]]

    class Watched(screen._Cells):
        def narrow(self, cells):
            again = bool(exact)
            monkeypatch.setattr(screen, "covariance_pays", lambda *_: again)
            super().narrow(cells)
            exact.append(self.exact.clone())
            enclosed.append((self.low[self.exact] == self.high[self.exact]).all())
            assert (self.low <= true + 1e-9).all()
            assert (true <= self.high + 1e-9).all()

    monkeypatch.setattr(screen, "_Cells", Watched)
    assert fc.screened_pairs(run, 3).labels == [label for label, _ in fc.pair_ablation(run).top(3)]
    assert len(exact) > 2
    assert exact[0].any()
    assert exact[1].equal(exact[0])  # all destinations were bounded by covariances
    assert all(enclosed)


def test_several_parts_and_some_pairs(monkeypatch):
    run = run_of("plain")
    pairs = [((0, h), (2, k)) for h in range(4) for k in range(3)]
    whole = fc.pair_ablation(run, pairs=pairs)
    monkeypatch.setattr("pyfastcircuits.run.memory.ROWS", 6)
    done = []
    found = fc.screened_pairs(run, 4, pairs=pairs, progress=done.append)
    assert found.labels == [label for label, _ in whole.top(4)]
    assert sum(done) == pytest.approx(len(pairs))
    assert fc.screened_pairs(run, 3, pairs=[]).labels == []
    assert len(fc.screened_pairs(run, 50, pairs=pairs).labels) == 12


def test_intervals_that_overlap():
    low = torch.randint(30, (40,), generator=torch.Generator().manual_seed(1)).double()
    high = low + torch.arange(40) % 3
    pairwise = (low[:, None] <= high) & (low <= high[:, None])
    found = screen._overlapping(low, high)
    assert found.equal(pairwise.fill_diagonal_(False).any(1))
    assert not found.all()


def test_arithmetic_chooses():
    sizes = torch.zeros(1)
    few = fc.CircuitWeights(*(sizes.expand(*shape) for shape in ((7, 24), (2, 8, 24, 24), (2, 8, 24, 24), (2, 8, 24, 24), (2, 8, 24, 24), (24, 7))))  # fmt: skip
    assert not screen.screen_pays(few, 1, 500)
    assert screen.screen_pays(few, 16, 500)
    assert not screen.screen_pays(few, 16, 1)  # the metric would be made for a single position
    assert not screen.covariance_pays(few, 12 * 500, 500)
    assert screen.covariance_pays(few, 14 * 500, 500)


def test_wrong_arguments():
    run = run_of("plain")
    with pytest.raises(ValueError, match="n is 0"):
        fc.screened_pairs(run, 0)
    with pytest.raises(ValueError, match="layers must increase"):
        fc.screened_pairs(run, 1, pairs=[((1, 0), (1, 1))])
    capped = CircuitWeights(*(getattr(run.weights, f"W_{x}") for x in "EQKVOU"), logit_cap=5.0)
    for call in (fc.screened_pairs, fc.top_paths):
        with pytest.raises(ValueError, match="trace is of a model whose logits are capped at 5"):
            call(fc.trace(capped, run.tokens), 1)
