"""`pair_norms` on the CPU by both routes, beside torch's matrix product: one kind of composition, GPT-2 small's heads."""

import statistics

import torch

from bench.timing import cpu_rate, interleaved, ratio
from pyfastcircuits import ops

LAYERS, HEADS, D, R = 12, 12, 768, 64
COUNT = (LAYERS - 1) * HEADS  # heads that have an earlier or a later layer
PAIRS = LAYERS * (LAYERS - 1) // 2 * HEADS**2  # with layer1 < layer2
FLOPS = {"products": PAIRS * 2 * D * R * R, "gram": D * (D + 1) * (PAIRS + 2 * COUNT * R)}  # with the Gram matrices


def torch_norms(left, right):
    """One product for each layer of right factors, with all left factors of earlier layers."""
    out = []
    for end in range(HEADS, COUNT + 1, HEADS):
        group = right[end - HEADS : end]
        products = left[:end].flatten(0, 1) @ group.transpose(0, 1).flatten(1)
        out.append(products.view(end, R, HEADS, R).norm(dim=(1, 3)).flatten())
    return torch.cat(out)


def test_pair_norms(found):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(COUNT, R, D, generator=g), torch.randn(COUNT, R, D, generator=g).mT
    before = torch.arange(COUNT) // HEADS * HEADS + HEADS
    functions = {
        "products": lambda: ops.pair_norms(left, right, before=before, route="products"),
        "gram": lambda: ops.pair_norms(left, right, before=before, route="gram"),
        "torch": lambda: torch_norms(left, right),
    }
    if cpu_rate("bf16"):
        functions["bf16"] = lambda: ops.pair_norms(left, right, before=before, precision="bf16")
    times = interleaved(functions, rounds=5)
    shape = f"pair_norms fp32, {PAIRS} pairs, d={D} r={R}"
    names = {
        "products": "route of products",
        "gram": "route of Gram matrices",
        "torch": "torch",
        "bf16": "bf16 products",
    }
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = FLOPS["gram" if name == "gram" else "products"] / median / 1e9
        found(f"{shape}: time, {names[name]}", f"{median * 1e3:.0f} ms, {rate:.0f} GFLOP/s")
    found(f"{shape}: torch, layer by layer / ours, route of Gram matrices", f"{ratio(times, 'torch', 'gram'):.1f}")
    few = (left[:24], right[:24])
    exact = ops.reference.pair_norms(*few)
    theirs = torch.stack([(few[0] @ factor).norm(dim=(1, 2)) for factor in few[1]], 1)
    for name, values in (("torch", theirs), *((r, ops.pair_norms(*few, route=r)) for r in ("products", "gram"))):
        found(f"{shape}: relative error against fp64, {names[name]}", f"{float((values / exact - 1).abs().max()):.1e}")
