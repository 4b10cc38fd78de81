"""Whether tables tell the truth, told by counting in plain loops."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.adapters.texts import TokenText, corpus_tokens, held_out_text, sequences_of
from pyfastcircuits.command import validation


@pytest.mark.parametrize("norm", [None, "rmsnorm"])
@pytest.mark.parametrize("positional", ["none", "shortformer", "rotary"])
@pytest.mark.parametrize("layers", [0, 1])
def test_logits_and_patterns_are_rebuilt_from_tables(layers, positional, norm):
    weights = random_weights(layers, norm=norm, positional=positional)
    assert max(validation.rebuilt_errors(weights, random_tokens(3, 10))) < 1e-12


def test_an_error_in_a_table_is_found(monkeypatch):
    weights, tokens = random_weights(1, norm="rmsnorm"), random_tokens(3, 10)
    real = validation.ov_circuit
    with monkeypatch.context() as patch:
        patch.setattr(validation, "ov_circuit", lambda w, head, normed: real(w, head))
        patterns, logits = validation.rebuilt_errors(weights, tokens)
        assert patterns < 1e-12
        assert logits > 0.1
    tables = validation.qk_tables
    monkeypatch.setattr(validation, "qk_tables", lambda w, head, normed, offset: tables(w, head, offset=offset))
    assert min(validation.rebuilt_errors(weights, tokens)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2, "norm": "rmsnorm"}, "the model has 2 layers"),
        ({"layers": 1, "norm": "layernorm"}, "norm 'layernorm'"),
        ({"layers": 1, "norm": None, "positional": "standard"}, "weights.positional is 'standard'"),
    ],
)
def test_models_that_tables_do_not_tell_all_of(options, message):
    weights = random_weights(**options)
    for function in (validation.rebuilt_errors, validation.bigram_fit):
        with pytest.raises(ValueError, match=message):
            function(weights, random_tokens(1, 5))


def test_bigrams_against_plain_counts():
    weights = random_weights(0, norm="rmsnorm", positional="none", vocabulary=12)
    tokens = torch.randint(0, 11, (600,), generator=torch.Generator().manual_seed(0))  # 11 never comes
    tokens[::3] = 4
    found = validation.bigram_fit(weights, tokens, least=5, examples=4, k=2)
    ids = tokens.tolist()
    pairs, before, after = Counter(pairwise(ids)), Counter(ids[:-1]), Counter(ids[1:])
    run = fc.trace(weights, torch.arange(12)).logits()[0].log_softmax(-1)  # no layer: each position by itself
    N = 599
    assert (found.bigrams, found.distinct) == (N, len(pairs))
    by_text = {(a, b): math.log(n / before[a]) for (a, b), n in pairs.items()}
    assert found.loss == pytest.approx(-sum(n * float(run[a, b]) for (a, b), n in pairs.items()) / N)
    assert found.entropy == pytest.approx(-sum(n * by_text[pair] for pair, n in pairs.items()) / N)
    assert found.unigram == pytest.approx(-sum(n * math.log(n / N) for n in after.values()) / N)
    assert found.divergence == pytest.approx(found.loss - found.entropy)
    often = [pair for pair, n in pairs.items() if n >= 5]
    values = torch.tensor([[by_text[pair] for pair in often], [float(run[pair]) for pair in often]])
    assert found.compared == len(often)
    assert found.correlation == pytest.approx(float(torch.corrcoef(values)[0, 1]), abs=1e-6)
    best = {a: sorted(((-n, b) for (x, b), n in pairs.items() if x == a))[:2] for a in before}
    likeliest = run.argmax(1).tolist()
    assert found.agreement == pytest.approx(sum(n for a, n in before.items() if best[a][0][1] == likeliest[a]) / N)
    assert found.sources[0] == 4
    assert found.seen.tolist() == sorted(before.values(), reverse=True)[:4]
    assert found.by_text.tolist() == [[b for _, b in best[a]] for a in found.sources.tolist()]
    assert torch.equal(found.by_table, run.topk(2).indices[found.sources])
    with pytest.raises(ValueError, match="has 0 bigrams that come 600 times: too short"):
        validation.bigram_fit(weights, tokens, least=600)


def plain_counts(rows, source, destination, output):
    out = [0, 0, 0, 0]
    for row in rows:
        for t in range(len(row) - 1):
            if row[t] == destination:
                hits = (True, row[t + 1] == output, source in row[:t], row[t + 1] == output and source in row[:t])
                out = [a + b for a, b in zip(out, hits, strict=True)]
    return tuple(out)


def test_skip_trigrams_against_plain_counts():
    tokens = torch.randint(0, 7, (40, 9), generator=torch.Generator().manual_seed(0))
    counts, rows = validation.TextCounts(tokens), tokens.tolist()
    for triple in [(1, 2, 3), (2, 2, 5), (0, 6, 6), (4, 4, 4), (1, 2, 99), (99, 1, 2), (1, 99, 2)]:
        assert tuple(counts(*triple)) == plain_counts(rows, *triple)
    seen = Counter(tokens.flatten().tolist())
    assert counts.frequent(50).tolist() == [token for token in range(7) if seen[token] >= 50]
    assert validation.Counts(100, 20, 50, 20).lift == 2
    assert math.isnan(validation.Counts(100, 0, 50, 0).lift)
    assert math.isnan(validation.Counts(100, 10, 0, 0).lift)
    assert [validation.Counts(500, f, t, 0).supported for f, t in ((20, 100), (19, 100), (20, 99))] == [
        True,
        False,
        False,
    ]


def test_lifts_of_a_head():
    """Seven tokens at random: no source helps, so that all lifts are near 1."""
    weights = random_weights(1, norm="rmsnorm", vocabulary=7)
    tokens = torch.randint(0, 7, (600, 30), generator=torch.Generator().manual_seed(0))
    counts = validation.TextCounts(tokens)
    found = validation.head_fit(weights, (0, 2), counts, torch.arange(7), 5)
    expected = fc.skip_trigrams(weights, (0, 2), k=5, normed=True).top(5)
    assert [triple for triple, _ in found.triples] == expected
    assert [seen for _, seen in found.triples] == [counts(*triple[:3]) for triple in expected]
    assert len(found.lifts) == len(found.control) == 5
    assert all(0.8 < lift < 1.25 for lift in found.lifts + found.control)
    rows = tokens.clone()  # now 3 comes after 2 wherever 1 has been
    first = torch.where((rows == 1).any(1), (rows == 1).byte().argmax(1), 30)
    late = torch.arange(29) > first[:, None]
    rows[:, 1:][(rows[:, :-1] == 2) & late] = 3
    assert validation.TextCounts(rows)(1, 2, 3).lift > 1.1


def test_strength_of_a_pattern():
    weights = random_weights(1, norm="rmsnorm", positional="none")
    for tokens in ((3, 40, 90), (5, 5, 5), (60, 2, 8)):
        source, destination, output = tokens
        every = []
        for head in range(4):
            scores = fc.qk_tables(weights, (0, head), normed=True).token_token.AB
            attention = (scores - scores.mean(1, keepdim=True))[:, source]
            logits = fc.ov_circuit(weights, (0, head), normed=True).AB[source]
            logits = logits - logits.mean()
            ranks = ((attention > attention[destination]).sum(), (logits > logits[output]).sum())
            every.append((float(attention[destination]), int(ranks[0]), float(logits[output]), int(ranks[1])))
        found = validation.pattern_strength(weights, *tokens)
        assert found[1:] == pytest.approx(every[found.head[1]])
        shown = [a > 0 and x > 0 and rank < 40 for a, _, x, rank in every]
        assert found.shown == any(shown)
        if any(shown):
            best = max(a * x for (a, _, x, _), ok in zip(every, shown, strict=True) if ok)
            assert found.attention * found.logit == pytest.approx(best)


def test_the_bundled_bigram_model_knows_its_text():
    weights, text = fc.load_weights("bigram-0l"), TokenText("bigram-0l")
    found = validation.bigram_fit(weights, corpus_tokens(text, held_out=True))
    assert found.entropy < found.loss < found.unigram
    run = fc.trace(weights, sequences_of(text, held_out_text(), 128, 64))
    assert found.loss == pytest.approx(float(run.loss), abs=0.15)
    assert found.explained == pytest.approx((found.unigram - found.loss) / (found.unigram - found.entropy))
    assert found.agreement > 0.4
    assert validation.rebuilt_errors(weights, run.tokens[:4])[1] < 1e-12


def test_the_bundled_skip_trigram_model_shows_indentation():
    weights, text = fc.load_weights("skip-trigram-1l"), TokenText("skip-trigram-1l")
    tokens = sequences_of(text, held_out_text(), 128, 8)
    assert max(validation.rebuilt_errors(weights, tokens)) < 1e-12
    for word in (" else", " elif", " except"):
        strength = validation.pattern_strength(weights, *map(text.token, (" " * 15, " " * 11, word)))
        assert strength.shown
        assert (strength.attention_rank, strength.logit_rank < 3) == (0, True)
    assert not validation.pattern_strength(weights, *map(text.token, (" open", ",", " '"))).shown
