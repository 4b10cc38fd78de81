"""Scores of heads, against loops over every entry of the patterns and over every token; and what they find."""

import math
import weakref

import pytest
import torch
from support import naive
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments import heads
from pyfastcircuits.result import Result

NAMES = ("previous_token", "induction", "prefix_matching", "duplicate_token", "copying")


def loops(w: fc.CircuitWeights, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The five scores by their definitions."""
    run, kv = naive.Run(w, tokens), w.n_heads // w.W_K.shape[1]
    out = {name: torch.full((w.n_layers, w.n_heads), math.nan, dtype=torch.float64) for name in NAMES}
    stream = w.W_E[tokens] + (w.W_pos[: tokens.shape[1]] if w.positional == "standard" else 0)
    for layer in range(w.n_layers):
        read, _ = naive.norm(stream, w)
        for h in range(w.n_heads):
            taken, own, every = {name: [] for name in NAMES[:4]}, 0.0, 0.0
            for b, row in enumerate(tokens.tolist()):
                pattern, different = run.patterns[layer][b, h], sorted(set(row))
                for t, token in enumerate(row):
                    earlier = [s for s in range(t) if row[s] == token]
                    if t:
                        taken["previous_token"].append(pattern[t, t - 1])
                    if len(earlier) == 1:
                        taken["induction"].append(pattern[t, earlier[0] + 1])
                    if earlier:
                        taken["prefix_matching"].append(sum(pattern[t, s + 1] for s in earlier))
                        taken["duplicate_token"].append(sum(pattern[t, s] for s in earlier))
                    for s in range(t + 1):
                        written = read[b, s] @ w.W_V[layer, h // kv] @ w.W_O[layer, h]
                        written, _ = naive.norm(written, w, run.scales[-1][b, t])
                        raised = written @ w.W_U[:, different]
                        raised = (raised - raised.mean()).relu() * pattern[t, s]
                        own += raised[different.index(row[s])]
                        every += raised.sum()
            for name, values in taken.items():
                if values:
                    out[name][layer, h] = torch.stack(values).mean()
            out["copying"][layer, h] = 2 * own / every - 1
        stream = stream + run.outputs[layer].sum(0) + (0 if w.b_O is None else w.b_O[layer])
    return out


@pytest.mark.parametrize(
    ("norm", "positional", "biases"),
    [
        (None, "none", False),
        ("layernorm", "standard", True),
        ("rmsnorm", "rotary", True),
        ("rmsnorm", "shortformer", True),
    ],
)
def test_scores_are_their_definitions(norm, positional, biases):
    w = random_weights(2, heads=2, kv=1, norm=norm, positional=positional, biases=biases)
    tokens = random_tokens(3, 10, vocabulary=6)  # tokens come up to five times, some in a row
    scores, expected = fc.head_scores(w, tokens=tokens, batch=2), loops(w, tokens)
    assert scores.metric == "induction"
    assert set(scores.measured) == set(NAMES)
    for name in NAMES:
        torch.testing.assert_close(getattr(scores, name), expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_tokens_that_are_drawn(monkeypatch):
    w, seen = random_weights(1, vocabulary=12), []
    monkeypatch.setattr(
        heads, "trace", lambda model, tokens, **more: seen.append(tokens) or fc.trace(model, tokens, **more)
    )
    scores = fc.head_scores(w, length=9, copies=3, batch=5, batches=2, start=4)
    assert [list(tokens.shape) for tokens in seen] == [[5, 28], [5, 28]]
    tokens = torch.cat(seen)
    assert bool((tokens[:, 0] == 4).all())
    for row in tokens[:, 1:]:
        assert len(set(row[:9].tolist())) == 9
        assert 4 not in row
        assert torch.equal(row, row[:9].repeat(3))
    assert len({tuple(row) for row in tokens.tolist()}) == 10
    whole = fc.head_scores(w, tokens=tokens, batch=10)
    for name in NAMES:  # a mean over all sequences, however they are cut
        torch.testing.assert_close(getattr(scores, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
    assert scores.setup == {"length": 9, "copies": 3, "seed": 0, "start": 4, "sequences": 10}
    fc.head_scores(w, length=11, batches=1)  # all that there are but the start
    assert sorted(seen[-1][0, 1:12].tolist()) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    fc.head_scores(w, length=13, batches=1)  # more than there are: some come twice
    assert seen[-1].shape == (8, 27)


def test_the_seed_decides():
    w = random_weights()
    first, again, other = (fc.head_scores(w, length=5, batches=1, seed=seed) for seed in (3, 3, 4))
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_later_copies_change_no_induction_score():
    """A second copy does not see the third, so that only the prefix matching score has more sources there."""
    w = random_weights()
    tokens = torch.cat(
        (torch.zeros(4, 1, dtype=torch.long), torch.stack([torch.randperm(90)[:7] + 1 for _ in range(4)])), 1
    )
    two, three = (fc.head_scores(w, tokens=torch.cat((tokens, *[tokens[:, 1:]] * n), 1)) for n in (1, 2))
    torch.testing.assert_close(three.induction, two.induction)
    torch.testing.assert_close(two.prefix_matching, two.induction)
    assert bool((three.prefix_matching > three.induction).any())
    pattern = torch.stack([fc.trace(w, torch.cat((tokens, tokens[:, 1:]), 1)).pattern(layer) for layer in range(2)])
    diagonal = pattern.diagonal(1 - 7, -2, -1)[..., 2:]  # the second copy's: none of its sources is before the first
    torch.testing.assert_close(two.induction, diagonal.mean((1, 3)))


def test_runs_are_dropped_one_by_one(monkeypatch):
    alive = []

    def tracked(model, tokens, **more):
        assert all(run() is None for run in alive)
        run = fc.trace(model, tokens)
        alive.append(weakref.ref(run))
        return run

    monkeypatch.setattr(heads, "trace", tracked)
    fc.head_scores(random_weights(), length=5, batch=2, batches=3)
    assert len(alive) == 3


def hand_made(vocabulary: int = 11, positions: int = 24) -> fc.CircuitWeights:
    """0.0 attends to the position before and copies its token elsewhere; 0.1 attends to its token; 1.0 finds its
    token among those copies, and copies what stands there to the logits; 1.1 is nothing.
    """
    d = 2 * vocabulary + positions
    token, copy, place = (
        torch.eye(d, dtype=torch.float64)[:, i : i + n]
        for i, n in ((0, vocabulary), (vocabulary, vocabulary), (2 * vocabulary, positions))
    )
    W_Q, W_K, W_V = (torch.zeros(2, 2, d, positions, dtype=torch.float64) for _ in range(3))
    W_O = torch.zeros(2, 2, positions, d, dtype=torch.float64)
    W_Q[0, 0, :, :-1], W_K[0, 0, :, :-1] = 1e4 * place[:, 1:], place[:, :-1]
    W_Q[0, 1, :, :vocabulary], W_K[0, 1, :, :vocabulary] = 1e4 * token, token
    W_Q[1, 0, :, :vocabulary], W_K[1, 0, :, :vocabulary] = 1e4 * token, copy
    W_V[0, 0, :, :vocabulary], W_O[0, 0, :vocabulary] = token, copy.T
    W_V[1, 0, :, :vocabulary], W_O[1, 0, :vocabulary] = token, token.T
    return fc.CircuitWeights(token.T, W_Q, W_K, W_V, W_O, token, place.T, positional="standard")


def test_heads_that_are_known():
    scores = fc.head_scores(hand_made(), length=8, batch=3, batches=2)
    even = torch.arange(1, 17).add(1).reciprocal()  # of position t, to each of the t + 1 that it sees
    one, even_second = torch.ones(()).double(), even[8:].double().mean()
    assert scores.previous_token[0, 0] == one
    assert scores.induction[1, 0] == one
    assert scores.prefix_matching[1, 0] == one
    assert scores.copying[1, 0] == one
    assert scores.duplicate_token[0, 1] == 0.5  # and 0.5 to itself
    assert scores.induction[0, 0] == 0
    torch.testing.assert_close(scores.induction[1, 1], even_second)
    torch.testing.assert_close(scores.previous_token[1, 1], even.double().mean())
    assert bool(scores.copying[0].isnan()[1])  # raises nothing
    assert scores.top(1) == [(((1, 0),), 1.0)]
    with pytest.warns(UserWarning, match="the QK matrix of head 1.1 is zero"):
        found = fc.induction_heads(hand_made(), scores)
    assert found.labels == [((0, 0), (1, 0)), ((0, 0), (1, 1))]
    assert found.top(1) == [(((0, 0), (1, 0)), 1.0)]
    assert found.matching.tolist() == [1, 0]
    assert found.copying.tolist() == [1, 0]
    assert found.k_composition[0] > 5


def test_text_that_repeats_nothing():
    scores = fc.head_scores(random_weights(), tokens=torch.arange(9))
    assert not scores.previous_token.isnan().any()
    assert not scores.copying.isnan().any()
    for name in ("induction", "prefix_matching", "duplicate_token"):
        assert bool(getattr(scores, name).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    w = random_weights(norm="rmsnorm", dtype=dtype)
    ours, exact = (fc.head_scores(x, length=6) for x in (w, w.to(torch.float64)))
    for name in NAMES:
        assert getattr(ours, name).dtype == torch.float32
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-6)


def test_no_layers():
    scores = fc.head_scores(random_weights(0, heads=3, kv=1), length=5, batches=1)
    assert all(getattr(scores, name).shape == (0, 3) for name in NAMES)
    assert scores.labels == []


def test_bad_input():
    w = random_weights()
    for options, error, message in (
        ({"length": 1}, ValueError, "length is 1, expected at least 2"),
        ({"copies": 1}, ValueError, "copies is 1, expected at least 2"),
        ({"batch": 0}, ValueError, "batch is 0, expected at least 1"),
        ({"batches": 0}, ValueError, "batches is 0, expected at least 1"),
        ({"length": 16}, ValueError, "length is 16, 2 copies and the token in front are 33, but W_pos has only 32"),
        ({"start": 97}, IndexError, "start is 97, expected 0 to 96"),
        ({"tokens": [1, 2]}, TypeError, "tokens is a list, expected a tensor"),
        ({"tokens": torch.tensor([1, 97])}, IndexError, "is 97"),
        ({"tokens": torch.zeros(40, dtype=torch.long)}, ValueError, "tokens has 40 positions, but W_pos has only 32"),
    ):
        with pytest.raises(error, match=message):
            fc.head_scores(w, **options)
    with pytest.raises(TypeError, match="is a FrozenTrace, expected CircuitWeights"):
        fc.head_scores(fc.trace(w, random_tokens()))
    with pytest.raises(ValueError, match="the model has 1 layers"):
        fc.induction_heads(random_weights(1))
    scores = fc.head_scores(random_weights(3), length=5)
    with pytest.raises(ValueError, match=r"scores are induction of shape \[3, 4\], .* of shape \[2, 4\]"):
        fc.induction_heads(w, scores)
    with pytest.raises(ValueError, match="scores are nll of shape"):
        fc.induction_heads(w, Result([], torch.zeros(2, 4), torch.zeros(()), "nll"))


@pytest.mark.parametrize("norm", [None, "layernorm"])
def test_evidence_of_the_weights(norm):
    w = random_weights(3, norm=norm, biases=False)
    scores = fc.head_scores(w, length=6)
    found = fc.induction_heads(w, scores)
    centred = fc.center(w) if norm else w
    z, copying = fc.composition_z_scores(centred, "K"), fc.copying_scores(centred)
    assert [destination for _, destination in found.labels] == [(layer, head) for layer in (1, 2) for head in range(4)]
    for i, ((a, b), (c, d)) in enumerate(found.labels):
        assert scores.previous_token[a, b] == scores.previous_token[:c].max()
        assert found.previous_token[i] == scores.previous_token[a, b]
        assert found.values[i] == scores.induction[c, d]
        torch.testing.assert_close(found.k_composition[i], z[a, b, c, d])
        whole = fc.composed_qk_circuit(centred, (a, b), (c, d)).AB
        eigenvalues = torch.linalg.eigvals(whole)
        torch.testing.assert_close(
            found.matching[i], eigenvalues.real.sum() / eigenvalues.abs().sum(), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(found.copying[i], copying[c, d])


def test_behaviour_and_weights_agree_on_the_bundled_model():
    w = fc.load_weights("induction-2l")
    scores = fc.head_scores(w, batch=16, batches=1)
    found = fc.induction_heads(w, scores)
    assert float(scores.induction[0].max()) < 0.05 < 0.4 < float(scores.previous_token[0].max())
    strong = found.values > 0.6
    assert int(strong.sum()) >= 4
    assert bool((found.matching[strong] > 0.9).all())
    assert bool((found.copying[strong] > 0.9).all())
    assert bool((found.k_composition[strong] > 5).all())
    assert int(found.k_composition.argmax()) == int(found.values.argmax())
    assert int(found.k_composition.argmin()) == int(found.values.argmin())
    ranks = torch.stack([x.argsort().argsort().double() for x in (found.values, found.k_composition)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7
    other = int(scores.previous_token[0].argmin())  # composes with no induction head as the previous-token head does
    best = found.labels[int(found.values.argmax())]
    z = fc.composition_z_scores(w, "K")
    assert float(z[(0, other, *best[1])]) < 0.2 * float(found.k_composition.max())
    assert bool((scores.copying[1][strong] > scores.copying[0].max()).all())
