"""`diagonal_ranks` on the CPU: copying ranks of a full circuit, beside torch in chunks and the multiply-add rate."""

import statistics
import time

import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes
from pyfastcircuits.ops import diagonal_ranks

V, R, CHUNK = 50257, 64, 4096


def torch_ranks(A, B):
    out = []
    for first in range(0, len(A), CHUNK):
        product = A[first : first + CHUNK] @ B
        out.append((product > product.diagonal(first)[:, None]).sum(1))
    return torch.cat(out)


def test_diagonal_ranks(benchmark, found):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(V, R, generator=g), torch.randn(R, V, generator=g)
    rates = []
    functions = {"rate": lambda: rates.append(cpu_rate("fma")), "ours": lambda: diagonal_ranks(A, B)}
    times = interleaved(functions, rounds=5)
    flops = 2.0 * V * V * R
    limit = statistics.median(t * f / flops for t, f in zip(times["ours"], rates[1:], strict=True))
    seconds = statistics.median(times["ours"])
    shape = f"diagonal ranks of {V} x {V} fp32, r={R}"
    found(f"{shape}: time", f"{seconds:.3f} s, {flops / seconds / 1e9:.0f} GFLOP/s")
    found(f"{shape}: ours / FMA limit", f"{limit:.2f}", "<= 1.5")
    found("  memory beyond the factors", f"{peak_bytes(functions['ours']) / 2**20:.1f} MiB", "<= 64")
    start = time.perf_counter()
    theirs = torch_ranks(A, B)
    found(f"{shape}: torch in chunks of {CHUNK} rows / ours", f"{(time.perf_counter() - start) / seconds:.1f}")
    off = (diagonal_ranks(A, B) - theirs).abs()
    found("  rows whose rank torch's rounding changes", f"{int((off > 0).sum())} of {V}, by at most {int(off.max())}")
    benchmark.pedantic(functions["ours"], rounds=1)


def test_bundled_model(found):
    """Every head of induction-2l: in fp64, where rounding decides nothing, against the materialised product."""
    weights = fc.load_weights("induction-2l").to(torch.float64)
    same = 0
    for layer in range(weights.n_layers):
        for head in range(weights.n_heads):
            circuit = fc.ov_circuit(weights, (layer, head))
            same += int((diagonal_ranks(circuit.A, circuit.B) == torch_ranks(circuit.A, circuit.B)).sum())
    found(
        "diagonal ranks of the OV circuits of induction-2l: ranks that torch finds too, materialised",
        f"{same} of {weights.n_layers * weights.n_heads * len(weights.W_E)}",
    )
