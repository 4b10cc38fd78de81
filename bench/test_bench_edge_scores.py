"""All edges of GPT-2 small's shape with random weights: EAP beside plain autograd over TransformerLens, and circuits."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfastcircuits as fc
from bench.test_bench_models import V, lens  # noqa: F401 (a fixture)
from bench.timing import interleaved, peak_bytes, ratio
from pyfastcircuits.sweeps.architectures import ARCHITECTURES
from pyfastcircuits.sweeps.footprint import scores_footprint

B, T = 8, 64
WHERE = f"GPT-2 small shape, T={T}, batch {B}"
ASKED = {"metric": fc.LogitDifference(3, 5), "positions": -1}
SIZES = 20


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, V, (2, B, T), generator=torch.Generator().manual_seed(1)).unbind(0)


def plain_eap(model, clean, corrupted):
    """What users write: outputs of every node stacked, split inputs, hooks on the way back."""
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    change = torch.zeros(B, T, 1 + layers * (heads + 1), model.cfg.d_model)
    scores = torch.zeros(change.shape[2], layers * (3 * heads + 1) + 1)

    def writes(first, sign):
        def keep(x, hook):
            x = x.detach() if x.dim() == 4 else x.detach()[:, :, None]
            change[:, :, first : first + x.shape[2]] += sign * x

        return keep

    def outputs(sign):
        hooks = [("blocks.0.hook_resid_pre", writes(0, sign))]
        for layer in range(layers):
            at = 1 + layer * (heads + 1)
            hooks.append((f"blocks.{layer}.attn.hook_result", writes(at, sign)))
            hooks.append((f"blocks.{layer}.hook_mlp_out", writes(at + heads, sign)))
        return hooks

    def reads(first, before):
        def found(gradient, hook):
            gradient = gradient if gradient.dim() == 4 else gradient[:, :, None]
            by_edge = torch.einsum("btud,btvd->uv", change[:, :, :before], gradient)
            scores[:before, first : first + gradient.shape[2]] += by_edge

        return found

    inputs = [(f"blocks.{layers - 1}.hook_resid_post", reads(scores.shape[1] - 1, change.shape[2]))]
    for layer in range(layers):
        at, before = layer * (3 * heads + 1), 1 + layer * (heads + 1)
        for i, kind in enumerate("qkv"):
            inputs.append((f"blocks.{layer}.hook_{kind}_input", reads(at + i * heads, before)))
        inputs.append((f"blocks.{layer}.hook_mlp_in", reads(at + 3 * heads, before + heads)))
    switches = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for name in switches:
        setattr(model.cfg, name, True)
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=outputs(1)):
            model(corrupted, return_type=None)
        start = ("blocks.0.hook_resid_pre", lambda x, hook: x.requires_grad_())
        with model.hooks(fwd_hooks=[*outputs(-1), start], bwd_hooks=inputs):
            logits = model(clean)[:, -1]
            (logits[:, 3] - logits[:, 5]).mean().backward()
    finally:
        for name in switches:
            setattr(model.cfg, name, False)
    return scores


def test_all_edges(lens, prompts, found):  # noqa: F811
    weights = fc.CircuitWeights.from_model(lens)

    def ours(method="eap"):
        clean, corrupted = (fc.trace(lens, tokens, weights=weights) for tokens in prompts)
        return fc.edge_scores(clean, corrupted, method, **ASKED)

    times = interleaved({"plain": lambda: plain_eap(lens, *prompts), "ours": ours}, rounds=2)
    found(f"{WHERE}, all edges by EAP: autograd over TransformerLens / ours", f"{ratio(times, 'plain', 'ours'):.1f}", ">= 3")  # fmt: skip
    found("  time", f"autograd {statistics.median(times['plain']):.1f} s, ours {statistics.median(times['ours']):.1f} s, with both runs")  # fmt: skip
    theirs, mine = peak_bytes(lambda: plain_eap(lens, *prompts)), peak_bytes(ours)
    found("  memory: ours / autograd", f"{mine / theirs:.2f}", "<= 0.2")
    found("  memory", f"autograd {theirs / 2**20:.0f} MiB, ours {mine / 2**20:.0f} MiB")
    table, scores = plain_eap(lens, *prompts), ours()
    from pyfastcircuits.run.graph import Graph

    graph = Graph(lens.cfg.n_heads, ("after heads",) * lens.cfg.n_layers)
    expected = torch.cat([table[:count, i] for i, count in enumerate(graph.before)])
    found("  largest difference of a score", f"{float((scores.values - expected).abs().max() / expected.abs().max()):.0e}, relative to the largest")  # fmt: skip


def test_integrated_gradients_and_a_curve(lens, prompts, found):  # noqa: F811
    clean, corrupted = (fc.trace(lens, tokens) for tokens in prompts)
    scores = fc.edge_scores(clean, corrupted, **ASKED)
    circuit = fc.circuit(scores)
    ways = {
        "eap": lambda: fc.edge_scores(clean, corrupted, **ASKED),
        "ig": lambda: fc.edge_scores(clean, corrupted, "eap-ig", steps=5, **ASKED),
        "curve": lambda: fc.faithfulness(circuit, clean, corrupted, sizes=SIZES, **ASKED),
        "forward": lambda: lens(prompts[0], return_type="logits"),
    }
    times = interleaved(ways, rounds=2)
    found(f"{WHERE}, EAP-IG of 5 steps / EAP", f"{ratio(times, 'ig', 'eap'):.1f}", "<= 6")
    found(f"{WHERE}, a faithfulness curve of {SIZES} sizes / a forward pass", f"{ratio(times, 'curve', 'forward'):.0f}", "<= 25")  # fmt: skip


MEASURED = """
import torch, transformers
import pyfastcircuits as fc
from bench.timing import peak_bytes
config = transformers.LlamaConfig(
    vocab_size=2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers={layers}, num_attention_heads=32,
    num_key_value_heads=8, attn_implementation="eager",
)
model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
block = model.model.layers[0]
for layer in model.model.layers[1:]:
    for name, parameter in block.named_parameters():
        layer.get_parameter(name).data = parameter.data
weights = fc.CircuitWeights.from_model(model)
tokens = torch.randint(0, 2048, (2, 1, {length}), generator=torch.Generator().manual_seed(0))
def scores():
    runs = [fc.trace(model, one, store="qk", weights=weights) for one in tokens]
    return fc.edge_scores(*runs, metric=fc.LogitDifference(3, 5), positions=-1)
print(peak_bytes(scores))
"""


def test_memory_does_not_grow_with_depth(found):
    """Llama-3-8B's layers, few of them, fp32: what EAP and its two runs take beside weights, and 32 layers would."""
    pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")
    taken, length = {}, 512
    few, many = 3, 9
    for layers in (few, many):
        code = MEASURED.format(layers=layers, length=length)
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
        ).stdout  # fmt: skip
        taken[layers] = int(out)
    each = max(0, (taken[many] - taken[few]) // (many - few))
    planned = scores_footprint(ARCHITECTURES["llama-3-8b"], 1, length)
    found(f"Llama-3-8B's layers, T={length}, EAP and its runs beside weights, what the process grows by: of {few} layers", f"{taken[few] / 2**20:.0f} MiB")  # fmt: skip
    found("  what each further layer adds", f"{each / 2**20:.0f} MiB")
    found("  32 layers, by that", f"{(taken[few] + (32 - few) * each) / 1e9:.1f} GB", "<= 4")
    found("  32 layers, by the plan's arithmetic", f"{sum(planned.values()) / 1e9:.1f} GB", "<= 4")
