"""`frozen_attention` on the CPU, beside torch's attention of the same total value width and the machine's limit."""

import statistics

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.timing import cpu_rate, interleaved, peak_bytes, ratio
from pyfastcircuits import ops

B, H, R = 1, 12, 64  # a layer of GPT-2 small


def inputs(T, streams):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, B, H, T, R, generator=g)
    values = torch.randn(streams, B, H, T, R, generator=g)
    return q, k, values


@pytest.mark.parametrize("streams", [3, 7])
def test_frozen_attention(benchmark, found, streams):
    T = 2048
    q, k, values = inputs(T, streams)
    lse = ops.attention_lse(q, k)
    wide = values.permute(1, 2, 3, 0, 4).flatten(3)
    padded = [pad(x, (0, wide.shape[-1] - R)) for x in (q, k)]  # its fast kernel wants q, k and v of one width
    rates = []
    functions = {
        "rates": lambda: rates.append((cpu_rate("fma"), cpu_rate("exp"))),
        "ours": lambda: ops.frozen_attention(q, k, values, lse),
        "without lse": lambda: ops.frozen_attention(q, k, values),
        "one call": lambda: scaled_dot_product_attention(q, k, wide, is_causal=True),
        "one padded call": lambda: scaled_dot_product_attention(*padded, wide, is_causal=True, scale=R**-0.5),
        "a call a stream": lambda: [scaled_dot_product_attention(q, k, v, is_causal=True) for v in values],
    }
    if cpu_rate("bf16") > 0:
        rounded = ops.attention_lse(q, k, precision="bf16")
        functions["bf16"] = lambda: ops.frozen_attention(q, k, values, rounded, precision="bf16")
    times = interleaved(functions, rounds=5)
    entries = B * H * T * (T + 1) / 2
    flops = 2 * entries * R * (1 + streams)
    seconds = statistics.median(times["ours"])
    limit = statistics.median(
        t / (flops / fma + entries / exp) for t, (fma, exp) in zip(times["ours"], rates[1:], strict=True)
    )
    shape = f"frozen_attention fp32, B={B} H={H} T={T} r={R}, {streams} streams"
    found(f"{shape}: time", f"{seconds * 1e3:.0f} ms, {flops / seconds / 1e9:.0f} GFLOP/s")
    found(f"{shape}: ours / (FMA time + exp time)", f"{limit:.2f}")
    for name in ("one call", "one padded call", "a call a stream"):
        found(f"{shape}: ours / torch, {name}", f"{ratio(times, 'ours', name):.2f}", "<= 1.4")
    found(f"{shape}: without a logsumexp / with one", f"{ratio(times, 'without lse', 'ours'):.2f}")
    if "bf16" in functions:
        found(f"{shape}: ours fp32 / ours bf16", f"{ratio(times, 'ours', 'bf16'):.2f}")
    exact = ops.frozen_attention(*(x[..., :256, :].double() for x in (q, k, values)))
    ours = functions["ours"]()[..., :256, :]
    theirs = torch.stack(functions["a call a stream"]())[..., :256, :]
    errors = ((x.double() - exact).abs().max() for x in (ours, theirs))
    found("  error against fp64, first 256 positions", "ours {:.1e}, torch {:.1e}".format(*errors))
    benchmark.pedantic(functions["ours"], rounds=3)


def test_memory_of_a_long_context(found):
    T, streams = 8192, 3
    q, k, values = inputs(T, streams)
    held = sum(x.nbytes for x in (q, k, values))
    peak = peak_bytes(lambda: ops.frozen_attention(q, k, values))
    found(
        f"frozen_attention, T={T}, {streams} streams: memory",
        f"{peak / 2**20:.0f} MiB and {held / 2**20:.0f} of inputs; one layer's patterns {H * T * T * 4 / 2**20:.0f}",
        "< 1 GB",
    )
