"""Sampled sums are unbiased, their probabilities are those of the draws, and intervals cover as they say."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.deep_models import run_of

import pyfastcircuits as fc
from pyfastcircuits.experiments.path_sampling import _Chain, _norms


@pytest.fixture(scope="module")
def run():
    return run_of("plain")


def exact(run, order, of):
    every = fc.enumerate_paths(3, 4, order)
    if of == "logit":
        return fc.direct_logit_attribution(run, "path", paths=every).means()
    return fc.path_ablation(run, every).means()


@pytest.mark.parametrize(("order", "of"), [(1, "rise"), (2, "size"), (3, "logit")])
def test_unbiased_and_covered(run, order, of):
    values = exact(run, order, of)
    true = float((values.abs() if of == "size" else values).sum())
    samples = [fc.sample_paths(run, 24, order=order, of=of, seed=seed) for seed in range(40)]
    estimates = torch.tensor([sample.estimate for sample in samples], dtype=torch.float64)
    assert abs(estimates.mean() - true) < 4 * estimates.std() / len(samples) ** 0.5
    said = sum(sample.variance for sample in samples) / len(samples)
    assert 0.5 < said / float(estimates.var()) < 2
    assert sum(low <= true <= high for low, high in (sample.interval() for sample in samples)) >= 32


def test_values_are_those_of_the_paths(run):
    sample = fc.sample_paths(run, 30, order=2, seed=3)
    torch.testing.assert_close(sample.values, fc.path_ablation(run, sample.paths).means())
    assert sample.total == 48
    count = (1 / sample.probabilities).mean()  # of any f: here 1 for each path
    assert 0.5 < float(count) / 48 < 2


def test_probabilities_sum_to_one_and_are_those_of_the_draws(run):
    every = fc.enumerate_paths(3, 4, 2)
    chain = _Chain(*_norms(run), 2)
    chances = [chain.probability(path) for path in every]
    assert sum(chances) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(chain.draw(generator) for _ in range(4000))
    for path, chance in zip(every, chances, strict=True):
        assert abs(drawn[path] - 4000 * chance) < 5 * (4000 * chance) ** 0.5 + 2
    assert max(chances) > 2 / 48  # and not uniform


def test_importance_lowers_the_variance_where_few_paths_matter():
    weights = run_of("plain").weights
    few = weights.W_O.clone()
    few[:, 1:] *= 0.01
    run = fc.trace(replace(weights, W_O=few), run_of("plain").tokens)
    sizes = fc.path_ablation(run, fc.enumerate_paths(3, 4, 2)).means().abs()
    uniform = len(sizes) ** 2 * float(sizes.var()) / 40
    variances = [fc.sample_paths(run, 40, order=2, of="size", seed=seed).variance for seed in range(5)]
    assert sum(variances) / 5 < uniform / 4


def test_the_same_seed_draws_the_same(run):
    a, b, c = (fc.sample_paths(run, 12, order=3, seed=seed) for seed in (1, 1, 2))
    assert a.paths == b.paths != c.paths
    assert a.estimate == b.estimate
    assert math.isnan(fc.sample_paths(run, 1, order=1).variance)


def test_silent_heads_and_masks():
    for kind in ("silent", "masked"):
        sample = fc.sample_paths(run_of(kind), 20, order=3)
        assert all(0 < p <= 1 for p in sample.probabilities.tolist())
        assert torch.isfinite(sample.values).all()


def test_wrong_arguments(run):
    for wrong, said in (({"n": 0, "order": 1}, "n is 0"), ({"n": 1, "order": 0}, "order is 0"), ({"n": 1, "order": 4}, "order is 4")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fc.sample_paths(run, **wrong)
    with pytest.raises(ValueError, match=r"confidence is 1\.0"):
        fc.sample_paths(run, 2, order=1).interval(1.0)
