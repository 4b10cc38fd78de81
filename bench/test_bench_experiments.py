"""Ablations and patching at GPT-2 small's shape with random weights, each beside one hooked TransformerLens forward pass."""

import statistics

import pytest
import torch

import pyfastcircuits as fc
from bench.test_bench_models import HEADS, LAYERS, D, R, T, V, lens, tokens  # noqa: F401 (fixtures)
from bench.timing import cpu_rate, interleaved, ratio

SAMPLE = [(0, 3), (5, 7), (11, 2)]  # heads that hooks ablate
HEADS_OUT = [(layer, (layer + 3 * i) % 12) for layer in range(LAYERS) for i in range(4)]  # a third, of every layer
WHERE = f"GPT-2 small shape, T={T}"


def hooked(model, tokens, head, frozen=False):  # noqa: F811
    """Loss with one head's output at zero: everything behind it computed anew, or patterns, norms and MLPs held."""
    layer, h = head

    def without(z, hook):
        z[:, :, h] = 0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", without)]
    if frozen:
        kinds = ("attn.hook_pattern", "ln1.hook_scale", "hook_mlp_out")
        names = [f"blocks.{i}.{kind}" for i in range(LAYERS) for kind in kinds]
        hooks += [(name, lambda _, hook: frozen[hook.name]) for name in (*names, "ln_final.hook_scale")]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")


def report(found, name, times, slow, fast, count, goal):
    found(f"{WHERE}, {name}: one hooked forward pass / ours, each",
          f"{ratio(times, slow, fast) * count / len(SAMPLE):.1f}", goal)  # fmt: skip
    found("  time of each", f"hooks {statistics.median(times[slow]) / len(SAMPLE) * 1e3:.0f} ms, "
          f"ours {statistics.median(times[fast]) / count * 1e3:.1f} ms")  # fmt: skip


def test_frozen_heads(lens, tokens, found):  # noqa: F811
    run = fc.trace(lens, tokens)
    _, cache = lens.run_with_cache(tokens)
    ways = {
        "hooks": lambda: [hooked(lens, tokens, head, cache) for head in SAMPLE],
        "fp32": lambda: fc.head_ablation(run, heads=HEADS_OUT),
        "bf16": lambda: fc.head_ablation(run, heads=HEADS_OUT, precision="bf16"),
        "direct": lambda: fc.head_ablation(run, heads=HEADS_OUT, effect="direct"),
    }
    rounded = fc.build_info()["cpu_tier"].endswith("_bf16")
    if not rounded:
        del ways["bf16"]
    times = interleaved(ways, rounds=3)
    losses = fc.head_ablation(run, heads=SAMPLE).values
    worst = max(
        abs(float(hooked(lens, tokens, head, cache)) - float(x)) for head, x in zip(SAMPLE, losses, strict=True)
    )
    limit = (T - 1) * V * (2 * D / cpu_rate("fma") + 1 / cpu_rate("exp"))
    report(found, "heads ablated, attention frozen, fp32", times, "hooks", "fp32", len(HEADS_OUT), ">= 4")
    found("  limit of the unembedding alone / ours", f"{limit * len(HEADS_OUT) / statistics.median(times['fp32']):.2f}")
    found("  largest difference of a loss", f"{worst:.1e} nats")
    if rounded:
        exact, coarse = (fc.head_ablation(run, heads=SAMPLE, precision=x).delta for x in ("ieee", "bf16"))
        report(found, "heads ablated, attention frozen, bf16 products", times, "hooks", "bf16", len(HEADS_OUT), ">= 7")
        error = float((coarse - exact).abs().max())
        found("  largest error of bf16", f"{error:.1e} nats, of effects up to {float(exact.abs().max()):.1e}")
    report(found, "heads ablated, direct effects, fp32", times, "hooks", "direct", len(HEADS_OUT), ">= 30")


def test_recomputed_heads(lens, tokens, found):  # noqa: F811
    run = fc.trace(lens, tokens)
    times = interleaved(
        {
            "hooks": lambda: [hooked(lens, tokens, head) for head in SAMPLE],
            "ours": lambda: fc.head_ablation(run, attention="recomputed", heads=HEADS_OUT),
        },
        rounds=2,
    )
    losses = fc.head_ablation(run, attention="recomputed", heads=SAMPLE).values
    worst = max(abs(float(hooked(lens, tokens, head) - x)) for head, x in zip(SAMPLE, losses, strict=True))
    report(found, "heads ablated, attention recomputed", times, "hooks", "ours", len(HEADS_OUT), ">= 3")
    found("  largest difference of a loss", f"{worst:.1e} nats")


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_path_patching(lens, tokens, found, kind):  # noqa: F811
    """Of every 48th pair, which has all layers and heads alike; the hooked forward is that of one head."""
    other = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(2))
    runs = fc.trace(lens, tokens), fc.trace(lens, other)
    pairs = fc.enumerate_paths(LAYERS, HEADS, 2)[5::48]
    times = interleaved(
        {
            "hooks": lambda: [hooked(lens, tokens, head) for head in SAMPLE],
            "ours": lambda: fc.path_patching(*runs, kind, "direct", direction="noise", pairs=pairs),
        },
        rounds=2,
    )
    report(found, f"path patching into {kind}, direct effects", times, "hooks", "ours", len(pairs), ">= 10")


def test_joint_pairs_of_a_layer(lens, tokens, found):  # noqa: F811
    """The cost of pairs beyond the heads they are made of, in the time that their exponentials take."""
    run = fc.trace(lens, tokens)
    heads = [(LAYERS - 1, h) for h in range(HEADS)]
    pairs = [(a, b) for i, a in enumerate(heads) for b in heads[i + 1 :]]
    times = interleaved(
        {
            "pairs": lambda: fc.pair_ablation(run, "joint", pairs=pairs),
            "heads": lambda: fc.head_ablation(run, heads=heads),
        },
        rounds=5,
    )
    exps = len(pairs) * (T - 1) * V / cpu_rate("exp")
    beyond = statistics.median(a - b for a, b in zip(times["pairs"], times["heads"], strict=True))
    found(
        f"{WHERE}, 66 joint pairs of a layer: (pairs - heads) / exponential time of the pairs",
        f"{beyond / exps:.2f}",
        "<= 2",
    )
    found("  time", f"heads {statistics.median(times['heads']) * 1e3:.0f} ms, "
          f"pairs {statistics.median(times['pairs']) * 1e3:.0f} ms; rank {D} each, not {R}")  # fmt: skip
