"""Composition and copying scores of all heads, beside TransformerLens and the machine's multiply-add rate."""

import statistics
import time

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes
from pyfastcircuits.circuits.head_factors import BLOCK

KINDS = ("Q", "K", "V")


def random_model(layers, heads, kv, d, r, vocabulary):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).mul_(0.02)

    W_Q, W_K, W_V = (normal(layers, h, d, r) for h in (heads, kv, kv))
    return fc.CircuitWeights(normal(vocabulary, d), W_Q, W_K, W_V, normal(layers, heads, r, d), normal(d, vocabulary))


def lens_model(weights):
    """The same weights as TransformerLens holds them."""
    lens = pytest.importorskip("transformer_lens")
    L, H, d, r = weights.W_Q.shape
    model = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=L, n_heads=H, d_model=d, d_head=r, d_vocab=weights.d_vocab, n_ctx=8, attn_only=True
        )
    )
    with torch.no_grad():
        model.W_E.copy_(weights.W_E)
        model.unembed.W_U.copy_(weights.W_U)
        for layer, block in enumerate(model.blocks):
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                getattr(block.attn, name).copy_(getattr(weights, name)[layer])
    return model.requires_grad_(False)  # a graph would keep every temporary: over 24 GiB


@pytest.fixture(scope="module")
def gpt2():
    return random_model(12, 12, 12, 768, 64, 50257)


def flops(weights, gram):
    """Of one kind: pairs with layer1 < layer2, and for the Gram route the Gram matrices of the heads in them."""
    L, H, d, r = weights.W_Q.shape
    pairs = L * (L - 1) // 2 * H * H
    return d * (d + 1) * (pairs + 2 * (L - 1) * H * r) if gram else pairs * 2 * d * r * r


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_composition_scores(gpt2, benchmark, found):
    rates = []
    functions = {
        "rate": lambda: rates.append(cpu_rate("fma")),
        "ours": lambda: fc.composition_scores(gpt2, KINDS),
        "one by one": lambda: [fc.composition_scores(gpt2, kind) for kind in KINDS],
    }
    times = interleaved(functions, rounds=5)
    shape = "composition scores fp32, 12x12 heads d=768 r=64, Q K V"
    limit = 3 * min(flops(gpt2, False), flops(gpt2, True))
    share = statistics.median(t * f / limit for t, f in zip(times["ours"], rates[1:], strict=True))
    ours = statistics.median(times["ours"])
    found(f"{shape}: time", f"{ours:.3f} s; FMA rate {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    found(f"{shape}: ours / FMA limit of the cheaper route", f"{share:.2f}", "<= 1.5")
    shared = 2 * 768 * 769 * (11 * 12 * 64)  # Gram matrices of the sources, made once instead of three times
    found("  ours / FMA time of the operations done, which are fewer", f"{share * limit / (limit - shared):.2f}")
    found("  time, one kind after the other", f"{statistics.median(times['one by one']):.3f} s")
    found("  memory beyond weights", f"{peak_bytes(functions['ours']) / 2**20:.0f} MiB", "<= 300")
    benchmark.pedantic(functions["ours"], rounds=1)

    model = lens_model(gpt2)
    slow = []
    peak = peak_bytes(lambda: slow.append(timed(lambda: [model.all_composition_scores(kind) for kind in KINDS])))
    found(f"{shape}: TransformerLens / ours", f"{slow[0] / ours:.1f}", ">= 40")
    found("  time and memory of TransformerLens", f"{slow[0]:.1f} s, {peak / 2**30:.1f} GiB")


def test_copying_scores(gpt2, benchmark, found):
    model = lens_model(gpt2)

    def loop():
        for layer in range(12):
            for head in range(12):
                values = (model.W_E @ model.blocks[layer].attn.OV[head] @ model.W_U).eigenvalues
                _ = values.sum().real / values.abs().sum()

    seconds = []

    def ours():
        seconds.extend(timed(lambda: fc.copying_scores(gpt2)) for _ in range(5))

    with torch.no_grad():
        times = interleaved({"before": ours, "loop": loop, "after": ours}, rounds=1)
    median = statistics.median(seconds[10:])  # less the round that is not counted
    found("copying scores, 144 heads: time", f"{median:.2f} s")
    found("copying scores, 144 heads: TransformerLens' loop / ours", f"{times['loop'][0] / median:.1f}", ">= 25")
    benchmark.pedantic(lambda: fc.copying_scores(gpt2), rounds=1)


def test_llama(found):
    """The Llama-3-8B shape, one kind, whole: minutes. Its vocabulary plays no part, and is left out."""
    weights = random_model(32, 32, 8, 4096, 128, 2)
    pairs = 32 * 31 // 2 * 32 * 32
    rates = [cpu_rate("fma")]
    done, parts, seconds = [0], [], []

    def progress(count):
        done[0] += count
        parts.append(count)
        print(f"{done[0]} of {pairs} pairs", flush=True)

    peak = peak_bytes(lambda: seconds.append(timed(lambda: fc.composition_scores(weights, "Q", progress=progress))))
    rates.append(cpu_rate("fma"))
    rate = statistics.mean(rates)
    assert done[0] == pairs
    rows = BLOCK // (4 * 4096 * 128)  # heads of a part, sources to 992 and destinations beyond the first source's layer
    made = [
        min(rows, 992 - source) + min(rows, end - first)  # each part makes its own Gram matrices
        for source in range(0, 992, rows)
        for first in [32 * (source // 32 + 1)]
        for end in range(rows, 1024 + rows, rows)
        if end > first
    ]
    assert len(made) == len(parts)
    work = 4096 * 4097 * (pairs + sum(made) * 128)
    shape = "composition scores fp32, 32x32 heads (8 kv) d=4096 r=128, Q"
    found(f"{shape}: time", f"{seconds[0]:.0f} s; FMA rate {rate / 1e9:.0f} GFLOP/s")
    found(f"{shape}: share of the FMA rate", f"{work / seconds[0] / rate:.2f}", ">= 0.6")
    found(
        "  FMA time of the full products / ours",
        f"{flops(weights, False) / rate / seconds[0]:.1f}",
    )
    found("  memory beyond weights", f"{peak / 2**30:.2f} GiB", "<= 2")
