"""Edge scores and edited models with MLPs, against TransformerLens' own modules with split inputs, hooks and autograd."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import tokens  # noqa: E402
from support.edge_package import edited_lens_logits, package_scores, split  # noqa: E402
from test_lens import hooked  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.run.graph import Graph  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = [
    "layernorm", "rmsnorm, rotary, grouped", "rmsnorm, folded, rotary by pairs, parallel", "gemma 2's",
    "norms of queries and keys",
]  # fmt: skip
ASKED = {"metric": fc.LogitDifference(3, 5), "positions": -2}


def difference(logits, clean=None):
    return (logits[:, -2, 3] - logits[:, -2, 5]).mean()


def divergence(logits, clean):
    p, q = (x[:, :-1].log_softmax(-1) for x in (clean, logits))
    return (p.exp() * (p - q)).sum(-1).mean()


def both(name):
    model = hooked(name)
    clean, corrupted = tokens(), tokens().flip(0, 1)
    return model, (clean, corrupted), (fc.trace(model, clean), fc.trace(model, corrupted))


def assert_same(scores, expected, graph):
    table = torch.zeros_like(expected)
    for label, value in zip(scores.labels, scores.values, strict=True):
        table[graph.place(label)] = value
    assert float((table - expected).abs().max()) <= 1e-8 * float(expected.abs().max())
    assert len(scores.labels) == int(sum(graph.before))


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_package(name):
    model, prompts, runs = both(name)
    graph = Graph.of(runs[0])
    assert_same(fc.edge_scores(*runs, **ASKED), package_scores(split(model), *prompts, difference), graph)


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_integrated_scores_are_those_of_the_package(name):
    model, prompts, runs = both(name)
    graph, model = Graph.of(runs[0]), split(model)
    for asked, metric in ((ASKED, difference), ({"metric": "kl"}, divergence)):
        expected = package_scores(model, *prompts, metric, 3)
        assert_same(fc.edge_scores(*runs, "eap-ig", steps=3, **asked), expected, graph)


@pytest.mark.parametrize("name", [*FAMILIES[:3], FAMILIES[4]])
@pytest.mark.parametrize("steps", [1, 3])
def test_scores_of_integrated_activations_are_those_of_the_package(name, steps):
    model, prompts, runs = both(name)
    graph, model = Graph.of(runs[0]), split(model)
    for asked, metric in ((ASKED, difference), ({"metric": "kl"}, divergence))[: steps - 1 or 1]:
        expected = package_scores(model, *prompts, metric, steps, activations=True)
        assert_same(fc.edge_scores(*runs, "eap-ig-activations", steps=steps, **asked), expected, graph)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edited_model_is_a_plain_rerun(name):
    model, prompts, runs = both(name)
    graph, model = Graph.of(runs[0]), split(model)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(graph.edges), generator=g).tolist()
    for count in (12, len(order) // 3, len(order) - 7, len(order)):
        circuit = fc.Circuit({graph.edges[i]: 1.0 for i in order[:count]}, len(order)).pruned()
        found = fc.faithfulness(circuit, *runs, **ASKED)
        mask = torch.zeros(len(graph.nodes), len(graph.receivers), dtype=torch.float64)
        for edge in circuit.edges:
            mask[graph.place(edge)] = 1
        expected = float(difference(edited_lens_logits(model, *prompts, mask)))
        assert found.value == pytest.approx(expected, rel=1e-8, abs=1e-9)
        assert found.empty == pytest.approx(float(difference(model(prompts[1]))), rel=1e-8, abs=1e-9)
    assert found.faithfulness == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("effect", ["total", "direct"])
def test_any_pair_to_first_order(name, effect):
    """As the corrupted run nears the clean one, what first order leaves falls faster than the change itself."""
    pairs = [("embed", ("mlp", 0)), ("embed", ((0, 1), "Q")), ((0, 1), "logits"), ((0, 0), ((1, 1), "V"))]
    pairs += [(("mlp", 0), (1, 0)), (("mlp", 0), ("mlp", 1))]
    pairs += [[("embed", (1, 0)), ((0, 1), (1, 1))]] if effect == "total" else []
    errors = []
    for share in (1e-2, 1e-3):
        model = both(name)[0]
        W_E, clean = model.W_E.data, tokens() % 8
        W_E[8:16] = W_E[:8] + share * (W_E[8:16] - W_E[:8])
        runs = fc.trace(model, clean), fc.trace(model, clean + 8)
        found = fc.edge_attribution(*runs, "K", effect, pairs=pairs, exact=len(pairs), **ASKED)
        exact = fc.path_patching(*runs, "K", effect, pairs=pairs, **ASKED)
        assert torch.equal(found.extra["exact"], exact.values)
        assert found.labels == exact.labels
        errors.append((found.delta - exact.delta).abs() / exact.delta.abs().max())
    assert bool((errors[1] <= 0.2 * errors[0] + 1e-6).all())
    assert float(errors[0].max()) < 0.2
