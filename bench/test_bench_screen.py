"""The certified screen: cells that it evaluates exactly, and its time beside an exhaustive sweep of the same pairs."""

import time

import pytest
import torch

import pyfastcircuits as fc
from bench.test_bench_paths import held_out_run, repeated_run

N = 20


@pytest.mark.parametrize("run", [held_out_run, repeated_run])
def test_cells_of_the_trained_model(run, found):
    trace = run()
    whole, screened = fc.pair_ablation(trace), fc.screened_pairs(trace, N)
    same = screened.labels == [label for label, _ in whole.top(N)]
    shape = f"deep-4l, {len(whole.labels)} pairs, {run.__doc__}"
    found(f"{shape}: cells (pair, position) / cells evaluated exactly", f"{1 / screened.share:.1f}", ">= 4")
    found(f"  the same top {N}, in order", str(same), "True")


LAYERS, HEADS, KV, D, R, V, T = 32, 32, 8, 4096, 128, 32_000, 128
DESTINATIONS = [(layer, head) for layer in (4, 12, 20, 28) for head in range(4)]  # that share a key/value head in each


def llama_run():
    """A run of Llama-3-8B's attention without its MLPs. All layers share one layer's random weights: 1.2 GB in all."""
    g = torch.Generator().manual_seed(0)

    def layer(*shape):
        return (torch.randn(shape, generator=g) * shape[-2] ** -0.5).expand(LAYERS, *shape)

    weights = fc.CircuitWeights(
        torch.randn(V, D, generator=g), layer(HEADS, D, R), layer(KV, D, R), layer(KV, D, R), layer(HEADS, R, D),
        torch.randn(D, V, generator=g) * D**-0.5, positional="rotary", rotary_dim=R, norm="rmsnorm",
    )  # fmt: skip
    return fc.trace(weights, torch.randint(V, (1, T), generator=g))


def test_llama_shape(found):
    trace = llama_run()
    pairs = [((layer, head), to) for to in DESTINATIONS for layer in range(to[0]) for head in range(HEADS)]
    clocks = []
    for sweep in (fc.screened_pairs, lambda run, n, pairs: fc.pair_ablation(run, pairs=pairs)):
        start = time.process_time()
        result = sweep(trace, N, pairs=pairs)
        clocks.append((time.process_time() - start, result))
    (ours, screened), (theirs, whole) = clocks
    same = screened.labels == [label for label, _ in whole.top(N)]
    shape = (
        f"{LAYERS} layers of {HEADS} heads, r={R}, T={T}, V={V}, {len(pairs)} pairs of {len(DESTINATIONS)} destinations"
    )
    found(f"{shape}, random weights: CPU time, exhaustive / screened", f"{theirs / ours:.1f}", ">= 4")
    found(f"  the same top {N}, in order", str(same), "True")
    found("  share of cells evaluated exactly", f"{screened.share:.4f}")
    found("  time, screened", f"{ours:.1f} s of CPU time")
