"""Singular directions between two heads against the materialised matrices."""

import pytest
import torch
from support import naive
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc

SOURCE, DESTINATION = (0, 1), (2, 3)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def dense(w, input):
    """OV of the source as its reader sees it, and M2 of the destination: [d, d] each."""
    w = fc.center(w) if w.norm == "layernorm" else w
    Q, K, V = w.W_Q[2, 3], w.W_K[2, 1], w.W_V[2, 1]
    return w.W_V[0, 0] @ w.W_O[SOURCE], {"Q": Q @ K.mT, "K": K @ Q.mT, "V": V @ w.W_O[2, 3]}[input]


@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("input", ["Q", "K", "V"])
def test_directions_are_those_of_the_product_and_shares_those_of_the_score(norm, input):
    w = random_weights(3, norm=norm)
    OV, M2 = dense(w, input)
    found = fc.subspaces(w, SOURCE, DESTINATION, input)
    close(found.values, torch.linalg.svdvals(OV @ M2)[:6])
    assert found.labels == [f"direction {i}" for i in range(6)]
    read, wrote, received = (getattr(found, name) for name in ("read", "written", "received"))
    close(read @ read.mT, torch.eye(6, dtype=torch.float64))
    close(received @ received.mT, torch.eye(6, dtype=torch.float64))
    close(wrote, read @ OV)
    close(read @ OV @ M2, found.values[:, None] * received)
    close(read.mT @ (found.values[:, None] * received), OV @ M2)
    score = fc.composition_scores(fc.center(w) if norm == "layernorm" else w, input)[(*SOURCE, *DESTINATION)]
    close(found.values.square().sum().sqrt() / (OV.norm() * M2.norm()), score)
    close(found.share, found.values.square() / found.values.square().sum())
    few = fc.subspaces(w, SOURCE, DESTINATION, input, rank=2)
    assert few.written.shape == (2, 20)
    close(few.share, found.share[:2])


def test_the_bases_of_heads_do_not_matter():
    """Any invertible change of a head's own dimensions leaves the model, and the directions, as they are."""
    w = random_weights(3, biases=False)
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    W_V, W_O, W_Q, W_K = (x.clone() for x in (w.W_V, w.W_O, w.W_Q, w.W_K))
    W_V[0, 0], W_O[0, :2] = W_V[0, 0] @ A, torch.linalg.solve(A, W_O[0, :2])
    W_Q[2, 2:], W_K[2, 1] = W_Q[2, 2:] @ B, W_K[2, 1] @ torch.linalg.inv(B).mT
    changed = fc.CircuitWeights(w.W_E, W_Q, W_K, W_V, W_O, w.W_U, w.W_pos, positional=w.positional)
    ours, theirs = (fc.subspaces(x, SOURCE, DESTINATION, "Q") for x in (changed, w))
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("input", ["K", "V"])
def test_energy_is_what_the_destination_receives_in_the_run(norm, input):
    w, tokens = random_weights(3, norm=norm), random_tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    clean = naive.Run(w, tokens)
    OV, M2 = dense(w, input)
    normed = naive.norm(w.W_E[tokens], w, clean.scales[0])[0]
    wrote = clean.patterns[0][:, 1] @ normed @ OV  # without the value bias
    received = (wrote * clean.scales[2])[mask] @ M2
    found = fc.subspaces(fc.trace(w, tokens, mask), SOURCE, DESTINATION, input)
    along = (received @ found.received.mT).square().sum(0)
    close(along.sum(), received.square().sum())
    close(found.energy, along / received.square().sum())
    few = fc.subspaces(fc.trace(w, tokens, mask), SOURCE, DESTINATION, input, rank=2)
    close(few.energy, found.energy[:2])


BAD = {
    "order": (((2, 0), (1, 0), "Q"), {}, ValueError, r"source \(2, 0\) is not in a layer before destination \(1, 0\)"),
    "source": (((3, 0), (1, 0), "Q"), {}, IndexError, "source is 3.0; the model has layers 0 to 2"),
    "destination": (((0, 0), (1, 4), "Q"), {}, IndexError, "destination is 1.4"),
    "embedding": (("embed", (1, 0), "Q"), {}, ValueError, r"source is 'embed', expected \(layer, head\)"),
    "kind": (((0, 0), (1, 0), "O"), {}, ValueError, "kind is 'O', expected one of Q, K, V"),
    "rank": (((0, 0), (1, 0), "Q"), {"rank": 7}, ValueError, "rank is 7, expected 1 to 6"),
    "no rank": (((0, 0), (1, 0), "Q"), {"rank": 0}, ValueError, "rank is 0, expected 1 to 6"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    arguments, options, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.subspaces(random_weights(3), *arguments, **options)
