"""Ablations as differentiable functions of the weights: their gradients are those of the same formulas in plain torch."""

from dataclasses import replace

import pytest
import torch
from support import naive
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.run import memory

NORMS = [None, "layernorm", "rmsnorm"]
TOKENS = random_tokens(3, 6, 11)


def model(**changes):
    """Small weights that require gradients."""
    sizes = {"layers": 3, "heads": 2, "kv": 1, "d": 6, "r": 4, "vocabulary": 11}
    weights = random_weights(**(sizes | changes))
    for _, tensor in weights.tensors():
        tensor.requires_grad_()
    return weights


def gradients(values, weights):
    """Of a fixed mixture of the values, by the names of weights; zeros where there is none."""
    mixture = (values.nan_to_num() * torch.arange(1, 1 + values.numel()).view(values.shape)).sum()
    tensors = dict(weights.tensors())
    given = list(tensors.values())
    found = torch.autograd.grad(mixture, given, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def assert_alike(ours, theirs, weights):
    """The values and their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, equal_nan=True)
    expected = gradients(theirs, weights)
    assert max(float(x.abs().max()) for x in expected.values()) > 1e-3
    for name, gradient in gradients(ours, weights).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def replaced(z, mode):
    """What takes the place of z [B, T, x]."""
    return {"zero": torch.zeros_like(z), "mean": z.mean((0, 1), keepdim=True).expand_as(z), "resample": z.roll(1, 0)}[
        mode
    ]


def losses(run, streams, final_norm, biased=True):
    """Losses of final streams in plain torch, by the clean run's norm scale or by their own."""
    weights = run.weights
    out = []
    for stream in streams:
        normed, _ = naive.norm(stream, weights, run.scales[-1][..., None] if final_norm == "frozen" else None)
        logits = normed @ weights.W_U + (weights.b_U if biased else 0)
        out.append(naive.loss(logits, run.tokens))
    return torch.stack(out)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positional", ["none", "standard", "shortformer", "rotary"])
def test_heads_at_zero_are_plain_reruns(norm, positional):
    weights = model(norm=norm, positional=positional)
    clean = naive.Run(weights, TOKENS)
    reruns = [naive.Run(weights, TOKENS, clean, zero={(layer, h)}) for layer in range(3) for h in range(2)]
    expected = torch.stack([naive.loss(rerun.logits, TOKENS) for rerun in reruns]).view(3, 2)
    result = fc.head_ablation(fc.trace(weights, TOKENS))
    assert_alike(result.values, expected, weights)
    assert_alike(result.delta, expected - naive.loss(clean.logits, TOKENS), weights)
    layers = [naive.Run(weights, TOKENS, clean, zero={(layer, h) for h in range(2)}) for layer in range(3)]
    expected = torch.stack([naive.loss(rerun.logits, TOKENS) for rerun in layers])
    assert_alike(fc.layer_ablation(fc.trace(weights, TOKENS)).values, expected, weights)


def without_heads(run, sets, mode, effect):
    """Final streams when each set of heads writes what takes its place, and later heads read that under their patterns."""
    weights, streams = run.weights, []
    for heads in sets:
        gone = torch.zeros_like(run.embedded)
        for layer in range(weights.n_layers):
            W_V, W_O = weights.heads("W_V", layer), weights.heads("W_O", layer)
            read, z = run.normed(gone, layer), run.z(layer)
            for h in range(weights.n_heads):
                if (layer, h) in heads:
                    gone = gone + (z[h] - replaced(z[h], mode)) @ W_O[h]
                elif effect == "total":
                    gone = gone + run.pattern(layer)[:, h] @ (read @ W_V[h]) @ W_O[h]
        streams.append(run.final - gone)
    return streams


@pytest.mark.parametrize("final_norm", ["frozen", "recomputed"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("norm", NORMS)
def test_heads(norm, mode, final_norm):
    weights = model(norm=norm)
    run, plain = fc.trace(weights, TOKENS), fc.trace(weights, TOKENS)
    sets = [{(layer, h)} for layer in range(3) for h in range(2)]
    for effect in ("total", "direct"):
        expected = losses(plain, without_heads(plain, sets, mode, effect), final_norm)
        found = fc.head_ablation(run, mode, effect=effect, final_norm=final_norm)
        assert_alike(found.values, expected.view(3, 2), weights)
    joint = fc.pair_ablation(run, "joint", mode, final_norm=final_norm)
    streams = without_heads(plain, [set(pair) for pair in joint.labels], mode, "total")
    assert_alike(joint.values, losses(plain, streams, final_norm), weights)


def path_write(run, path):
    """What a path writes to the final residual stream, head by head."""
    weights, written = run.weights, None
    for layer, h in path:
        read = run.normed(run.non_head_stream(layer) if written is None else written, layer)
        written = run.pattern(layer)[:, h] @ (read @ weights.head("W_V", layer, h)) @ weights.head("W_O", layer, h)
    return run.non_head_stream(weights.n_layers) if written is None else written


@pytest.mark.parametrize("final_norm", ["frozen", "recomputed"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("norm", NORMS)
def test_paths(norm, mode, final_norm):
    weights = model(norm=norm)
    run, plain = fc.trace(weights, TOKENS), fc.trace(weights, TOKENS)
    paths = [path for order in range(4) for path in fc.enumerate_paths(3, 2, order)][::3]
    assert paths[0] == ()
    sets = [*((path,) for path in paths), (paths[1], paths[3])]
    expected = []
    for some in sets:
        gone = sum(x - replaced(x, mode) for x in (path_write(plain, path) for path in some))
        biased = mode != "zero" or () not in some
        expected += losses(plain, [plain.final - gone], final_norm, biased)
    found = fc.path_ablation(run, [*paths, list(sets[-1])], mode, final_norm=final_norm)
    assert_alike(found.values, torch.stack(expected), weights)
    pairs = fc.pair_ablation(run, "path", mode, final_norm=final_norm)
    expected = [path_write(plain, pair) for pair in pairs.labels]
    expected = losses(plain, [plain.final - x + replaced(x, mode) for x in expected], final_norm)
    assert_alike(pairs.values, expected, weights)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("scope", ["direct", "edge"])
def test_edges(scope, mode):
    weights = model(norm="layernorm")
    run, plain = fc.trace(weights, TOKENS), fc.trace(weights, TOKENS)
    found = fc.pair_ablation(run, scope, mode)
    streams = []
    for (layer, h), (to, g) in found.labels:
        z = plain.z(layer)[h]
        gone = (z - replaced(z, mode)) @ weights.head("W_O", layer, h)
        gone = plain.pattern(to)[:, g] @ (plain.normed(gone, to) @ weights.head("W_V", to, g))
        gone = gone @ weights.head("W_O", to, g)
        for behind in range(to + 1, 3 if scope == "edge" else 0):
            gone = gone + plain.attend(gone, behind)
        streams.append(plain.final - gone)
    assert_alike(found.values, losses(plain, streams, "frozen"), weights)


def test_a_run_without_gradients_holds_attention():
    """Then what is left of the paths moves, and W_Q and W_K do not."""
    weights = model(norm="rmsnorm")
    with torch.no_grad():
        run = fc.trace(weights, TOKENS)
    paths = [path for order in range(4) for path in fc.enumerate_paths(3, 2, order)]
    writes = [path_write(run, path) for path in paths]
    expected = losses(run, [sum(writes) - writes[i] for i in (3, 9)], "frozen")
    assert_alike(fc.path_ablation(run, [paths[3], paths[9]]).values, expected, weights)
    assert not gradients(expected, weights)["W_Q"].any()


def test_positions_targets_and_padding():
    weights, tokens = model(norm="layernorm"), random_tokens(3, 7, 11)
    mask = torch.ones(3, 7).long()
    mask[0, :3], mask[2] = 0, torch.tensor([1, 1, 0, 0, 0, 0, 0])
    run = fc.trace(weights, tokens, mask)
    for options in ({}, {"positions": [2, -2]}, {"targets": 5, "positions": -1}):
        with torch.no_grad():
            expected = fc.head_ablation(run, per_token=True, **options)
        found = fc.head_ablation(run, per_token=True, **options)
        torch.testing.assert_close(found.values, expected.values, equal_nan=True)
        torch.testing.assert_close(found.baseline, expected.baseline, equal_nan=True)
        mean = fc.head_ablation(run, **options)
        torch.testing.assert_close(found.values.flatten(2).nanmean(-1), mean.values)
        means = found.values.flatten(2).nan_to_num().sum(-1) / found.baseline.isfinite().sum()
        assert_alike(means, mean.values, weights)


def test_a_logit_cap_and_the_parameters_of_the_final_norm():
    weights = replace(model(norm="layernorm"), logit_cap=2.0, ln_final_w=torch.rand(6).double().requires_grad_())
    weights = replace(weights, ln_final_b=torch.rand(6).double().requires_grad_())
    run = fc.trace(weights, TOKENS)
    logits = [run.unembed(run.final) - fc.path_logits(run, path) for path in ((), ((0, 1), (2, 0)))]
    expected = torch.stack([naive.loss(2 * (x / 2).tanh(), TOKENS) for x in logits])
    assert_alike(fc.path_ablation(run, [(), ((0, 1), (2, 0))]).values, expected, weights)


def test_gradcheck():
    weights = random_weights(2, 2, 1, 6, 2, 11, norm="layernorm")
    names = ("W_E", "W_Q", "W_V", "W_O", "W_U", "b_V", "b_U")

    def function(*tensors):
        run = fc.trace(replace(weights, **dict(zip(names, tensors, strict=True))), TOKENS)
        return fc.head_ablation(run, "mean").delta, fc.pair_ablation(run).values, fc.pair_ablation(run).baseline

    tensors = [getattr(weights, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_cutting_changes_nothing(mode, monkeypatch):
    weights, tokens = model(layers=2), random_tokens(5, 6, 11)
    calls = {
        "head": lambda run: fc.head_ablation(run, mode).values,
        "pair": lambda run: fc.pair_ablation(run, "path", mode, per_token=True).values,
        "joint": lambda run: fc.pair_ablation(run, "joint", mode).values,
    }
    whole = {name: call(fc.trace(weights, tokens)) for name, call in calls.items()}
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1 << 9)
    monkeypatch.setattr(memory, "ROWS", 12)
    for name, call in calls.items():
        assert_alike(call(fc.trace(weights, tokens)), whole[name], weights)


CALLS = {
    "path_ablation": lambda run, **o: fc.path_ablation(run, [(), ((0, 1),), ((0, 0), (1, 1))], **o),
    "head_ablation": lambda run, **o: fc.head_ablation(run, **o),
    "layer_ablation": lambda run, **o: fc.layer_ablation(run, **o),
    "pair_ablation": lambda run, **o: fc.pair_ablation(run, "joint", **o),
}


@pytest.mark.parametrize("call", CALLS)
def test_values_are_those_without_gradients(call):
    weights = model(layers=2, norm="layernorm")
    weights = replace(weights, **{name: x.detach().float().requires_grad_() for name, x in weights.tensors()})
    run, done = fc.trace(weights, TOKENS), []
    with torch.no_grad():
        expected = CALLS[call](run)
    found = CALLS[call](run, progress=done.append)
    for ours, theirs in ((found.values, expected.values), (found.baseline, expected.baseline)):
        assert ours.requires_grad
        assert not theirs.requires_grad
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    assert sum(done) == pytest.approx(len(found.labels))
    assert [label for label, _ in found.top(2)] == [label for label, _ in expected.top(2)]
    assert repr(found)
    assert found.table().num_rows == expected.table().num_rows


@pytest.mark.parametrize("call", CALLS)
def test_what_has_no_gradients_says_so(call):
    run = fc.trace(model(layers=2), TOKENS)
    for options in ({"metric": "kl"}, {"metric": "rank"}, {"metric": "logit_difference", "against": 3}):
        assert not CALLS[call](run, **options).values.requires_grad
    if call != "path_ablation":
        assert not fc.head_ablation(run, attention="recomputed").delta.requires_grad
    both = CALLS[call](run, kl=True)
    assert both.values.requires_grad
    assert not both.kl.requires_grad
    torch.testing.assert_close(both.kl, CALLS[call](run, metric="kl").values)
    with torch.inference_mode():
        assert not CALLS[call](run).values.requires_grad
    assert not fc.sweep(run.weights, TOKENS).result.values.requires_grad


def test_weights_changed_before_the_backward_pass_are_noticed():
    weights = model(layers=2)
    for call in CALLS.values():
        values = call(fc.trace(weights, TOKENS)).values
        with torch.no_grad():
            weights.W_O.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place"):
            values.sum().backward()


def test_backward_in_the_callers_modes():
    weights = model(layers=2)
    expected = gradients(fc.head_ablation(fc.trace(weights, TOKENS)).values.flatten(), weights)
    values = fc.head_ablation(fc.trace(weights, TOKENS)).values.sum()
    plain = torch.autograd.grad(fc.head_ablation(fc.trace(weights, TOKENS)).values.sum(), weights.W_O)[0]
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(values, weights.W_O)[0]
    assert torch.equal(found, plain)
    assert expected["W_O"].dtype == found.dtype


def test_within_a_checkpoint_of_the_callers():
    """What a trace keeps is found, and not made, when the checkpoint calls again."""
    weights = model(layers=2)
    for call in (lambda run: run.z(1).square().sum(), lambda run: run.loss, lambda run: fc.head_ablation(run).delta):
        run = fc.trace(weights, TOKENS)
        found = torch.utils.checkpoint.checkpoint(call, run, use_reentrant=False)
        assert_alike(found, call(fc.trace(weights, TOKENS)), weights)
