"""Attributions sum to what they take apart, and each is what its part, run by hand, adds."""

import pytest
import torch
from support import naive
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def embedded(w, tokens):
    return w.W_E[tokens] + (w.W_pos[: tokens.shape[1]] if w.positional == "standard" else 0)


def components(w, tokens):
    """By hand: what is added to the residual stream, in the order of layers."""
    clean, out = naive.Run(w, tokens), {"embed": embedded(w, tokens)}
    for layer in range(w.n_layers):
        out |= {((layer, h),): written for h, written in enumerate(clean.outputs[layer])}
        out["bias", layer] = w.b_O[layer].expand_as(out["embed"])
    return clean, out


def picked(logits, tokens):
    """Of the next token: [B, T - 1]."""
    return logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_components_sum_to_the_logit(layers, norm, positional):
    w, tokens = random_weights(layers, norm=norm, positional=positional), random_tokens()
    run = fc.trace(w, tokens)
    clean, parts = components(w, tokens)
    result = fc.direct_logit_attribution(run, per_token=True)
    assert result.labels == [*parts, "b_U"]
    exact(result.values.sum(0), picked(clean.logits, tokens))
    for ours, part in zip(result.values, parts.values(), strict=False):
        exact(ours, picked(naive.norm(part, w, clean.scales[-1])[0] @ w.W_U, tokens))
    exact(result.values[-1], picked(w.b_U.expand_as(clean.logits), tokens))
    heads, sources = (fc.direct_logit_attribution(run, by) for by in ("head", "source"))
    assert heads.values.shape == (layers, 4)
    exact(heads.values.sum() + sources.values.sum(), picked(clean.logits, tokens).mean())
    exact(fc.direct_logit_attribution(run).values, result.values.mean((1, 2)))
    paths = [path for order in range(layers + 1) for path in fc.enumerate_paths(layers, 4, order)]
    by_path = fc.direct_logit_attribution(run, "path", paths=paths[::-1], per_token=True)
    assert by_path.labels == paths[::-1]
    exact(by_path.values.sum(0), picked(clean.logits, tokens))
    for ours, path in list(zip(by_path.values, by_path.labels, strict=True))[::7]:
        exact(ours, picked(fc.path_logits(run, path), tokens))


def test_targets_against_positions_and_center():
    w, tokens = random_weights(2, norm="layernorm"), random_tokens()
    gain = 1 + torch.linspace(-0.5, 0.5, 20, dtype=torch.float64)
    w = fc.CircuitWeights(
        **dict(w.tensors()), norm="layernorm", positional="shortformer", ln_final_w=gain, ln_final_b=gain - 1
    )
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    run = fc.trace(w, tokens, mask)
    logits = run.logits()
    for by in ("component", "path"):
        how = {"paths": [path for k in range(3) for path in fc.enumerate_paths(2, 4, k)]} if by == "path" else {}
        last = fc.direct_logit_attribution(run, by, targets=torch.tensor([3, 5]), positions=[5, -1], **how)
        exact(last.values.sum(), (logits[0, 5, 3] + logits[0, 8, 3] + logits[1, 5, 5]) / 3)
        difference = fc.direct_logit_attribution(run, by, targets=7, against=2, positions=4, **how)
        exact(difference.values.sum(), (logits[:, 4, 7] - logits[:, 4, 2]).mean())
        assert difference.metric == "logit_difference"
        centered = fc.direct_logit_attribution(run, by, targets=7, positions=4, center=True, **how)
        exact(centered.values.sum(), (logits[:, 4, 7] - logits[:, 4].mean(-1)).mean())
        both = fc.direct_logit_attribution(run, by, targets=7, against=2, positions=4, center=True, **how)
        exact(both.values, difference.values)
    found = fc.direct_logit_attribution(run, targets=7, positions=[0, 7], per_token=True)
    assert found.values.shape == (12, 2, 8)
    assert found.baseline.shape == (2, 8)
    assert found.values.isfinite().sum() == 12 * 3
    exact(found.values[:, 0, 7].sum(), logits[0, 7, 7])
    best = fc.direct_logit_attribution(run, "head").top(1)[0]
    heads = fc.direct_logit_attribution(run, "head").values
    assert best[0] == (divmod(int(heads.abs().argmax()), 4),)


def test_a_cap_is_left_out():
    w, tokens = random_weights(2, norm="rmsnorm"), random_tokens()
    capped = fc.CircuitWeights(**dict(w.tensors()), norm="rmsnorm", positional="shortformer", logit_cap=3.0)
    exact(
        fc.direct_logit_attribution(fc.trace(capped, tokens)).values,
        fc.direct_logit_attribution(fc.trace(w, tokens)).values,
    )


def test_chunks_of_paths_change_nothing(monkeypatch):
    run = fc.trace(random_weights(3, norm="layernorm"), random_tokens())
    paths = [path for k in range(4) for path in fc.enumerate_paths(3, 4, k)]
    whole = fc.direct_logit_attribution(run, "path", paths=paths)
    monkeypatch.setattr("pyfastcircuits.run.memory.BLOCK_BYTES", 4000)
    exact(fc.direct_logit_attribution(run, "path", paths=paths).values, whole.values)


@pytest.mark.parametrize(("norm", "positional"), KINDS)
def test_projections_sum_to_the_streams_own(norm, positional):
    w, tokens = random_weights(2, norm=norm, positional=positional), random_tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    run = fc.trace(w, tokens, mask)
    clean, parts = components(w, tokens)
    one, several = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split([1, 2])
    for layer in range(3):
        mine = list(parts.items())[: 1 + 5 * layer]
        stream = sum(part for _, part in mine)
        result = fc.project(run, one[0], layer=layer)
        assert result.labels == [label for label, _ in mine]
        exact(result.values, torch.stack([(part[mask] @ one[0]).mean() for _, part in mine]))
        exact(result.values.sum(), (stream[mask] @ one[0]).mean())
    exact(stream, clean.final)
    exact(fc.project(run, one[0]).values, result.values)
    both = fc.project(run, several, per_token=True, positions=[0, 7, 8])
    assert both.values.shape == (11, 2, 2, 9)
    assert both.labels[3] == (((0, 0),), 1)
    exact(both.values[:, 1, 0, 7], torch.stack([part[0, 7] @ several[1] for part in parts.values()]))
    assert both.values.isfinite().sum() == 11 * 2 * 4


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("final_norm", ["recomputed", "frozen"])
def test_the_lens_reads_every_stream_as_if_it_were_the_end(norm, positional, final_norm):
    w, tokens = random_weights(3, norm=norm, positional=positional), random_tokens()
    clean, parts = components(w, tokens)
    streams = torch.stack(list(parts.values())).cumsum(0)[[0, 5, 10, 15]]
    run = fc.trace(w, tokens)
    result = fc.logit_lens(run, final_norm=final_norm, kl=True)
    scale = clean.scales[-1] if final_norm == "frozen" else None
    logits = [naive.norm(x, w, scale)[0] @ w.W_U + w.b_U for x in streams]
    exact(result.values, torch.stack([naive.loss(x, tokens) for x in logits]))
    assert list(result.labels) == [0, 1, 2, 3]
    exact(result.baseline, naive.loss(clean.logits, tokens))
    exact(result.values[3], result.baseline)
    p, q = clean.logits[:, :-1].log_softmax(-1), logits[1][:, :-1].log_softmax(-1)
    exact(result.kl[1], (p.exp() * (p - q)).sum(-1).mean())
    difference = fc.logit_lens(
        run, final_norm=final_norm, metric="logit_difference", targets=3, against=4, positions=8, per_token=True
    )
    exact(difference.values[..., 8], torch.stack([x[:, 8, 3] - x[:, 8, 4] for x in logits]))
    ranks = fc.logit_lens(run, final_norm=final_norm, metric="rank", targets=3, positions=8, per_token=True)
    exact(ranks.values[..., 8], torch.stack([(x[:, 8] > x[:, 8, 3:4]).sum(-1).double() for x in logits]))


def test_a_lens_on_no_layers_and_in_parts(monkeypatch):
    run = fc.trace(random_weights(0, norm="layernorm"), random_tokens())
    exact(fc.logit_lens(run).values, run.loss[None])
    run = fc.trace(random_weights(3, norm="layernorm"), random_tokens(5))
    whole = fc.logit_lens(run)
    monkeypatch.setattr("pyfastcircuits.run.memory.BLOCK_BYTES", 1 << 10)
    exact(fc.logit_lens(run, low_memory=True).values, whole.values)


def test_lower_precision_against_fp64():
    w, tokens = random_weights(2, norm="layernorm"), random_tokens(3, 20)
    exact_run, run = fc.trace(w, tokens), fc.trace(w.to(torch.float32), tokens)
    direction = torch.ones(20) / 20**0.5
    for function in (fc.direct_logit_attribution, fc.logit_lens, lambda r: fc.project(r, direction)):
        ours, truth = function(run), function(exact_run)
        assert ours.values.dtype == torch.float32
        torch.testing.assert_close(ours.values.double(), truth.values, rtol=1e-4, atol=1e-4)


one = torch.ones(20, dtype=torch.float64)
BAD = {
    "by": (lambda r: fc.direct_logit_attribution(r, "neuron"), ValueError, "by is 'neuron', expected one of component"),
    "no paths": (lambda r: fc.direct_logit_attribution(r, "path"), ValueError, "paths is missing, but by is 'path'"),
    "paths": (lambda r: fc.direct_logit_attribution(r, paths=[()]), ValueError, "paths is given, but by is 'component'"),
    "path": (lambda r: fc.direct_logit_attribution(r, "path", paths=[[(1, 0), (0, 0)]]), ValueError, "layers must increase"),
    "head": (lambda r: fc.direct_logit_attribution(r, "path", paths=[[(0, 4)]]), IndexError, "goes through head 0.4"),
    "target": (lambda r: fc.direct_logit_attribution(r, targets=97), IndexError, "targets is 97, expected 0 to 96"),
    "against": (lambda r: fc.direct_logit_attribution(r, against=-1), IndexError, "against is -1, expected 0 to 96"),
    "position": (lambda r: fc.direct_logit_attribution(r, positions=[9]), IndexError, "positions holds 9"),
    "last": (lambda r: fc.direct_logit_attribution(r, positions=8), ValueError, "has no next token: give targets"),
    "size": (lambda r: fc.project(r, one[:19]), ValueError, r"direction has shape \[19\], expected \[20\] or \[k, 20\]"),
    "list": (lambda r: fc.project(r, [1.0] * 20), TypeError, "direction is a list, expected a tensor"),
    "integers": (lambda r: fc.project(r, one.long()), TypeError, "direction is torch.int64"),
    "layer": (lambda r: fc.project(r, one, layer=3), IndexError, "layer is 3, expected 0 to 2"),
    "norm": (lambda r: fc.logit_lens(r, final_norm="none"), ValueError, "final_norm is 'none'"),
    "metric": (lambda r: fc.logit_lens(r, metric="accuracy"), ValueError, "metric is 'accuracy'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    function, error, message = BAD[what]
    with pytest.raises(error, match=message):
        function(fc.trace(random_weights(), random_tokens()))
