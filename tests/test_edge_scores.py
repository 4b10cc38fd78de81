"""Scores of all edges, and edited models: each equals plain reruns with one input of one head changed at a time."""

import pytest
import torch
from support.edge_gradients import edited_logits, hooked_scores, receiver_gradient
from support.hooked import Hooked
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments import outside

ASKED = {"metric": fc.LogitDifference(3, 5), "positions": -1}


def difference(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def prompts():
    return random_tokens(seed=1), random_tokens(seed=2)


def runs(w):
    return tuple(fc.trace(w, tokens) for tokens in prompts())


def assert_same(found, expected):
    scores = dict(zip(found.labels, found.values.tolist(), strict=True))
    assert scores.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    assert max(abs(scores[edge] - expected[edge]) for edge in scores) <= 1e-8 * largest


@pytest.mark.parametrize(
    ("norm", "positional"), [(None, "shortformer"), ("layernorm", "standard"), ("rmsnorm", "rotary")]
)
def test_scores_are_gradients_times_changes(norm, positional, monkeypatch):
    w = random_weights(norm=norm, positional=positional, layers=3)
    expected = hooked_scores(w, *prompts(), difference)
    assert_same(fc.edge_scores(*runs(w), **ASKED), expected)
    monkeypatch.setattr(outside, "HELD", 0)  # changes are made again for each layer
    monkeypatch.setattr("pyfastcircuits.experiments.edge_scores.ROWS", 1)  # one sequence at a time
    assert_same(fc.edge_scores(*runs(w), **ASKED), expected)


def test_integrated_scores_are_means_along_the_way_of_the_embeddings():
    w, (clean, corrupted) = random_weights(norm="layernorm"), prompts()
    starts = [Hooked(w, tokens).streams[0] for tokens in (corrupted, clean)]
    parts = [
        hooked_scores(w, clean, corrupted, difference, starts[0] + k / 3 * (starts[1] - starts[0])) for k in range(3)
    ]
    mean = {edge: sum(part[edge] for part in parts) / 3 for edge in parts[0]}
    assert_same(fc.edge_scores(*runs(w), "eap-ig", steps=3, **ASKED), mean)


def test_activations_are_integrated_node_by_node():
    """With one step every output is the clean one, but what is held has no gradient."""
    w, (clean, corrupted) = random_weights(norm="rmsnorm"), prompts()
    found = fc.edge_scores(*runs(w), "eap-ig-activations", steps=1, **ASKED)
    plain = hooked_scores(w, clean, corrupted, difference)
    to_logits = {edge: score for edge, score in plain.items() if edge[1] == "logits"}
    scores = dict(zip(found.labels, found.values.tolist(), strict=True))
    assert all(scores[edge] == pytest.approx(score) for edge, score in to_logits.items())
    behind = [edge for edge in plain if edge[1] != "logits" and edge[1][0][0] == 1]  # two of three runs have them
    assert all(scores[edge] == pytest.approx(plain[edge] * 2 / 3, abs=1e-12) for edge in behind)


@pytest.mark.parametrize(("mode", "other"), [("zero", None), ("mean", None), ("mean", 1)])
def test_ablated_edges_carry_zero_or_a_mean(mode, other):
    w, (clean, corrupted) = random_weights(norm="rmsnorm", biases=False), prompts()
    found = fc.edge_scores(*runs(w)[: 1 + (other or 0)], mode=mode, **ASKED)
    run, reference = Hooked(w, clean), Hooked(w, corrupted if other else clean)
    for node in ("embed", (0, 1)):
        ours, theirs = (x.streams[0] if node == "embed" else x.z[node] for x in (run, reference))
        change = -ours if mode == "zero" else theirs.mean((0, 1)) - ours
        change = change if node == "embed" else change @ w.W_O[node]
        expected = float((change * receiver_gradient(w, clean, (1, 2, "K"), difference)).sum())
        score = found.values[found.labels.index((node, ((1, 2), "K")))]
        assert float(score) == pytest.approx(expected, rel=1e-8)


def test_the_best_edges_are_patched_exactly_beside():
    w, (clean, corrupted) = random_weights(norm="layernorm"), prompts()
    found = fc.edge_scores(*runs(w), exact=4, **ASKED)
    whole = set(found.labels)
    assert int(found.extra["exact"].isfinite().sum()) == 4
    wrong = found.wrong()
    assert [abs(x.error) for x in wrong] == sorted((abs(x.error) for x in wrong), reverse=True)
    for edge, score, exact, error in wrong:
        patched = difference(edited_logits(w, clean, corrupted, whole - {edge}))
        assert exact == pytest.approx(float(patched - difference(Hooked(w, clean).logits)), rel=1e-8)
        assert error == score - exact
    assert {x.edge for x in wrong} == {edge for edge, _ in found.top(4)}


def test_metrics_and_masks():
    w, (clean, corrupted) = random_weights(norm="layernorm"), prompts()
    nll = fc.edge_scores(*runs(w))
    logits = lambda x: -x[:, :-1].log_softmax(-1).gather(-1, clean[:, 1:, None]).mean()  # noqa: E731
    assert_same(nll, hooked_scores(w, clean, corrupted, logits))
    mask = torch.ones_like(clean)
    mask[0, :3] = 0
    padded = [fc.trace(w, tokens, mask) for tokens in (clean, corrupted)]
    alone = [fc.trace(w, tokens[:1, 3:]) for tokens in (clean, corrupted)]
    scores = fc.edge_scores(*(run[:1] for run in padded), "eap-ig", metric="kl")
    assert torch.allclose(scores.values, fc.edge_scores(*alone, "eap-ig", metric="kl").values)
    with pytest.raises(ValueError, match=r"metric is 'kl', .* method 'eap'"):
        fc.edge_scores(*runs(w), metric="kl")
    with pytest.raises(ValueError, match="corrupted is None, but mode is 'resample'"):
        fc.edge_scores(padded[0])
    with pytest.raises(ValueError, match="steps is 0"):
        fc.edge_scores(*padded, steps=0)


@pytest.mark.parametrize(
    ("norm", "positional"), [(None, "standard"), ("layernorm", "rotary"), ("rmsnorm", "shortformer")]
)
def test_faithfulness_is_that_of_a_plain_edited_rerun(norm, positional):
    w, (clean, corrupted) = random_weights(norm=norm, positional=positional, layers=3), prompts()
    edges = fc.edge_scores(*runs(w), **ASKED).labels
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(0)).tolist()
    full, empty = (float(difference(Hooked(w, tokens).logits)) for tokens in (clean, corrupted))
    for count in (0, 25, len(edges) // 2, len(edges) - 4, len(edges)):
        circuit = fc.Circuit({edges[i]: 1.0 for i in order[:count]}, len(edges))
        found = fc.faithfulness(circuit, *runs(w), minimality=count == 25, **ASKED)
        value = float(difference(edited_logits(w, clean, corrupted, set(circuit.edges))))
        rest = float(difference(edited_logits(w, clean, corrupted, set(edges) - set(circuit.edges))))
        assert (found.full, found.empty) == pytest.approx((full, empty), rel=1e-8)
        assert (found.value, found.without) == pytest.approx((value, rest), rel=1e-8)
        assert found.faithfulness == pytest.approx((value - empty) / (full - empty), rel=1e-7, abs=1e-9)
        if count == 25:
            without = float(difference(edited_logits(w, clean, corrupted, set(circuit.edges[1:]))))
            assert float(found.falls[0]) == pytest.approx((value - without) / (full - empty), rel=1e-6, abs=1e-9)
            assert found.minimality == float(found.falls.min())


def test_ablated_circuits_whole_and_empty():
    w = random_weights(norm="layernorm")
    clean, _ = runs(w)
    scores = fc.edge_scores(clean, mode="mean", **ASKED)
    whole = fc.faithfulness(fc.circuit(scores), clean, mode="mean", sizes=4, random=2, **ASKED)
    assert whole.faithfulness == pytest.approx(1)
    assert whole.completeness == pytest.approx(1)
    assert whole.curve.sizes[-1] == len(scores.labels)
    assert float(whole.random[0]) == pytest.approx(1)
    shares, at = whole.curve.faithfulness, whole.curve.proportions
    assert whole.curve.cpr == pytest.approx(float(((shares[1:] + shares[:-1]) / 2 * at.diff()).sum()))
    gaps = (1 - shares).abs()
    assert whole.curve.cmd == pytest.approx(float(((gaps[1:] + gaps[:-1]) / 2 * at.diff()).sum()))
    with pytest.raises(ValueError, match="sizes holds 999"):
        fc.faithfulness(fc.circuit(scores, top=3), clean, mode="mean", sizes=[999])
    with pytest.raises(ValueError, match=r"edge is \('embed', \(\(7, 0\), 'Q'\)\)"):
        fc.faithfulness(fc.circuit({("embed", ((7, 0), "Q")): 1.0}), clean, mode="mean")


def test_pruning_leaves_what_matters():
    w = random_weights(norm="rmsnorm")
    clean, corrupted = runs(w)
    start = fc.circuit(fc.edge_scores(clean, corrupted, **ASKED), top=25)
    few = fc.prune_circuit(start, clean, corrupted, top=8, **ASKED)
    assert len(few) <= 8
    assert set(few.edges) <= set(start.edges)
    everything = fc.prune_circuit(start, clean, corrupted, threshold=1e9, metric="kl")
    assert len(everything) == 0
    kept = fc.prune_circuit(start, clean, corrupted, threshold=0.05, metric="kl")
    again = fc.prune_circuit(kept, clean, corrupted, threshold=0.0, metric="kl")
    assert set(again.edges) <= set(kept.edges)
    with pytest.raises(ValueError, match="threshold is None and top is None"):
        fc.prune_circuit(start, clean, corrupted)
