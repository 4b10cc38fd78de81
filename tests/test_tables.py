"""Tables against the materialised [V, V] matrices, in fp64."""

import itertools

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.circuits import tables

WEIGHTS = random_weights(layers=3, norm="rmsnorm", positional="none")
HEADS = [(0, 0), (1, 3), (2, 2)]
CIRCUIT = fc.ov_circuit(WEIGHTS, (1, 3))


def shifted(full, row_weights, normalize):
    """row_weight * (entry - shift), as documented."""
    if normalize == "center":
        full = full - full.mean(1, keepdim=True)
    elif normalize == "log_softmax":
        full = full.log_softmax(1)
    return full if row_weights is None else row_weights[:, None] * full


def best(values, k, largest=True):
    return values.flatten().sort(descending=largest, stable=True).values[:k]


ROWS, COLUMNS = torch.tensor([40, 3, 96, 17]), [5, 90, 4]
SEARCHES = list(itertools.product((None, "center", "log_softmax"), (None, ROWS), (None, COLUMNS), (False, True)))


@pytest.mark.parametrize(("normalize", "rows", "columns", "weighted"), SEARCHES)
def test_top_entries(normalize, rows, columns, weighted):
    weights = torch.randn(97, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    full = shifted(CIRCUIT.AB, weights, normalize)
    part = full if rows is None else full[rows]
    part = part if columns is None else part[:, columns]
    options = {"rows": rows, "columns": columns, "row_weights": weights, "normalize": normalize}
    for largest in (True, False):
        found = fc.top_entries(CIRCUIT, 7, largest, **options)
        torch.testing.assert_close(found.values, best(part, 7, largest))
        torch.testing.assert_close(full[found.rows, found.columns], found.values)
        each = fc.top_per_row(CIRCUIT, 3, rows, largest=largest, **{k: v for k, v in options.items() if k != "rows"})
        torch.testing.assert_close(each.values, part.sort(1, descending=largest).values[:, :3])
        assert torch.equal(each.rows[:, 0], torch.arange(97) if rows is None else rows)
        torch.testing.assert_close(full[each.rows, each.columns], each.values)
    for names, chosen in ((found.rows, rows), (found.columns, columns)):
        assert chosen is None or set(names.tolist()) <= set(torch.as_tensor(chosen).tolist())


def test_log_probabilities_of_a_zero_layer_model_are_its_own():
    weights = random_weights(0, norm="layernorm", biases=False)
    tokens = random_tokens(1, 30)
    logits = fc.trace(weights, tokens).logits()[0].log_softmax(-1)
    found = fc.top_per_row(fc.bigrams(weights, normed=True), 4, tokens[0], normalize="log_softmax")
    torch.testing.assert_close(found.values, logits.topk(4).values)
    assert torch.equal(found.columns, logits.topk(4).indices)
    assert torch.equal(found.rows, tokens[0][:, None].expand(-1, 4))  # some come twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    narrow = CIRCUIT.to(dtype)
    full = narrow.A.float() @ narrow.B.float()
    found = fc.top_entries(narrow, 5, normalize="center")
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, best(full - full.mean(1, keepdim=True), 5), rtol=1e-4, atol=1e-4)
    mixed = fc.FactoredMatrix(CIRCUIT.A, CIRCUIT.B.to(dtype))
    assert fc.top_per_row(mixed, 2).values.dtype == torch.float64


def test_diagonal_ranks():
    full = CIRCUIT.AB
    expected = (full > full.diagonal()[:, None]).sum(1)
    assert torch.equal(fc.diagonal_ranks(CIRCUIT), expected)
    assert torch.equal(fc.diagonal_ranks(CIRCUIT, rows=[96, 0, 96]), expected[[96, 0, 96]])


@pytest.mark.parametrize("heads", [None, HEADS])
def test_copying_accuracy(heads):
    done = []
    found = fc.copying_accuracy(WEIGHTS, heads, progress=done.append)
    wanted = list(itertools.product(range(3), range(4))) if heads is None else heads
    assert found.top1.shape == ((3, 4) if heads is None else (3,))
    assert sum(done) == len(wanted)
    for i, head in enumerate(wanted):
        full = fc.ov_circuit(WEIGHTS, head).AB
        own = full.argsort(1, descending=True) == torch.arange(97)[:, None]
        expected = (own[:, 0], own[:, :5].any(1), full.diagonal() > 0)
        for share, hits in zip(found, expected, strict=True):
            torch.testing.assert_close(share.flatten()[i], hits.double().mean())


def test_copying_accuracy_of_a_head_that_copies():
    g = torch.Generator().manual_seed(0)
    W_E = torch.nn.functional.normalize(torch.randn(50, 16, generator=g).double())
    eye, zero = torch.eye(16).double(), torch.zeros(1, 2, 16, 16).double()
    W_O = torch.stack((eye, -eye))[None]
    weights = fc.CircuitWeights(W_E, zero, zero, eye.expand(1, 2, 16, 16), W_O, W_E.mT.clone())
    assert [x[0].tolist() for x in fc.copying_accuracy(weights)] == [[1, 0]] * 3


def dense_skip_trigrams(weights, head, normed):
    """Attention to sources less the mean over sources [source, destination], and outputs less their mean."""
    layer, index = head
    x = weights.W_E
    if normed:
        x = x * (x.square().mean(1, keepdim=True) + weights.eps).rsqrt()
    q = x @ weights.W_Q[layer, index] + weights.b_Q[layer, index]
    scores = (q @ (x @ weights.W_K[layer, index // 2]).mT / weights.d_head**0.5).mT
    logits = x @ weights.W_V[layer, index // 2] @ weights.W_O[layer, index] @ weights.W_U
    return scores - scores.mean(0), logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_skip_trigrams(head, normed):
    attention, logits = dense_skip_trigrams(WEIGHTS, head, normed)
    sources = [3, 50, 3]
    found = fc.skip_trigrams(WEIGHTS, head, sources, 6, normed=normed)
    for values, tokens, full in (
        (found.attention, found.destinations, attention),
        (found.logits, found.outputs, logits),
    ):
        expected = full[sources].topk(6)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(tokens, expected.indices)
    some = fc.skip_trigrams(WEIGHTS, head, torch.tensor([8]), 2, among=[1, 30, 60], normed=normed)
    torch.testing.assert_close(some.attention[0], attention[8, [1, 30, 60]].topk(2).values)
    assert set(some.outputs.flatten().tolist()) <= {1, 30, 60}


@pytest.mark.parametrize("head", HEADS)
def test_largest_triples_are_those_of_all(head):
    attention, logits = dense_skip_trigrams(WEIGHTS, head, False)
    products = attention.clamp_min(0)[:, :, None] * logits.clamp_min(0)[:, None, :]  # [V, V, V]
    expected = products.flatten().topk(9)
    found = fc.skip_trigrams(WEIGHTS, head, k=9).top(9)
    torch.testing.assert_close(torch.tensor([t.score for t in found]).double(), expected.values, rtol=1e-6, atol=1e-6)
    places = [(t.source * 97 + t.destination) * 97 + t.output for t in found]
    assert places == expected.indices.tolist()
    assert [(t.source, t.score) for t in fc.skip_trigrams(WEIGHTS, head, k=9).top(4)] == [
        (t.source, t.score) for t in found[:4]
    ]
    assert fc.skip_trigrams(WEIGHTS, head, k=9).top(0) == []


def test_triples_of_which_none_is_positive():
    zero = torch.zeros_like(WEIGHTS.W_Q)
    weights = fc.CircuitWeights(WEIGHTS.W_E, zero, WEIGHTS.W_K, WEIGHTS.W_V, WEIGHTS.W_O, WEIGHTS.W_U)
    assert fc.skip_trigrams(weights, (0, 0), k=3).top(3) == []


def test_skip_trigrams_as_a_table_and_as_text():
    found = fc.skip_trigrams(WEIGHTS, (1, 3), [5, 6], 2, text=lambda ids: f"<{ids[0]}>")
    rows = found.table().to_pylist()
    assert [(r["source"], r["rank"]) for r in rows] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    for row, destination, logit in zip(rows, found.destinations.flatten(), found.logits.flatten(), strict=True):
        assert (row["layer"], row["head"], row["source_text"]) == (1, 3, f"<{row['source']}>")
        assert (row["destination"], row["destination_text"]) == (int(destination), f"<{int(destination)}>")
        assert row["logit"] == float(logit)
    first = str(found).splitlines()[1]
    assert first.startswith("'<5>' | ")
    assert f"'<{int(found.outputs[0, 1])}>' {float(found.logits[0, 1]):+.2f}" in first
    padded = fc.skip_trigrams(WEIGHTS, (1, 3), [5, 6], 2, text=lambda ids: "a" if ids[0] == 5 else "")
    assert [line.partition(" | ")[0] for line in str(padded).splitlines()[1:]] == ["'a'", "<id 6>"]
    assert {row["source_text"] for row in padded.table().to_pylist()} == {"a", "<id 6>"}
    plain = fc.skip_trigrams(WEIGHTS, (1, 3), [5], 2)
    assert "source_text" not in plain.table().column_names
    assert str(plain).splitlines()[1].startswith("'5' | ")


@pytest.mark.parametrize(
    ("positional", "norm"), [("standard", None), ("shortformer", "rmsnorm"), ("none", "layernorm")]
)
def test_positional_terms_sum_to_the_scores(positional, norm):
    weights, tokens = random_weights(1, norm=norm, positional=positional), random_tokens(2, 12)
    run = fc.trace(weights, tokens)
    places = torch.arange(12)
    for head in range(4):
        found = fc.qk_tables(weights, (0, head), normed=True)
        total = found.token_token.AB[tokens[:, :, None], tokens[:, None, :]]
        if positional == "none":
            assert found[1:] == (None, None, None)
        else:
            total = total + found.token_position.AB[tokens][..., :12]
            total = total + found.position_token.AB[:12][places[:, None], tokens[:, None, :]]
            total = total + found.position_position.AB[:12, :12]
            assert found.position_position.shape == (32, 32)
        hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
        torch.testing.assert_close(total.masked_fill(hidden, -torch.inf).softmax(-1), run.pattern(0)[:, head])


@pytest.mark.parametrize("norm", [None, "rmsnorm"])
def test_rotary_circuits_at_an_offset(norm):
    """Two tokens `offset` apart, the rest of no account: differences of a row's log-patterns are those of the tables."""
    weights, tokens = random_weights(1, norm=norm, positional="rotary"), random_tokens(2, 12)
    patterns = fc.trace(weights, tokens).pattern(0)
    for head in range(4):
        log = patterns[:, head].log()
        found = [fc.qk_tables(weights, (0, head), normed=True, offset=n).token_token.AB for n in range(12)]
        for t in range(12):
            for s in range(t + 1):
                entry = found[t - s][tokens[:, t], tokens[:, s]] - found[0][tokens[:, t], tokens[:, t]]
                torch.testing.assert_close(entry, log[:, t, s] - log[:, t, t])
    plain = random_weights(1, norm=norm, positional="rotary", biases=False)
    for offset in (0, 5):
        ours = fc.qk_circuit(plain, (0, 1), scaled=True, normed=True, offset=offset)
        torch.testing.assert_close(ours.AB, fc.qk_tables(plain, (0, 1), normed=True, offset=offset).token_token.AB)


def test_positions_that_are_copied():
    weights = random_weights(1, positional="standard", biases=False)
    found, run = fc.ov_tables(weights, (0, 2)), fc.trace(weights, random_tokens(1, 9))
    mixed = run.pattern(0)[:, 2] @ (found.token.AB[run.tokens[0]] + found.position.AB[:9])
    torch.testing.assert_close(mixed, fc.path_logits(run, [(0, 2)]))
    assert found.position.shape == (32, 97)
    assert fc.ov_tables(WEIGHTS, (0, 2)).position is None


def test_bad_searches():
    for k in (0, -1, 97 * 97 + 1):
        with pytest.raises(ValueError, match=f"k is {k!r}, expected an integer from 1 to 9409"):
            fc.top_entries(CIRCUIT, k)
    for k in (True, 2.0):
        with pytest.raises(TypeError, match=f"k is {k!r}, expected an integer"):
            fc.top_entries(CIRCUIT, k)
    with pytest.raises(ValueError, match="k is 98, expected an integer from 1 to 97"):
        fc.top_per_row(CIRCUIT, 98)
    with pytest.raises(ValueError, match="k is 3, expected an integer from 1 to 2 "):
        fc.top_per_row(CIRCUIT, 3, columns=[1, 2])
    for name, function in itertools.product(("rows", "columns"), (fc.top_entries, fc.top_per_row)):
        for indices, error, message in (
            ([], ValueError, rf"{name} has shape \[0\], expected at least one index"),
            ([[1]], ValueError, rf"{name} has shape \[1, 1\]"),
            ([97], IndexError, rf"{name}\[0\] is 97, expected 0 to 96"),
            ([1, -1], IndexError, rf"{name}\[1\] is -1, expected 0 to 96"),
            ([0.5], TypeError, f"{name} has dtype torch.float32"),
            ([True] * 97, TypeError, f"{name} has dtype torch.bool"),
        ):
            with pytest.raises(error, match=message):
                function(CIRCUIT, 1, **{name: indices})
        if (name, function) != ("rows", fc.top_per_row):
            with pytest.raises(ValueError, match=f"{name} holds 4 2 times"):
                function(CIRCUIT, 1, **{name: [4, 1, 4]})
    for options, message in (
        ({"normalize": "softmax"}, "normalize is 'softmax', expected one of center, log_softmax"),
        ({"row_weights": torch.ones(96)}, r"row_weights has shape \[96\], expected \[97\]"),
        ({"row_weights": torch.full((97,), torch.nan)}, r"row_weights\[0\] is nan"),
        ({"screen": "fp8"}, "screen is 'fp8'"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            fc.top_entries(CIRCUIT, 1, **options)
    stacked = fc.FactoredMatrix(torch.ones(2, 5, 3), torch.ones(3, 5))
    for function in (fc.top_entries, fc.top_per_row):
        with pytest.raises(ValueError, match=r"matrix has shape \[2, 5, 5\], expected \[N, M\]"):
            function(stacked, 1)
    with pytest.raises(ValueError, match=r"matrix has shape \[2, 5, 5\]"):
        fc.diagonal_ranks(stacked)
    with pytest.raises(ValueError, match=r"matrix has shape \[9, 5\], expected a square one"):
        fc.diagonal_ranks(fc.FactoredMatrix(torch.ones(9, 3), torch.ones(3, 5)))
    with pytest.raises(ValueError, match=r"A\[1, 0\] is nan"):
        fc.top_entries(fc.FactoredMatrix(torch.tensor([[0.0], [torch.nan]]), torch.ones(1, 5)), 1)


def test_bad_skip_trigrams():
    for options, error, message in (
        ({"head": (3, 0)}, IndexError, r"head is 3\.0; the model has layers 0 to 2"),
        ({"head": 7}, ValueError, "head is 7"),
        ({"source_tokens": [97]}, IndexError, r"source_tokens\[0\] is 97, expected 0 to 96"),
        ({"source_tokens": []}, ValueError, "source_tokens has shape"),
        ({"among": [1, 1]}, ValueError, "among holds 1 2 times"),
        ({"k": 98}, ValueError, "k is 98"),
        ({"k": 0}, ValueError, "k is 0"),
        ({"offset": 1}, ValueError, "offset is 1, expected 0: positional is 'none'"),
    ):
        with pytest.raises(error, match=message):
            fc.skip_trigrams(WEIGHTS, **{"head": (0, 0), **options})
    with pytest.raises(ValueError, match="offset is -1, expected at least 0"):
        fc.qk_circuit(random_weights(1, positional="rotary"), (0, 0), offset=-1)
    for n in (-1, 4):
        with pytest.raises(ValueError, match=f"n is {n}, expected 0 to k = 3"):
            fc.skip_trigrams(WEIGHTS, (0, 0), k=3).top(n)
    with pytest.raises(IndexError, match=r"head is 0\.9"):
        fc.copying_accuracy(WEIGHTS, [(0, 9)])
    assert tables.copying_accuracy(random_weights(0)).top1.shape == (0, 4)
