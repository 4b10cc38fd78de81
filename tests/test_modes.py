"""Nothing that is kept, and no result, depends on the caller's modes: gradients, inference, autocast, default device."""

from contextlib import ExitStack, contextmanager
from functools import cache

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits import ops

MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
}
KEPT = {  # reads that leave something in the trace
    "streams": lambda run: run.streams,
    "z": lambda run: [run.z(layer) for layer in range(3)],
    "token losses": lambda run: run.token_losses,
    "loss": lambda run: run.loss,
    "prefixes of paths": lambda run: fc.path_logits(run, [(0, 1), (1, 0), (2, 1)]),
    "an ablation": lambda run: fc.pair_ablation(run),
    "attribution": lambda run: fc.direct_logit_attribution(run, "head"),
    "terms of scores": lambda run: fc.qk_terms(run, (2, 0)),
    "subspaces": lambda run: fc.subspaces(run, (0, 0), (1, 0)),
}
LEARNING = {
    "a path": lambda run: fc.path_logits(run, [(0, 1), (1, 0)]).sum(),
    "a path of three": lambda run: fc.path_logits(run, [(0, 1), (1, 0), (2, 1)]).sum(),
    "orders": lambda run: fc.order_losses(run)[1],
    "the loss": lambda run: run.loss,
    "token losses": lambda run: run.token_losses[0, 2],
    "streams": lambda run: run.streams[2].square().sum(),
    "z": lambda run: run.z(1).square().sum(),
}
CALLS = {
    "trace": lambda w, run, t: fc.trace(w, t).final,
    "trace, qk": lambda w, run, t: fc.trace(w, t, store="qk").token_losses,
    "order_losses": lambda w, run, t: fc.order_losses(run),
    "layer_marginals": lambda w, run, t: fc.layer_marginals(run).given_rest,
    "path_logits": lambda w, run, t: fc.path_logits(run, [(0, 1), (1, 0)]),
    "path_ablation": lambda w, run, t: fc.path_ablation(run, [(), [(0, 1)]], kl=True).values,
    "pair_ablation": lambda w, run, t: fc.pair_ablation(run, "edge", attention="recomputed").values,
    "head_ablation": lambda w, run, t: fc.head_ablation(run, "mean", kl=True).extra["kl"],
    "layer_ablation": lambda w, run, t: fc.layer_ablation(run, attention="recomputed").values,
    "sweep": lambda w, run, t: fc.sweep(w, t, kl=True).result.values,
    "composition_ablation": lambda w, run, t: fc.composition_ablation(run, "K").values,
    "activation_patching": lambda w, run, t: fc.activation_patching(run, fc.trace(w, t.flip(1)), metric="kl").values,
    "path_patching": lambda w, run, t: fc.path_patching(run, fc.trace(w, t.flip(1)), "V").values,
    "edge_attribution": lambda w, run, t: fc.edge_attribution(run, fc.trace(w, t.flip(1)), "Q", exact=2).values,
    "direct_logit_attribution": lambda w, run, t: fc.direct_logit_attribution(run).values,
    "logit_lens": lambda w, run, t: fc.logit_lens(run, metric="rank").values,
    "project": lambda w, run, t: fc.project(run, w.W_U[:, 3].detach()).values,
    "qk_terms": lambda w, run, t: fc.qk_terms(run, (2, 0)).values,
    "head_scores": lambda w, run, t: fc.head_scores(w, length=8, batch=1, batches=1).values,
    "composition_scores": lambda w, run, t: fc.composition_scores(w, ["Q", "K", "V"]),
    "composition_baseline": lambda w, run, t: fc.composition_baseline(w, "K").std,
    "component_scores": lambda w, run, t: fc.component_scores(w, "K", (0, 0), (1, 0)).pairs,
    "ov_circuit": lambda w, run, t: fc.ov_circuit(w, (0, 1)).AB,
    "qk_circuit": lambda w, run, t: fc.qk_circuit(w, (0, 1)).S,
    "top_entries": lambda w, run, t: fc.top_entries(fc.ov_circuit(w, (0, 1)), 5).values,
    "top_per_row": lambda w, run, t: fc.top_per_row(fc.ov_circuit(w, (0, 1)), 3, normalize="log_softmax").values,
    "diagonal_ranks": lambda w, run, t: fc.diagonal_ranks(fc.ov_circuit(w, (0, 1))),
    "copying_accuracy": lambda w, run, t: fc.copying_accuracy(w).top1,
    "copying_scores": lambda w, run, t: fc.copying_scores(w),
    "trace_ratios": lambda w, run, t: fc.trace_ratios(w),
    "effective_rank": lambda w, run, t: fc.effective_rank(fc.qk_circuit(w, (1, 1))),
    "skip_trigrams": lambda w, run, t: fc.skip_trigrams(w, (1, 0), [3, 4], 2).logits,
    "virtual_weights": lambda w, run, t: fc.virtual_weights(w, (0, 0), (2, 1), hops="all").AB,
    "virtual_head": lambda w, run, t: fc.virtual_head(run, (0, 0), (1, 1)).pattern,
    "subspaces": lambda w, run, t: fc.subspaces(run, (0, 0), (2, 1)).values,
    "bigrams": lambda w, run, t: fc.bigrams(w).AB,
    "center": lambda w, run, t: fc.center(w).W_U,
    "fold_value_biases": lambda w, run, t: fc.fold_value_biases(w).b_O,
    "streams": lambda w, run, t: run.streams[2],
    "logits": lambda w, run, t: run.logits(),
    "z": lambda w, run, t: run.z(1),
    "pattern": lambda w, run, t: run.pattern(1),
    "attend": lambda w, run, t: run.attend(run.final, 1),
    "unembed": lambda w, run, t: run.unembed(run.final),
    "stream_losses": lambda w, run, t: run.stream_losses(run.final[None]),
    "mean": lambda w, run, t: run.mean(run.token_losses),
    "non_head_stream": lambda w, run, t: run.non_head_stream(2),
    "part of a run": lambda w, run, t: run[1:].loss,
    "delta": lambda w, run, t: fc.head_ablation(run).delta,
    "means": lambda w, run, t: fc.head_ablation(run).means(),
    "weights of heads": lambda w, run, t: w.heads("W_V", 1),
    "bias": lambda w, run, t: w.bias("V", 1),
    "factored product": lambda w, run, t: (fc.ov_circuit(w, (0, 1)) @ fc.qk_circuit(w, (1, 0))).AB,
    "factored sum": lambda w, run, t: (fc.ov_circuit(w, (0, 1)) + fc.qk_circuit(w, (1, 0))).AB,
    "norm": lambda w, run, t: fc.ov_circuit(w, (0, 1)).norm(),
    "eigenvalues": lambda w, run, t: fc.positivity(fc.ov_circuit(w, (0, 1)).eigenvalues),
    "vector": lambda w, run, t: fc.ov_circuit(w, (0, 1)) @ w.W_E[:, 0],
}


def model(**options):
    return random_weights(3, 2, 1, 16, 4, 31, norm="layernorm", **options)


def learning(**options):
    """Weights that require gradients."""
    weights = model(**options)
    for _, tensor in weights.tensors():
        tensor.requires_grad_()
    return weights


def gradients(weights, scalar):
    tensors = [tensor for _, tensor in weights.tensors()]
    return torch.autograd.grad(scalar, tensors, allow_unused=True)


@pytest.mark.parametrize("read", KEPT)
@pytest.mark.parametrize("ask", LEARNING)
def test_a_read_without_gradients_does_not_cut_those_of_a_later_call(ask, read):
    weights = learning()
    tokens = random_tokens(2, 7, 31)
    expected = gradients(weights, LEARNING[ask](fc.trace(weights, tokens)))
    for mode in (torch.no_grad, torch.inference_mode):
        run = fc.trace(weights, tokens)
        with mode():
            KEPT[read](run)
        found = gradients(weights, LEARNING[ask](run))
        for x, y in zip(expected, found, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.allclose(x, y, rtol=1e-12, atol=1e-14)


def test_a_read_with_gradients_leaves_none_to_a_later_call_without():
    run = fc.trace(learning(), random_tokens(2, 7, 31))
    for read in (lambda: run.streams[1], lambda: run.z(1), lambda: run.token_losses):
        assert read().requires_grad
        with torch.no_grad():
            assert not read().requires_grad


@cache
def untouched():
    """Weights, tokens, and what each call gives of a run that nothing was read of."""
    weights, tokens = model(dtype=torch.float32), random_tokens(2, 7, 31)
    run = fc.trace(weights, tokens)
    return weights, tokens, [call(weights, run, tokens) for call in CALLS.values()]


@pytest.mark.parametrize("read", KEPT)
def test_what_a_read_in_a_mode_leaves_is_what_any_read_leaves(read):
    weights, tokens, fresh = untouched()
    for mode in MODES.values():
        run = fc.trace(weights, tokens)
        with mode():
            KEPT[read](run)
        after = [call(weights, run, tokens) for call in CALLS.values()]
        assert all(torch.equal(x, y) for x, y in zip(after, fresh, strict=True))


@contextmanager
def all_at_once():
    with ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        yield


@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same_in_every_mode(call):
    weights, tokens = model(dtype=torch.float32), random_tokens(2, 7, 31)
    expected = CALLS[call](weights, fc.trace(weights, tokens), tokens)
    for mode in (*MODES.values(), all_at_once):
        run = fc.trace(weights, tokens)
        with mode():
            found = CALLS[call](weights, run, tokens)
        assert found.dtype == expected.dtype
        assert not found.is_inference()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_are_the_same_with_another_default_dtype(dtype):
    weights, tokens = model(dtype=torch.float32), random_tokens(2, 7, 31)
    expected = {name: call(weights, fc.trace(weights, tokens), tokens) for name, call in CALLS.items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = {name: call(weights, fc.trace(weights, tokens), tokens) for name, call in CALLS.items()}
    finally:
        torch.set_default_dtype(before)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_decomposition_kept_without_gradients_does_not_cut_those_of_a_later_call(mode):
    left, right = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, dtype=torch.float64)
    matrix = fc.FactoredMatrix(left, right)
    with mode():
        matrix.svd()
    (found,) = torch.autograd.grad(matrix.S.sum(), left)
    (expected,) = torch.autograd.grad(fc.FactoredMatrix(left, right).S.sum(), left)
    assert torch.equal(found, expected)


def test_the_callers_modes_go_on():
    weights, tokens = model(dtype=torch.float32), random_tokens(2, 7, 31)
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fc.trace(weights, tokens)
        assert (x @ x).dtype == torch.bfloat16
    with torch.device("meta"), torch.inference_mode():
        fc.trace(weights, tokens)
        assert torch.ones(1).is_meta
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("ask", ["orders", "the loss", "a path"])
def test_gradients_of_a_run_under_autocast_are_those_of_any_run(ask):
    weights = learning(dtype=torch.float32)
    expected = gradients(weights, LEARNING[ask](fc.trace(weights, random_tokens(2, 7, 31))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalar = LEARNING[ask](fc.trace(weights, random_tokens(2, 7, 31)))
        inside = gradients(weights, LEARNING[ask](fc.trace(weights, random_tokens(2, 7, 31))))
    found = gradients(weights, scalar)
    assert all(x is None or torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    assert all(x is None or x.dtype == torch.float32 for x in inside)  # torch's own products are in bf16 there


def sweep_inputs():
    g = torch.Generator().manual_seed(0)
    base, delta, basis = (torch.randn(*shape, generator=g) for shape in ((3, 12), (2, 3, 4), (1, 4, 12)))
    return base, delta, basis, torch.tensor([1, 5, 11])


WITHOUT_GRADIENT = {
    "sweep_nll": lambda base, delta, basis, targets: ops.sweep_nll(base, delta, basis, targets),
    "joint_nll": lambda base, delta, basis, targets: ops.joint_nll(base, delta, basis, targets, torch.tensor([[0, 1]])),
    "factored_topk": lambda base, delta, basis, targets: ops.factored_topk(delta[0], basis[0], 3).values,
}


@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_a_gradient_through_an_op_without_one_raises(op):
    base, delta, basis, targets = sweep_inputs()
    out = WITHOUT_GRADIENT[op](base, delta.requires_grad_(), basis, targets)
    with pytest.raises(RuntimeError, match=f"{op} has no derivative"):
        out.sum().backward()


@pytest.mark.parametrize("wrong", ["targets", "group", "pairs", "columns"])
def test_compiled_calls_check_their_indices(wrong):
    base, delta, basis, targets = sweep_inputs()
    calls = {
        "targets": lambda x: ops.sweep_nll(base, delta, basis, targets + x),
        "group": lambda x: ops.sweep_nll(base, delta, basis, targets, group=torch.zeros(2).long() + x),
        "pairs": lambda x: ops.joint_nll(base, delta, basis, targets, torch.tensor([[0, 1]]) + x),
        "columns": lambda x: ops.diagonal_ranks(delta[0], basis[0], columns=targets + x),
    }
    compiled = torch.compile(calls[wrong], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(0)), calls[wrong](torch.tensor(0)))
    with pytest.raises(IndexError, match=rf"{wrong}\[.*\] is \d+, expected 0 to"):
        compiled(torch.tensor(99))
