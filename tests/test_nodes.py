"""Nodes of every kind sum to the residual stream and can be taken out; heads, pairs and paths have one parser."""

import numpy as np
import pytest
import torch
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.experiments.ablation_value import AblationValue
from pyfastcircuits.experiments.edges import frozen_removal
from pyfastcircuits.experiments.rerun import Site
from pyfastcircuits.result import label_name
from pyfastcircuits.run.node_names import parse_node, parse_nodes, parse_receiver
from pyfastcircuits.run.nodes import (
    Bias,
    Embedding,
    Head,
    HeadInput,
    Logits,
    nodes_before,
    one_or_several,
    parse_head,
    parse_path,
    written,
)


@pytest.mark.parametrize(("norm", "positional"), KINDS)
def test_nodes_sum_to_the_residual_stream(norm, positional):
    run = fc.trace(random_weights(3, norm=norm, positional=positional), random_tokens())
    for layer in range(4):
        total = sum(written(run, node) for node in nodes_before(run, layer))
        torch.testing.assert_close(total, run.streams[layer])


def test_what_is_taken_out_of_all_nodes_is_the_whole_stream():
    """Removals of disjoint sets of nodes add up where no head reads another's removal twice: all at once, all is gone."""
    run = fc.trace(random_weights(3, norm="rmsnorm"), random_tokens())
    everything = list(nodes_before(run, 3))
    gone = frozen_removal(run, [Site(tuple(everything))], AblationValue(run))[0]
    torch.testing.assert_close(gone, run.final)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_nodes_that_are_no_heads_can_be_taken_out(mode):
    """Their removal passes through later heads: written out here, layer by layer."""
    run = fc.trace(random_weights(3, norm="layernorm"), random_tokens(3))
    for node in (Embedding(), Bias(1)):
        own = written(run, node)
        instead = {"zero": 0 * own, "mean": own.mean((0, 1)), "resample": own.roll(1, 0)}[mode]
        gone = own - instead
        for layer in range(node.layer + 1, 3):
            gone = gone + run.attend(gone, layer)
        torch.testing.assert_close(frozen_removal(run, [Site((node,))], AblationValue(run, mode))[0], gone)


def test_a_part_of_a_run_knows_its_sequences():
    run = fc.trace(random_weights(2), random_tokens(7))
    for cut in (slice(2, 6), torch.tensor([4, 1, 6]), torch.arange(7) > 4):
        part = run[cut]
        assert torch.equal(part.tokens, run.tokens[part.sequences])
        assert torch.equal(part[1:].tokens, part.tokens[part[1:].sequences])


@pytest.mark.parametrize("cut", [slice(2, 6), torch.tensor([4, 1, 6])])
def test_experiments_on_a_part_of_a_run_are_those_of_the_part(cut):
    """A resampled or averaged value is that of the part's own sequences, not of the run it was cut from."""
    weights, tokens, others = random_weights(2), random_tokens(7), random_tokens(7, seed=1)
    run, other = fc.trace(weights, tokens), fc.trace(weights, others)
    alone, reference = fc.trace(weights, tokens[cut]), fc.trace(weights, others[cut])
    for call in (
        lambda a, b: fc.head_ablation(a, "resample"),
        lambda a, b: fc.head_ablation(a, "mean", over="positions", per_token=True),
        lambda a, b: fc.head_ablation(a, "resample", "recomputed", reference=b),
        lambda a, b: fc.activation_patching(a, b),
        lambda a, b: fc.path_patching(a, b, "K"),
        lambda a, b: fc.edge_attribution(a, b, "V"),
    ):
        expected = call(alone, reference).values
        torch.testing.assert_close(call(run[cut], other[cut]).values, expected, equal_nan=True)
        torch.testing.assert_close(call(run[cut], reference).values, expected, equal_nan=True)


@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_layers_are_ablated_at_positions(attention):
    run = fc.trace(random_weights(3, norm="layernorm"), random_tokens())
    layers = [[(layer, head) for head in range(4)] for layer in range(3)]
    for at in (4, [2, 5], torch.arange(9) > 6, "each"):
        found = fc.layer_ablation(run, "mean", attention, at=at)
        expected = fc.head_ablation(run, "mean", attention, heads=layers, at=at)
        torch.testing.assert_close(found.values, expected.values)
        assert float((found.values - fc.layer_ablation(run, "mean", attention).values[:, None]).abs().max()) > 0
    assert found.labels[10] == (1, 1)
    assert found.values.shape == (3, 9)


@pytest.mark.parametrize("head", [(1, 2), [1, 2], torch.tensor([1, 2]), np.array([1, 2]), (np.int64(1), np.int32(2))])
def test_a_head_is_a_pair_of_integers(head):
    found = parse_head(random_weights(), head)
    assert found == Head(1, 2) == (1, 2)
    assert [type(x) for x in found] == [int, int]


@pytest.mark.parametrize(
    "head", [(0.9, 1.7), (0, True), (1,), (1, 2, 3), "12", 3, None, (0, None), (0, np.bool_(True))]
)
def test_something_else_is_no_head(head):
    with pytest.raises(ValueError, match=r"head is .*, expected \(layer, head\)"):
        parse_head(random_weights(), head)
    with pytest.raises(ValueError, match=r"expected a tuple of \(layer, head\)"):
        parse_path(random_weights(), [head])


def test_one_or_several():
    a, b = (0, 1), (1, 2)
    assert one_or_several(()) == ([()], False)
    assert one_or_several([()]) == ([()], True)
    assert one_or_several((a, b)) == ([(a, b)], False)
    assert one_or_several([(a,), (a, b)]) == ([(a,), (a, b)], True)
    assert one_or_several({(a, b)}) == ([(a, b)], True)
    run = fc.trace(random_weights(), random_tokens())
    assert parse_nodes(run, a) == parse_nodes(run, [a]) == parse_nodes(run, {a}) == (a,)
    assert parse_nodes(run, [b, a, b]) == parse_nodes(run, frozenset((a, b))) == (a, b)
    assert parse_nodes(run, "embed") == parse_nodes(run, ["embed"]) == (Embedding(),)
    assert parse_nodes(run, [b, ("bias", 0), "embed", a]) == (Embedding(), a, Bias(0), b)


def test_labels_print_as_users_write_them():
    run = fc.trace(random_weights(2), random_tokens())
    assert repr(fc.pair_ablation(run).labels[0]) == "((0, 0), (1, 0))"
    assert repr(fc.head_ablation(run).labels[1]) == "((0, 1),)"


def test_nodes_and_receivers_as_users_write_them():
    run = fc.trace(random_weights(), random_tokens())
    assert parse_node(run, ("bias", 1)) == Bias(1)
    assert parse_receiver(run, ((1, 2), "K")) == HeadInput(Head(1, 2), "K")
    assert parse_receiver(run, "logits") == Logits()
    with pytest.raises(ValueError, match=r"node is \('mlp', 0\), but that layer has no MLP"):
        parse_node(run, ("mlp", 0))
    with pytest.raises(IndexError, match=r"node is \('bias', 2\), but the model has 2 layers"):
        parse_node(run, ("bias", 2))
    for bad in ("mlp", ("mlp", True), ("mlp", 0, 1), None, ("unembed", 0)):
        with pytest.raises(ValueError, match="node is"):
            parse_node(run, bad)
    for bad in ("embed", ((0, 1), "QKV"), (0, 1), 3):
        with pytest.raises(ValueError, match=r"receiver is .*, expected \(\(layer, head\), 'Q'"):
            parse_receiver(run, bad)
    assert [label_name(x) for x in (("mlp", 2), ((0, 1),), (("mlp", 0), ((1, 2), "Q")))] == [
        "mlp 2", "0.1", "mlp 0 -> 1.2 Q",
    ]  # fmt: skip
