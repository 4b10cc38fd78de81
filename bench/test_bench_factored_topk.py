"""`factored_topk` on the CPU: the largest entries of a full circuit, beside torch in chunks and the multiply-add rate."""

import statistics
import time

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio
from pyfastcircuits.ops import factored_topk

V, R, CHUNK = 50257, 64, 4096


@pytest.fixture(scope="module")
def factors():
    g = torch.Generator().manual_seed(0)
    return torch.randn(V, R, generator=g), torch.randn(R, V, generator=g)


def torch_top(A, B, k):
    """As with TransformerLens' FactoredMatrix: rows of AB in chunks, the best of each, merged."""
    values, places = [], []
    for first in range(0, len(A), CHUNK):
        best = (A[first : first + CHUNK] @ B).flatten().topk(k)
        values.append(best.values)
        places.append(best.indices + first * B.shape[1])
    best = torch.cat(values).topk(k)
    place = torch.cat(places)[best.indices]
    return best.values, place // B.shape[1], place % B.shape[1]


def torch_top_per_row(A, B, k):
    return torch.cat([(A[first : first + CHUNK] @ B).topk(k).indices for first in range(0, len(A), CHUNK)])


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_top_entries(factors, benchmark, found):
    rates = {"fma": [], "bf16": []}
    functions = {
        "rates": lambda: [values.append(cpu_rate(kind)) for kind, values in rates.items()],
        "ours": lambda: factored_topk(*factors, 100, screen="none"),
    }
    if cpu_rate("bf16"):
        functions["screened"] = lambda: factored_topk(*factors, 100, screen="bf16")
    times = interleaved(functions, rounds=5)
    flops = 2.0 * V * V * R
    limit = statistics.median(t * f / flops for t, f in zip(times["ours"], rates["fma"][1:], strict=True))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    shape = f"top 100 of {V} x {V} fp32, r={R}"
    fma, bf16 = (statistics.median(values) / 1e9 for values in rates.values())
    found(f"{shape}: rates", f"{fma:.0f} GFLOP/s fp32, {bf16:.0f} bf16")
    found(f"{shape}: time", f"{seconds['ours']:.3f} s, {flops / seconds['ours'] / 1e9:.0f} GFLOP/s")
    found(f"{shape}: ours / FMA limit", f"{limit:.2f}", "<= 1.35")
    ours = functions["ours"]()
    if "screened" in functions:
        found(f"{shape}: without / with the bfloat16 screen", f"{ratio(times, 'ours', 'screened'):.2f}", ">= 1.4")
        same = all(torch.equal(x, y) for x, y in zip(functions["screened"](), ours, strict=True))
        found("  values, rows and columns are the same", str(same), "True")
        assert same
    for name in list(functions)[1:]:
        found(f"  memory beyond the factors, {name}", f"{peak_bytes(functions[name]) / 2**20:.1f} MiB", "<= 64")

    few = (factors[0][: 3 * CHUNK], factors[1])  # a stated sample: the whole takes a minute
    theirs = []
    peak = peak_bytes(lambda: theirs.append(timed(lambda: theirs.append(torch_top(*few, 100)))))
    result, slow = theirs
    slow *= V / len(few[0])
    found(f"{shape}: torch in chunks of {CHUNK} rows / ours", f"{slow / seconds['ours']:.1f}", ">= 12")
    found("  time and memory of torch", f"{slow:.1f} s ({len(few[0])} rows, scaled), {peak / 2**20:.0f} MiB")
    found("  entries of these rows that both find", f"{_common(factored_topk(*few, 100), result)} of 100")
    benchmark.pedantic(functions["ours"], rounds=1)


def test_top_per_row(factors, benchmark, found):
    rates = []
    functions = {
        "rate": lambda: rates.append(cpu_rate("fma")),
        "ours": lambda: factored_topk(*factors, 10, per_row=True, screen="none"),
    }
    times = interleaved(functions, rounds=5)
    flops = 2.0 * V * V * R
    limit = statistics.median(t * f / flops for t, f in zip(times["ours"], rates[1:], strict=True))
    seconds = statistics.median(times["ours"])
    shape = f"top 10 of each of {V} rows fp32, r={R}"
    found(f"{shape}: time", f"{seconds:.3f} s, {flops / seconds / 1e9:.0f} GFLOP/s")
    found(f"{shape}: ours / FMA limit", f"{limit:.2f}", "<= 1.5")
    results = V * 10 * (4 + 8 + 8)
    found(
        "  memory beyond factors and results", f"{(peak_bytes(functions['ours']) - results) / 2**20:.1f} MiB", "<= 64"
    )
    slow = timed(lambda: torch_top_per_row(*factors, 10))
    found(f"{shape}: torch in chunks of {CHUNK} rows / ours", f"{slow / seconds:.1f}")
    benchmark.pedantic(functions["ours"], rounds=1)


def test_bundled_model(found):
    """Every head of induction-2l: the entries of the materialised OV circuit, by torch at the same dtype."""
    weights = fc.load_weights("induction-2l")
    common, error, heads = (
        0,
        0.0,
        [(layer, head) for layer in range(weights.n_layers) for head in range(weights.n_heads)],
    )
    for head in heads:
        circuit = fc.ov_circuit(weights, head)
        ours = factored_topk(circuit.A, circuit.B, 100)
        product = circuit.A @ circuit.B
        best = product.flatten().topk(100)
        width = product.shape[1]
        common += _common(ours, (best.values, best.indices // width, best.indices % width))
        exact = circuit.A[ours.rows].double() * circuit.B[:, ours.columns].mT.double()
        error = max(error, float((ours.values / exact.sum(1) - 1).abs().max()))
    found(
        "top 100 of each OV circuit of induction-2l: entries that torch finds too, materialised",
        f"{common} of {100 * len(heads)}",
    )
    found("  relative error of their values", f"{error:.1e}")


def _common(ours, theirs):
    places = [set(zip(rows.tolist(), columns.tolist(), strict=True)) for _, rows, columns in (ours, theirs)]
    return len(places[0] & places[1])
