"""Path search: the share of paths that branch and bound evaluates, its time beside evaluating all, and how both grow."""

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import interleaved, ratio
from pyfastcircuits.adapters.texts import TokenText, held_out_text, sequences_of

MODEL, N = "deep-4l", 50


def held_out_run():
    """4 x 128 tokens of held-out text"""
    return fc.trace(fc.load_weights(MODEL), sequences_of(TokenText(MODEL), held_out_text(), 128, 4))


def repeated_run():
    """4 x [START] S S, S of 50 random tokens"""
    weights = fc.load_weights(MODEL)
    unit = torch.randint(1, weights.d_vocab, (4, 50), generator=torch.Generator().manual_seed(0))
    return fc.trace(weights, torch.cat((torch.zeros(4, 1, dtype=torch.long), unit, unit), 1))


def largest(trace, orders):
    """All paths of these orders, the largest first, as path_ablation has them."""
    weights = trace.weights
    paths = [p for k in orders for p in fc.enumerate_paths(weights.n_layers, weights.n_heads, k)]
    sizes = fc.path_ablation(trace, paths).delta.abs()
    return [paths[i] for i in sizes.sort(descending=True, stable=True).indices.tolist()]


@pytest.mark.parametrize("run", [held_out_run, repeated_run])
def test_search_in_the_trained_model(run, found):
    trace = run()
    for order, goal in ((3, "<= 0.333"), (None, "")):
        result = fc.top_paths(trace, N, order=order)
        shape = f"{MODEL}, top {N} of {result.total} paths of {'all orders' if order is None else f'order {order}'}"
        found(f"{shape}, {run.__doc__}: share evaluated", f"{result.share:.3f}", goal)
        found("  certified", str(result.certified), "True")
        found("  prefixes and paths bounded one by one", str(result.bounded))
    same = fc.top_paths(trace, N, order=3).labels == largest(trace, [3])[:N]
    found(f"{MODEL}, {run.__doc__}: the same {N} as of all paths of order 3 evaluated", str(same), "True")


def test_time_in_the_trained_model(found):
    trace = held_out_run()
    times = interleaved(
        {"search": lambda: fc.top_paths(trace, N, order=3), "all": lambda: largest(trace, [3])}, rounds=3
    )
    found(f"{MODEL}, order 3: time, all paths evaluated / search", f"{ratio(times, 'all', 'search'):.2f}")


def random_run(layers, seed=0):
    """Random weights: 8 heads of 8, d = 64, V = 1,009, 2 x 24 tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * shape[-2] ** -0.5

    inner = (layers, 8, 64, 8)
    weights = fc.CircuitWeights(
        normal(1009, 64) * 1009**0.5, normal(*inner), normal(*inner), normal(*inner), normal(layers, 8, 8, 64),
        normal(64, 1009), norm="rmsnorm", positional="rotary", rotary_dim=8,
    )  # fmt: skip
    return fc.trace(weights, torch.randint(1009, (2, 24), generator=g))


@pytest.mark.parametrize("layers", [4, 6, 8])
def test_how_the_share_grows_with_depth(layers, found):
    trace = random_run(layers)
    for order in (2, 3):
        result = fc.top_paths(trace, N, order=order)
        shape = f"random weights, {layers} layers of 8 heads, top {N} of {result.total:,} paths of order {order}"
        found(f"{shape}: share evaluated", f"{result.share:.4f}")
        found("  share bounded one by one", f"{result.bounded / result.total:.2f}")
        found("  certified", str(result.certified), "True")
    result = fc.top_paths(trace, N, budget=200)
    found(
        f"random weights, {layers} layers of 8 heads, {result.total:,} paths of all orders, budget of 200: certified",
        str(result.certified),
    )
    found("  gap / size of the last path found", f"{result.gap / abs(float(result.delta[-1])):.3f}")


@pytest.mark.parametrize("order", [2, 3])
def test_importance_of_sampled_paths(order, found):
    trace = held_out_run()
    paths = fc.enumerate_paths(4, 8, order)
    sizes = fc.path_ablation(trace, paths).means().abs()
    draws = 200
    uniform = len(sizes) ** 2 * float(sizes.var()) / draws
    samples = [fc.sample_paths(trace, draws, order=order, of="size", seed=seed) for seed in range(5)]
    mean = sum(sample.variance for sample in samples) / len(samples)
    inside = sum(low <= float(sizes.sum()) <= high for low, high in (sample.interval() for sample in samples))
    found(
        f"{MODEL}, {draws} of {len(paths)} paths of order {order}: variance of uniform draws / by importance",
        f"{uniform / mean:.1f}",
    )
    found("  95% intervals that hold the exact sum", f"{inside} of {len(samples)}")
