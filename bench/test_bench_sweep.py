"""The article's two-layer shape: all pairs of heads beside hooks, peak memory, and the losses of all orders in one pass."""

import statistics
from dataclasses import replace

import pytest
import torch

import pyfastcircuits as fc
from bench.test_bench_sweep_nll import DEGREE
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio
from pyfastcircuits.run.paths import order_streams

LAYERS, HEADS, D, R, V, T = 2, 12, 768, 64, 50257, 512


def make_weights(layers=LAYERS):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * shape[-2] ** -0.5

    inner = (layers, HEADS, D, R)
    W_E, W_pos = normal(V, D) * V**0.5, normal(T, D) * T**0.5
    W_O = normal(layers, HEADS, R, D)
    return fc.CircuitWeights(
        W_E, normal(*inner), normal(*inner), normal(*inner), W_O, normal(D, V), W_pos, positional="shortformer"
    )


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(1))


def hooked_transformer(weights):
    """The same model in TransformerLens."""
    lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=D, n_ctx=T, d_head=R, n_heads=HEADS, d_vocab=V, attn_only=True, normalization_type=None,
        positional_embedding_type="shortformer", device="cpu", default_prepend_bos=False,
    )  # fmt: skip
    model = lens.HookedTransformer(config)
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state |= {"embed.W_E": weights.W_E, "pos_embed.W_pos": weights.W_pos, "unembed.W_U": weights.W_U}
    for layer in range(LAYERS):
        state |= {f"blocks.{layer}.attn.{n}": getattr(weights, n)[layer] for n in ("W_Q", "W_K", "W_V", "W_O")}
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False)


def test_all_pairs_against_hooks(weights, tokens, benchmark, found):
    model = hooked_transformer(weights)
    _, cache = model.run_with_cache(tokens)
    patterns = [cache["pattern", layer] for layer in range(LAYERS)]

    def hooked_pair(source, destination):
        """The path source -> destination out of the destination's values, patterns frozen: a forward pass."""
        written = cache["z", 0][:, :, source] @ model.W_O[0, source] @ model.W_V[1, destination]

        def without(v, hook):
            v[:, :, destination] -= written
            return v

        hooks = [(f"blocks.{i}.attn.hook_pattern", lambda _, hook, i=i: patterns[i]) for i in range(LAYERS)]
        return model.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.1.attn.hook_v", without)], return_type="loss")

    sample = [(0, 0), (3, 7), (11, 11)]
    run = fc.trace(weights, tokens)
    times = interleaved(
        {
            "hooks": lambda: [hooked_pair(*pair) for pair in sample],
            "ours": lambda: fc.pair_ablation(run),
            "ours, low memory": lambda: fc.pair_ablation(run, low_memory=True),
        },
        rounds=5,
    )
    result = fc.pair_ablation(run)
    worst = max(abs(float(hooked_pair(a, b) - result.loss[a * HEADS + b])) for a, b in sample)
    pairs, shape = len(result.loss), f"all {LAYERS}x{HEADS} pairs, d={D} V={V} T={T}, fp32"
    each = statistics.median(times["hooks"]) / len(sample)
    found(
        f"{shape}: one hooked forward pass / ours, a pair",
        f"{ratio(times, 'hooks', 'ours') * pairs / len(sample):.1f}",
        {"avx512": ">= 60", "avx512_bf16": ">= 60", "avx2": ">= 25"},
    )
    least = 2 * pairs * (T - 1) * V * (R + DEGREE + 2) / cpu_rate("fma")
    found(f"  the same if ours took nothing but its R + {DEGREE + 2} multiply-adds a logit, at their full rate", f"{each * pairs / least:.1f}")  # fmt: skip
    found(
        "  time, hooks",
        f"{each * 1e3:.0f} ms a pair ({len(sample)} pairs); largest difference of a loss {worst:.1e} nats",
    )
    found("  time, ours", f"{statistics.median(times['ours']):.2f} s for {pairs} pairs")
    found("  low_memory=True / False", f"{ratio(times, 'ours, low memory', 'ours'):.2f}")
    benchmark.pedantic(lambda: fc.pair_ablation(run), rounds=1)


def test_memory_of_a_sweep(weights, tokens, found):
    run = fc.trace(weights, tokens)
    held = (T - 1) * V * 4
    fc.pair_ablation(run)
    for name, low_memory, more in (("", False, held), (", low_memory", True, 0)):
        peak = peak_bytes(lambda low_memory=low_memory: fc.pair_ablation(run, kl=True, low_memory=low_memory))
        what = "beyond weights and clean logits" if more else "beyond weights, no clean logits held"
        found(f"all pairs{name}: peak memory {what}", f"{(peak - more) / 2**20:.0f} MiB", "<= 128")
    long = fc.trace(make_weights(4), tokens)
    peak = peak_bytes(lambda: fc.pair_ablation(long))
    found(
        "864 pairs of 4 layers: peak memory beyond weights and clean logits",
        f"{(peak - held) / 2**20:.0f} MiB",
        "<= 128",
    )


def test_short_prompts(weights, found):
    """64 prompts of 16 tokens beside one of 1,024: the time of all pairs for each position that is measured."""
    long = replace(weights, W_pos=weights.W_pos.repeat(2, 1))
    runs = {}
    for prompts, length in ((64, 16), (1, 1024)):
        some = torch.randint(0, V, (prompts, length), generator=torch.Generator().manual_seed(2))
        runs[prompts] = fc.trace(long, some)
    times = interleaved({str(n): lambda run=run: fc.pair_ablation(run) for n, run in runs.items()}, rounds=3)
    positions = {n: run.tokens[:, 1:].numel() for n, run in runs.items()}
    each = ratio(times, "64", "1") * positions[1] / positions[64]
    found(f"all {LAYERS}x{HEADS} pairs, d={D} V={V}: 64 prompts of 16 tokens / one of 1,024, a position", f"{each:.2f}", "<= 1.2")  # fmt: skip


@pytest.mark.parametrize("layers", [2, 6])
def test_graded_pass(layers, tokens, found):
    run = fc.trace(make_weights(layers), tokens)

    def plain():
        stream = run.embedded
        for layer in range(layers):
            stream = stream + run.attend(stream, layer)
        return stream

    times = interleaved(
        {"graded": lambda: order_streams(run, layers), "plain": lambda: [plain() for _ in range(layers + 1)]}, rounds=9
    )
    found(f"losses of orders, {layers} layers: one pass of {layers + 1} orders / {layers + 1} plain frozen passes",
          f"{ratio(times, 'graded', 'plain'):.2f}", "<= 1.3")  # fmt: skip
