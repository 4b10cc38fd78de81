"""What users call, on a GPU: a trace and every experiment and table of it, against the same in float64 on the CPU."""

from collections.abc import Callable

import pytest
import torch
from support.random_models import random_tokens, random_weights
from torch import Tensor

import pyfastcircuits as fc

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EXPERIMENTS: dict[str, Callable[[fc.FrozenTrace], object]] = {
    "logits": lambda t: t.logits(),
    "token_losses": lambda t: t.token_losses,
    "order_losses": lambda t: fc.order_losses(t),
    "layer_marginals": lambda t: torch.stack(list(fc.layer_marginals(t))),
    "path_logits": lambda t: fc.path_logits(t, [(0, 1), (1, 0)]),
    "sweep": lambda t: fc.sweep(t.weights, t.tokens).result.values,
    "head_ablation": lambda t: fc.head_ablation(t).values,
    "head_ablation, mean": lambda t: fc.head_ablation(t, "mean").values,
    "head_ablation, recomputed": lambda t: fc.head_ablation(t, attention="recomputed").values,
    "head_ablation, kl": lambda t: fc.head_ablation(t, metric="kl").values,
    "head_ablation, rank": lambda t: fc.head_ablation(t, metric="rank").values,
    "layer_ablation": lambda t: fc.layer_ablation(t).values,
    "pair_ablation, path": lambda t: fc.pair_ablation(t, "path").values,
    "pair_ablation, joint": lambda t: fc.pair_ablation(t, "joint").values,
    "pair_ablation, edge": lambda t: fc.pair_ablation(t, "edge").values,
    "activation_patching": lambda t: fc.activation_patching(t, reversed_run(t), what="resid_pre", at="each").values,
    "path_patching": lambda t: fc.path_patching(t, reversed_run(t), "K").values,
    "edge_attribution": lambda t: fc.edge_attribution(t, reversed_run(t), "K").values,
    "edge_scores": lambda t: fc.edge_scores(t, reversed_run(t)).values,
    "edge_scores, integrated": lambda t: fc.edge_scores(t, reversed_run(t), "eap-ig", metric="kl").values,
    "faithfulness": lambda t: torch.tensor(
        fc.faithfulness(fc.circuit(fc.edge_scores(t, reversed_run(t)), top=9), t, reversed_run(t)).faithfulness,
        dtype=t.weights.compute_dtype,
        device=t.weights.device,
    ),
    "top_paths": lambda t: fc.top_paths(t, 5).values,
    "sample_paths": lambda t: fc.sample_paths(t, 8, order=2).values,
    "path_groups": lambda t: fc.path_groups(t, budget=8).values,
    "screened_pairs": lambda t: torch.tensor(fc.screened_pairs(t, 4).labels, device=t.weights.device),
    "direct_logit_attribution": lambda t: fc.direct_logit_attribution(t).values,
    "logit_lens": lambda t: fc.logit_lens(t).values,
    "head_scores": lambda t: fc.head_scores(t.weights, length=10, batches=1).values,
    "qk_terms": lambda t: fc.qk_terms(t, (1, 2)).values,
    "composition_scores": lambda t: fc.composition_scores(t.weights, "K"),
    "circuit_eigenvalues": lambda t: fc.circuit_eigenvalues(t.weights, "OV").abs().sort(-1).values,
    "copying_scores": lambda t: fc.copying_scores(t.weights),
    "copying_accuracy": lambda t: fc.copying_accuracy(t.weights).positive,
    "top_entries": lambda t: fc.top_entries(fc.ov_circuit(t.weights, (1, 1)), 20).values,
    "top_per_row": lambda t: fc.top_per_row(fc.ov_circuit(t.weights, (1, 1)), 5).values,
    "diagonal_ranks": lambda t: fc.diagonal_ranks(fc.ov_circuit(t.weights, (0, 3))),
}


def reversed_run(trace: fc.FrozenTrace) -> fc.FrozenTrace:
    return fc.trace(trace.weights, trace.tokens.flip(-1))


def run(name: str, weights: fc.CircuitWeights, tokens: Tensor) -> Tensor:
    found = EXPERIMENTS[name](fc.trace(weights, tokens))
    assert isinstance(found, Tensor)
    assert found.device == weights.device
    return found.cpu()


@pytest.mark.parametrize(
    ("norm", "positional"), [(None, "shortformer"), ("layernorm", "standard"), ("rmsnorm", "rotary")]
)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_equals_the_cpu(name: str, norm: str | None, positional: str) -> None:
    weights, tokens = random_weights(norm=norm, positional=positional), random_tokens(3, 12)
    exact = run(name, weights, tokens)
    torch.testing.assert_close(run(name, weights.to("cuda"), tokens.cuda()), exact, rtol=1e-9, atol=1e-10)
    single = run(name, weights.to(torch.float32).to("cuda"), tokens.cuda())
    torch.testing.assert_close(single, exact.to(single.dtype), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_default_device_changes_nothing(name: str) -> None:
    weights, tokens = random_weights(), random_tokens(3, 12)
    expected = run(name, weights, tokens)
    with torch.device("cuda"):
        assert torch.equal(run(name, weights, tokens), expected)


def test_a_bundled_model() -> None:
    weights, tokens = fc.load_weights("induction-2l"), random_tokens(2, 40)
    ours = fc.sweep(weights.to("cuda"), tokens.cuda()).result
    theirs = fc.sweep(weights, tokens).result
    torch.testing.assert_close(ours.values.cpu(), theirs.values, rtol=1e-5, atol=1e-5)
    assert ours.delta.argsort().cpu().tolist()[:3] == theirs.delta.argsort().tolist()[:3]


def test_gradients() -> None:
    def gradient(device: str, dtype: torch.dtype) -> Tensor:
        weights = random_weights().to(dtype).to(device)
        weights.W_O.requires_grad_(True)
        fc.order_losses(fc.trace(weights, random_tokens().to(device))).sum().backward()
        assert weights.W_O.grad is not None
        return weights.W_O.grad.cpu()

    exact = gradient("cpu", torch.float64)
    torch.testing.assert_close(gradient("cuda", torch.float64), exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient("cuda", torch.float32), exact.float(), rtol=1e-3, atol=1e-5)
