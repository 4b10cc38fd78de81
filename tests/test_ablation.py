"""Every ablation equals the plain rerun or the materialised difference it stands for."""

import pytest
import torch
from support import naive
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.run import memory


def divergence(clean, ablated):
    p, q = clean[:, :-1].log_softmax(-1), ablated[:, :-1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_path_ablation_is_the_logits_without_the_path(layers, norm, positional):
    w, tokens = random_weights(layers, norm=norm, positional=positional), random_tokens()
    run = fc.trace(w, tokens)
    paths = [path for k in range(layers + 1) for path in fc.enumerate_paths(layers, 4, k)][::-1]
    result = fc.path_ablation(run, paths, kl=True)
    logits = run.logits()
    without = [logits - fc.path_logits(run, path) for path in paths]
    torch.testing.assert_close(result.loss, torch.stack([naive.loss(x, tokens) for x in without]), rtol=1e-11, atol=0)
    torch.testing.assert_close(result.kl, torch.stack([divergence(logits, x) for x in without]), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(result.baseline, naive.loss(logits, tokens))
    torch.testing.assert_close(result.delta, result.loss - result.baseline)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_pairs_are_the_paths_of_two_heads(layers):
    w, tokens = random_weights(layers, norm="layernorm"), random_tokens()
    run = fc.trace(w, tokens)
    result = fc.pair_ablation(run, kl=True)
    paths = fc.enumerate_paths(layers, 4, 2)
    assert result.pairs.shape == (len(paths), 2, 2)
    assert [tuple(map(tuple, pair)) for pair in result.pairs.tolist()] == paths
    torch.testing.assert_close(result.loss, fc.path_ablation(run, paths).loss, rtol=1e-13, atol=0)
    assert result.loss.shape == result.kl.shape == (len(paths),)


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("layers", [1, 3])
def test_head_ablation_is_a_rerun_with_the_head_at_zero(layers, norm, positional):
    w, tokens = random_weights(layers, norm=norm, positional=positional), random_tokens()
    clean = naive.Run(w, tokens)
    result = fc.head_ablation(fc.trace(w, tokens), kl=True)
    for layer in range(layers):
        for h in range(4):
            rerun = naive.Run(w, tokens, clean, zero={(layer, h)})
            expected = naive.loss(rerun.logits, tokens)
            torch.testing.assert_close(result.loss[layer, h], expected, rtol=1e-11, atol=0)
            kl = divergence(clean.logits, rerun.logits)
            torch.testing.assert_close(result.kl[layer, h], kl, rtol=1e-8, atol=1e-12)


def test_no_heads_no_ablations():
    run = fc.trace(random_weights(0), random_tokens())
    assert fc.head_ablation(run).loss.shape == (0, 4)
    assert fc.path_ablation(run, []).loss.shape == (0,)


@pytest.mark.parametrize("low_memory", [False, True])
def test_cutting_changes_nothing(monkeypatch, low_memory):
    w, tokens = random_weights(3, norm="rmsnorm", vocabulary=1201), random_tokens(5, 9, 1201)
    run = fc.trace(w, tokens)
    paths = [(), *fc.enumerate_paths(3, 4, 1), *fc.enumerate_paths(3, 4, 2)[::5]]
    functions = {
        "paths": lambda **o: fc.path_ablation(run, paths, kl=True, **o),
        "heads": lambda **o: fc.head_ablation(run, kl=True, **o),
    }
    whole = {name: f() for name, f in functions.items()}
    orders, tokenwise = fc.order_losses(run), fc.path_ablation(run, paths, per_token=True, kl=True)
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(memory, "CLEAN_LOGITS_BYTES", 1 << 17)
    monkeypatch.setattr(memory, "ROWS", 16)
    for name, function in functions.items():
        cut = function(low_memory=low_memory)
        for field in ("loss", "kl", "baseline"):
            torch.testing.assert_close(getattr(cut, field), getattr(whole[name], field), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(fc.order_losses(run), orders, rtol=1e-12, atol=0)
    cut = fc.path_ablation(run, paths, per_token=True, kl=True, low_memory=low_memory)
    assert cut.loss.shape == (len(paths), 5, 8)
    assert cut.baseline.shape == (5, 8)
    for field in ("loss", "kl", "baseline"):
        torch.testing.assert_close(getattr(cut, field), getattr(tokenwise, field), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(cut.loss.mean((1, 2)), whole["paths"].loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_against_fp64(dtype):
    w, tokens = random_weights(2, norm="layernorm", dtype=dtype), random_tokens(3, 20)
    run, exact = fc.trace(w, tokens), fc.trace(w.to(torch.float64), tokens)
    for function in (fc.pair_ablation, fc.head_ablation):
        ours, truth = function(run), function(exact)
        assert ours.loss.dtype == torch.float32
        torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)


def test_progress_adds_up_to_the_number_of_ablations(monkeypatch):
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1 << 13)
    done = []
    result = fc.pair_ablation(fc.trace(random_weights(3), random_tokens(5)), progress=done.append)
    assert len(done) > 3
    assert sum(done) == pytest.approx(len(result.loss))


def test_top_is_sorted_and_stable():
    result = fc.pair_ablation(fc.trace(random_weights(3), random_tokens()))
    top = result.top(5)
    assert [rise for _, rise in top] == sorted(result.delta.tolist(), reverse=True)[:5]
    assert fc.enumerate_paths(3, 4, 2)[int(result.delta.argmax())] == top[0][0]
    heads = fc.head_ablation(fc.trace(random_weights(2), random_tokens()))
    layer, head = divmod(int(heads.delta.argmax()), 4)
    assert heads.top(1)[0][0] == ((layer, head),)
    with pytest.raises(ValueError, match="not of pairs"):
        _ = heads.pairs


def test_backends_agree():
    run = fc.trace(random_weights(2, dtype=torch.float32), random_tokens())
    ours, reference = (fc.pair_ablation(run, kl=True, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-6, atol=1e-6)


BAD = {
    "scope": (
        lambda run: fc.pair_ablation(run, scope="nowhere"),
        ValueError,
        "scope is 'nowhere', expected one of path, direct, edge, joint",
    ),
    "mode": (
        lambda run: fc.head_ablation(run, mode="noise"),
        ValueError,
        "mode is 'noise', expected one of zero, mean, resample",
    ),
    "attention": (
        lambda run: fc.head_ablation(run, attention="x"),
        ValueError,
        "attention is 'x', expected one of frozen, recomputed",
    ),
    "backend": (lambda run: fc.pair_ablation(run, backend="tpu"), ValueError, "backend is 'tpu'"),
    "cuda": (lambda run: fc.pair_ablation(run, backend="cuda"), (RuntimeError, ValueError), "backend='cuda'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_named(what):
    function, error, message = BAD[what]
    with pytest.raises(error, match=message):
        function(fc.trace(random_weights(), random_tokens()))
