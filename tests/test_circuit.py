"""Circuits as values, and tasks: what is chosen, pruned, compared, drawn and written; prompts, answers and padding."""

import json
import re

import pytest
import torch
from support.command import run as command
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments.faithfulness import pruning_runs

LATE, EARLY, SIDE = (1, 1), (0, 2), (0, 0)
SCORES = {
    ("embed", (EARLY, "V")): -3.0,
    (EARLY, (LATE, "K")): -2.0,
    (LATE, "logits"): 1.5,
    ("embed", (SIDE, "Q")): 4.0,  # which nothing reads
    (SIDE, ("mlp", 1)): 0.2,
    (("mlp", 1), "logits"): -0.1,
}
IOI = [(9, 9), (9, 6), (10, 0), (10, 7), (11, 10), (7, 3), (7, 9), (8, 6), (8, 10)]


def test_edges_are_chosen_by_size():
    assert fc.circuit(SCORES, top=2).edges == (("embed", (SIDE, "Q")), ("embed", (EARLY, "V")))
    assert len(fc.circuit(SCORES, threshold=1.5)) == 4
    assert len(fc.circuit(SCORES)) == len(SCORES) == fc.circuit(SCORES, top=1).candidates
    chosen = fc.circuit(SCORES, top=4)
    assert chosen.nodes == ("embed", SIDE, EARLY, LATE)
    assert chosen.pruned().edges == (("embed", (EARLY, "V")), (EARLY, (LATE, "K")), (LATE, "logits"))
    assert chosen.top(1).edges == chosen.edges[:1]


def test_greedy_circuits_grow_from_the_logits():
    grown = fc.circuit(SCORES, top=3, greedy=True)
    assert set(grown.edges) == {("embed", (EARLY, "V")), (EARLY, (LATE, "K")), (LATE, "logits")}
    assert len(fc.circuit(SCORES, top=2, greedy=True)) == 0  # it does not reach the embedding
    with pytest.raises(ValueError, match="no edge to the logits"):
        fc.circuit({("embed", (EARLY, "V")): 1.0}, greedy=True)


def test_circuits_of_pairs():
    run = fc.trace(random_weights(), random_tokens())
    by_kind = [fc.composition_ablation(run, kind) for kind in "QK"]
    both = fc.circuit(by_kind, top=5)
    assert both.candidates == 2 * len(by_kind[0].labels)
    assert {to[1] for _, to in both.edges} <= {"Q", "K"}
    best = max(range(2), key=lambda i: by_kind[i].means().abs().max())
    (source, to), _ = max(zip(by_kind[best].labels, by_kind[best].means().abs(), strict=True), key=lambda x: x[1])
    assert both.edges[0] == (source, (to, "QK"[best]))
    pairs = fc.circuit(fc.pair_ablation(run, "edge"), top=1)
    assert pairs.edges[0][1][1] == "V"


def test_bad_input_is_named():
    for bad, message in (
        ({"x": 1.0}, "scores holds 'x', expected an edge"),
        ({("embed", "logits"): float("nan")}, "scores holds NaN for edge embed -> logits"),
    ):
        with pytest.raises(ValueError, match=message):
            fc.circuit(bad)
    with pytest.raises(TypeError, match="scores is 3"):
        fc.circuit(3)
    with pytest.raises(ValueError, match="top is -1"):
        fc.circuit(SCORES, top=-1)
    with pytest.raises(TypeError, match="other is 'x'"):
        fc.circuit(SCORES).compare("x")


def test_overlaps():
    one, other = fc.circuit(SCORES, top=4), fc.circuit(SCORES, threshold=0.15)
    found = one.compare(other)
    assert (len(found.shared), len(found.only_here), len(found.only_there)) == (4, 0, 1)
    assert (found.precision, found.recall, found.jaccard) == (1.0, 0.8, 0.8)
    heads = one.compare([*IOI, LATE])
    assert heads.shared == (LATE,)
    assert heads.recall == pytest.approx(0.1)


def test_files_and_graphs(tmp_path):
    circuit = fc.circuit(SCORES)
    circuit.save(tmp_path / "mine.json")
    loaded = fc.Circuit.load(tmp_path / "mine.json")
    assert dict(loaded.scores) == dict(circuit.scores)
    assert loaded.candidates == circuit.candidates
    graph = json.loads((tmp_path / "mine.json").read_text())
    assert graph["metadata"]["slug"] == "mine"
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    identities = [node["node_id"] for node in graph["nodes"]]
    assert len(set(identities)) == len(identities) == len(circuit.nodes) + 1
    assert all(link["source"] in identities and link["target"] in identities for link in graph["links"])
    layers = {node["clerp"]: node["layer"] for node in graph["nodes"]}
    assert (layers["embed"], layers["0.2"], layers["mlp 1"], layers["logits"]) == ("E", "0", "1", "3")
    linked = circuit.to_networkx()
    assert linked.number_of_edges() == len(SCORES)
    assert linked.edges[EARLY, LATE, "K"]["score"] == -2.0
    assert "0.2 -> 1.1 [label=K" in circuit.to_dot()
    circuit.plot(tmp_path / "mine.svg")
    assert (tmp_path / "mine.svg").stat().st_size > 1000
    assert circuit.table().column("input").to_pylist() == ["Q", "V", "K", "", "", ""]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no circuit"):
        fc.Circuit.load(tmp_path / "bad.json")


def words(text):
    """A tokenizer of whole words, whose years are a century and two digits."""
    pieces = []
    for word in text.replace(",", " ,").split(" "):
        year = word.isdigit() and len(word) == 4
        pieces += [word[:2], word[2:]] if year else [word]
    return [int.from_bytes(piece.encode()[:4], "big") % 9973 if piece else 0 for piece in pieces if piece]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_prompts_of_different_lengths(padding):
    w = random_weights(norm="layernorm", positional="standard")
    clean, corrupted = [[1, 2, 3, 4], [5, 6, 7]], [[1, 9, 3, 4], [8, 6, 7]]
    task = fc.Task(clean, corrupted, [10, {11, 12}], [20, [21, 22]], start=30, padding=padding)
    runs = task.runs(w)
    found = fc.edge_scores(*runs, **task.options)
    expected = []
    for i in range(2):
        alone = [fc.trace(w, torch.tensor([30, *prompt[i]])) for prompt in (clean, corrupted)]
        sets = [torch.tensor(x)[None, None].expand(1, len(clean[i]) + 1, -1) for x in ([[10], [11, 12]][i], [[20], [21, 22]][i])]  # fmt: skip
        metric = fc.LogitDifference(*sets)
        expected.append(fc.edge_scores(*alone, metric=metric, positions=-1))
        logits = alone[0].logits()[0, -1]
        difference = logits[sets[0][0, 0]].mean() - logits[sets[1][0, 0]].mean()
        assert expected[i].setup["clean"] == pytest.approx(float(difference))
    assert torch.allclose(found.values, (expected[0].values + expected[1].values) / 2)
    whole = fc.head_ablation(runs[0], metric=fc.LogitDifference(task.answers, task.against), positions=task.positions)
    assert float(whole.baseline) == pytest.approx(found.setup["clean"])
    attributed = fc.direct_logit_attribution(runs[0], metric=task.metric, positions=task.positions)
    assert float(attributed.values.sum()) == pytest.approx(found.setup["clean"])


def test_tasks_from_files(tmp_path):
    lines = [
        {"clean": "a b c", "corrupted": "a d c", "answers": "x", "against": ["y", "z"]},
        {"clean": [1, 2], "corrupted": [3, 2], "answers": 4, "against": 5},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = fc.Task.load(tmp_path / "mine.jsonl", words)
    assert task.clean.shape == (2, 3)
    assert task.mask.tolist() == [[True] * 3, [True, True, False]]
    assert task.positions.tolist() == [[False, False, True], [False, True, False]]
    assert task.name == "mine"
    (tmp_path / "bad.jsonl").write_text('{"clean": [1, 2]}')
    with pytest.raises(ValueError, match="line 1 lacks"):
        fc.Task.load(tmp_path / "bad.jsonl")
    for arguments, error, message in (
        (([[1, 2]], [[1, 2, 3]], [1]), ValueError, "a prompt of 3 tokens, but the clean one has 2"),
        ((["a b"], ["a c"], ["d"]), TypeError, "there is no tokenizer"),
        (([[1, 2]], [[1, 3]], [[]]), ValueError, "answers holds an empty set"),
        (([[1, 2]], [[1, 3]], [1, 2]), ValueError, "1 clean, 1 corrupted, 2 answers"),
    ):
        with pytest.raises(error, match=message):
            fc.Task(*arguments)


def test_built_in_tasks():
    task = fc.Task.induction(50, batch=5, length=8)
    for clean, corrupted, answers, against in zip(task.clean, task.corrupted, task.answers, task.against, strict=True):
        before = clean[:-1].tolist().index(int(clean[-1]))
        assert int(answers[-1, 0]) == int(clean[before + 1]) != int(against[-1, 0])
        assert (clean != corrupted).nonzero().flatten().tolist() == [before]
    names = fc.Task.indirect_object(words, batch=6)
    swapped = (names.clean != names.corrupted).sum(1)
    assert swapped.tolist() == [1] * 6  # the second mention alone
    assert bool((names.answers != names.against).all())
    years = fc.Task.greater_than(words, batch=4)
    sizes = [(x >= 0)[:, 0].sum(-1) for x in (years.answers, years.against)]
    assert (sizes[0] + sizes[1]).tolist() == [99] * 4
    with pytest.raises(ValueError, match="the indirect-object task needs at least 4"):
        fc.Task.indirect_object(lambda text: [*text.encode()])
    with pytest.raises(ValueError, match="needs years of two tokens"):
        fc.Task.greater_than(lambda text: [*text.encode()])


def test_the_induction_circuit():
    """Previous-token heads write what induction heads make their keys of; the command finds and writes it."""
    w = fc.load_weights("induction-2l")
    task = fc.Task.induction(w.d_vocab, batch=12)
    runs = task.runs(w)
    found = fc.circuit(fc.edge_scores(*runs, "eap-ig", **task.options), top=40)
    heads = fc.head_scores(w, batches=1)
    by_keys = [edge for edge in found.edges if edge[1] != "logits" and edge[0] != "embed"]
    assert len(by_keys) >= 8
    assert {to[1] for _, to in by_keys} == {"K"}
    known = [heads.previous_token[source] > 0.2 and heads.induction[to[0]] > 0.2 for source, to in by_keys]
    assert sum(known) >= 0.9 * len(known)
    assert known[0]
    assert {source for source, _ in by_keys[:4]} == {(0, 0), (0, 1), (0, 5), (0, 7)}
    kept = fc.faithfulness(found, *runs, random=2, **task.options)
    assert kept.completeness > 0.9
    assert float(kept.random.abs().max()) < 0.05 < 0.5 < kept.faithfulness
    assert kept.right[2] >= 0.9 * kept.right[0]


def test_twenty_edges_choose_as_the_model_does():
    """Chosen by running the model: on the prompts it was chosen on, and on others."""
    w = fc.load_weights("induction-2l")
    task, other = fc.Task.induction(w.d_vocab), fc.Task.induction(w.d_vocab, batch=64, seed=1)
    runs = task.runs(w)
    start = fc.circuit(fc.edge_scores(*runs, "eap-ig", **task.options), top=60)
    ran = []
    found = fc.prune_circuit(start, *runs, top=20, progress=ran.append, **task.options)
    assert len(found) <= 20
    assert 0.9 * pruning_runs(60, 20) < sum(ran) <= pruning_runs(60, 20) + 5 * 61
    heads = fc.head_scores(w, batches=1)
    into_heads = [(source, to) for source, to in found.edges if to != "logits" and source != "embed"]
    assert len(into_heads) >= 8
    for source, (reader, kind) in into_heads:
        assert kind == "K"
        assert heads.previous_token[source] > 0.2 < heads.induction[reader]
    by_scores = fc.faithfulness(start.top(20), *runs, **task.options)
    for asked, pair in ((task, runs), (other, other.runs(w))):
        kept = fc.faithfulness(found, *pair, **asked.options)
        assert kept.right[2] >= 0.9 * kept.right[0]
        assert kept.faithfulness > 1.5 * by_scores.faithfulness


def test_the_command(tmp_path):
    done = command("circuit", "--pairs", 4, "--edges", 12, "--top", 3, "--out", tmp_path / "out", "--steps", 2)
    assert done.exit_code == 0, done.output
    assert "Faithfulness" in done.output
    assert "Choosing 12 of 36 edges runs the model up to 286 times, and 37 times more" in done.output
    kept = [line for line in done.output.splitlines() if "of its right choices between the two answers" in line]
    assert len(kept) == 2
    assert "on 4 other pairs of prompts" in kept[1]
    assert re.search(r"Of the sizes on the curve, the \d+ best edges by their scores keep 90.0%", done.output)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"circuit.json", "circuit.png", "curve.png", "edges.parquet", "curve.parquet"}
    assert len(fc.Circuit.load(tmp_path / "out" / "circuit.json")) == 12
    refused = command("circuit", "--task", "greater-than", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    assert "the greater-than task needs years of two tokens" in refused.output.replace("\n", " ")
