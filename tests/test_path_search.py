"""The search finds what an evaluation of all paths finds, and its bounds hold."""

import pytest
import torch
from support.deep_models import KINDS, run_of

import pyfastcircuits as fc
from pyfastcircuits.experiments.options import measurement
from pyfastcircuits.experiments.path_reach import Reach
from pyfastcircuits.experiments.second_order import second_order
from pyfastcircuits.run.paths import path_z


def all_paths(run, orders):
    weights = run.weights
    return [path for k in orders for path in fc.enumerate_paths(weights.n_layers, weights.n_heads, k)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_paths_as_all_of_them_evaluated(kind):
    run = run_of(kind)
    for order, n in ((None, 12), (2, 7), (3, 5)):
        every = all_paths(run, range(4) if order is None else [order])
        sizes = fc.path_ablation(run, every).delta.abs()
        best = sorted(range(len(every)), key=lambda i: (-float(sizes[i]), every[i]))
        found = fc.top_paths(run, n, order=order)
        assert found.certified
        assert found.gap == 0
        assert found.total == len(every)
        assert found.evaluated <= found.total
        torch.testing.assert_close(found.delta.abs(), sizes[best[:n]], rtol=1e-9, atol=1e-12)
        if kind != "silent":  # there some are the same
            assert found.labels == [every[i] for i in best[:n]]
        assert found.bound <= float(sizes[best[n - 1]]) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_bounds(kind):
    run = run_of(kind)
    every = all_paths(run, range(1, 4))
    sizes = dict(zip(every, fc.path_ablation(run, every).delta.abs().tolist(), strict=True))
    reach = Reach(run, measurement(run, {}))
    z = path_z(run, every)
    for path, bound in zip(every, reach.sizes(every, z), strict=True):
        assert sizes[path] <= bound
    for orders in (range(4), range(2, 3), range(3, 4)):
        for path, bound in zip(every, reach.sizes_beyond(every, z, orders), strict=True):
            behind = [sizes[p] for p in every if p[: len(path)] == path and len(p) > len(path) and len(p) in orders]
            assert max(behind, default=-torch.inf) <= bound, (path, orders)
            assert bool(behind) == (bound > -torch.inf)


def test_tails_whose_norms_are_multiplied_are_bounded_too(monkeypatch):
    run = run_of("plain", layers=4)
    exact = Reach(run, measurement(run, {})).tails
    monkeypatch.setattr("pyfastcircuits.experiments.path_reach.EXACT_TAILS", 0)
    rough = Reach(run, measurement(run, {})).tails
    assert all((a[0] <= b[0] * (1 + 1e-9)).all() for a, b in zip(exact, rough, strict=True))
    assert float(rough[2][0].sum()) > float(exact[2][0].sum())
    every = all_paths(run, [3])
    sizes = fc.path_ablation(run, every).delta.abs()
    assert fc.top_paths(run, 3, order=3).labels == [every[i] for i in sizes.argsort(descending=True)[:3]]


def test_fewer_are_evaluated_than_there_are_and_long_paths_are_left_alone():
    run = run_of("plain", layers=4)
    found = fc.top_paths(run, 5)
    assert found.certified
    assert found.share < 0.2
    assert found.bounded < 2 * found.total


def test_a_search_that_its_budget_stops_says_what_it_does_not_know():
    run = run_of("plain")
    whole = fc.top_paths(run, 10, order=2)
    short = fc.top_paths(run, 10, order=2, budget=4)
    assert not short.certified
    assert short.gap > 0
    assert short.evaluated == len(short.labels) == 4
    missing = [abs(x) for label, x in zip(whole.labels, whole.delta.tolist(), strict=True) if label not in short.labels]
    assert max(missing) <= short.bound
    assert fc.top_paths(run, 1000, order=2).labels[:10] == whole.labels
    assert len(fc.top_paths(run, 1000, order=2).labels) == 48


def test_positions_and_targets():
    run = run_of("plain")
    every = all_paths(run, [2])
    asked = {"targets": 3, "positions": [-1, 2]}
    sizes = fc.path_ablation(run, every, **asked).delta.abs()
    found = fc.top_paths(run, 4, order=2, **asked)
    assert found.labels == [every[i] for i in sizes.argsort(descending=True)[:4]]


def test_single_precision():
    run = run_of("plain", dtype=torch.float32)
    every = all_paths(run, range(4))
    sizes = fc.path_ablation(run, every).delta.abs()
    assert fc.top_paths(run, 20).labels == [every[i] for i in sizes.argsort(descending=True)[:20]]


def test_wrong_arguments():
    run = run_of("plain")
    for wrong, said in (
        ({"n": 0}, "n is 0"),
        ({"n": 1, "order": 4}, "order is 4"),
        ({"n": 1, "order": -1}, "order is -1"),
        ({"n": 1, "budget": 0}, "budget is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            fc.top_paths(run, **wrong)


def test_second_order_encloses_the_cumulant_function():
    """Of random distributions, some of them with a rare and large value, in fp64."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 0.1, 1, 10, 80):
        p = torch.rand(50, 31, generator=generator, dtype=torch.float64) ** 8
        p = p / p.sum(1, keepdim=True)
        c = torch.randn(50, 31, generator=generator, dtype=torch.float64) ** 3 * scale
        c = c - (p * c).sum(1, keepdim=True)
        square, up, down = (p * c**2).sum(1), c.amax(1), -c.amin(1)
        true = (p.log() + c).logsumexp(1) if scale > 0.05 else (p * (c.expm1() - c)).sum(1).log1p()
        for least, more in ((square, 1.0), (torch.zeros_like(square), 3.0)):
            low, high = second_order(least, square * more, up * more, down * more)
            assert (low <= true * (1 + 1e-9) + 1e-18).all()
            assert (true <= high * (1 + 1e-9) + 1e-18).all()
    low, high = second_order(square * 0, square * 0, up * 0, down * 0)
    assert (low == 0).all()
    assert (high == 0).all()
