"""Circuits against the materialised [V, V] matrices, in fp64."""

import math

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.circuits import spectra

WEIGHTS = random_weights(layers=3, norm=None, positional="none", biases=False)
HEADS = [(0, 0), (1, 3), (2, 2)]


def dense(head):
    """OV and QK of a head [d, d]."""
    layer, index = head
    kv = index // 2
    W = WEIGHTS
    return W.W_V[layer, kv] @ W.W_O[layer, index], W.W_Q[layer, index] @ W.W_K[layer, kv].mT


def same_spectrum(ours, matrix):
    """Ours are the nonzero eigenvalues of the matrix: every one is there, and nothing of size is left over."""
    full = torch.linalg.eigvals(matrix)
    largest = full.abs().max()
    distance = (ours[:, None] - full).abs()
    assert float(distance.min(1).values.max() / largest) < 1e-8
    assert float(abs(ours.sum() - full.sum()) / largest) < 1e-8
    assert float(abs(ours.abs().sum() - full.abs().sum()) / largest) < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_circuits(head):
    OV, QK = dense(head)
    W_E, W_U = WEIGHTS.W_E, WEIGHTS.W_U
    ov, qk = fc.ov_circuit(WEIGHTS, head), fc.qk_circuit(WEIGHTS, head)
    assert (ov.shape, ov.mdim) == ((97, 97), 6)
    torch.testing.assert_close(ov.AB, W_E @ OV @ W_U)
    torch.testing.assert_close(qk.AB, W_E @ QK @ W_E.mT)
    torch.testing.assert_close(fc.qk_circuit(WEIGHTS, head, scaled=True).AB, qk.AB / 6**0.5)
    torch.testing.assert_close(fc.bigrams(WEIGHTS).AB, W_E @ W_U)


@pytest.mark.parametrize("head", HEADS)
def test_eigenvalues_are_those_of_the_full_circuits(head):
    OV, QK = dense(head)
    W_E, W_U = WEIGHTS.W_E, WEIGHTS.W_U
    same_spectrum(fc.circuit_eigenvalues(WEIGHTS, "OV")[head], W_E @ OV @ W_U)
    same_spectrum(fc.circuit_eigenvalues(WEIGHTS, "QK")[head], W_E @ QK @ W_E.mT)


def test_composed_qk_circuit():
    source, destination = (0, 1), (2, 3)
    OV, QK = dense(source)[0], dense(destination)[1]
    full = WEIGHTS.W_E @ QK @ OV.mT @ WEIGHTS.W_E.mT
    torch.testing.assert_close(fc.composed_qk_circuit(WEIGHTS, source, destination).AB, full)
    values = fc.composed_eigenvalues(WEIGHTS, [(source, destination), ((1, 0), (2, 0))])
    assert values.shape == (2, 6)
    same_spectrum(values[0], full)
    assert fc.composed_eigenvalues(WEIGHTS, []).shape == (0, 6)
    with pytest.raises(ValueError, match=r"source .* is not in a layer before destination"):
        fc.composed_qk_circuit(WEIGHTS, destination, source)


def test_scores_of_spectra():
    copying, matching = fc.copying_scores(WEIGHTS), fc.qk_positivity(WEIGHTS)
    for head in HEADS:
        OV, QK = dense(head)
        for score, full in ((copying, WEIGHTS.W_E @ OV @ WEIGHTS.W_U), (matching, WEIGHTS.W_E @ QK @ WEIGHTS.W_E.mT)):
            eigenvalues = torch.linalg.eigvals(full)
            expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
            torch.testing.assert_close(score[head], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fc.trace_ratios(WEIGHTS)[head], OV.trace() / OV.norm())
    assert spectra.positivity(torch.tensor([2.0, 1.0]) + 0j) == 1
    assert spectra.positivity(torch.tensor([-2.0, -1.0]) + 0j) == -1
    assert spectra.positivity(torch.zeros(3) + 0j) == 0


def test_a_head_that_copies_scores_one():
    g = torch.Generator().manual_seed(0)
    W_E = torch.randn(50, 16, generator=g).double()
    W_V = torch.linalg.qr(torch.randn(16, 4, generator=g).double()).Q
    zero = torch.zeros(1, 2, 16, 4).double()
    W_O = torch.stack((W_V.mT, -W_V.mT))[None]
    weights = fc.CircuitWeights(W_E, zero, zero, W_V.expand(1, 2, 16, 4), W_O, W_E.mT.clone())
    torch.testing.assert_close(fc.copying_scores(weights)[0], torch.tensor([1.0, -1.0]).double())
    torch.testing.assert_close(fc.trace_ratios(weights)[0], torch.tensor([2.0, -2.0]).double())
    assert fc.qk_positivity(weights).abs().max() == 0


def test_diagonal_statistics():
    for head in HEADS:
        circuit = fc.ov_circuit(WEIGHTS, head)
        found, full = fc.diagonal_statistics(circuit), circuit.AB
        diagonal = full.diagonal()
        torch.testing.assert_close(found.diagonal_mean, diagonal.mean())
        torch.testing.assert_close(found.diagonal_std, diagonal.std(correction=0))
        torch.testing.assert_close(found.positive, (diagonal > 0).double().mean())
        torch.testing.assert_close(found.mean, full.mean())
        torch.testing.assert_close(found.std, full.std(correction=0))
    with pytest.raises(ValueError, match=r"matrix has shape \[97, 20\]"):
        fc.diagonal_statistics(fc.FactoredMatrix(torch.ones(97, 3), torch.ones(3, 20)))


def test_effective_rank():
    flat = torch.linalg.qr(torch.randn(9, 5).double()).Q
    assert float(fc.effective_rank(fc.FactoredMatrix(flat, 3 * flat.mT))) == pytest.approx(5)
    one = fc.FactoredMatrix(torch.ones(9, 2).double(), torch.ones(2, 4).double())
    assert float(fc.effective_rank(one)) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_direct_virtual_weights(kind):
    read = getattr(WEIGHTS, f"W_{kind}")
    read = read if kind == "Q" else read.repeat_interleave(2, 1)
    ours = fc.virtual_weights(WEIGHTS, (0, 1), (2, 3), kind)
    torch.testing.assert_close(ours.AB, WEIGHTS.W_O[0, 1] @ read[2, 3])
    torch.testing.assert_close(fc.virtual_weights(WEIGHTS, "embed", (1, 2), kind).AB, WEIGHTS.W_E @ read[1, 2])


def test_multi_hop_virtual_weights_multiply():
    layers = [sum(dense((layer, head))[0] for head in range(4)) for layer in range(3)]
    eye = torch.eye(20).double()
    ours = fc.virtual_weights(WEIGHTS, "embed", "unembed", hops="all").AB
    product = WEIGHTS.W_E @ (eye + layers[0]) @ (eye + layers[1]) @ (eye + layers[2]) @ WEIGHTS.W_U
    torch.testing.assert_close(ours, product)
    summed = WEIGHTS.W_E @ (eye + layers[0] + layers[1] + layers[2]) @ WEIGHTS.W_U
    assert float((ours - summed).norm() / product.norm()) > 0.1
    between = fc.virtual_weights(WEIGHTS, (0, 1), (2, 3), "Q", hops="all").AB
    torch.testing.assert_close(between, WEIGHTS.W_O[0, 1] @ (eye + layers[1]) @ WEIGHTS.W_Q[2, 3])
    assert fc.effective_rank(fc.virtual_weights(WEIGHTS, "embed", "unembed")) <= 20


def test_virtual_heads_write_their_path():
    trace = fc.trace(WEIGHTS, random_tokens())
    for source, destination in (((0, 1), (1, 2)), ((0, 3), (2, 0))):
        head = fc.virtual_head(trace, source, destination)
        torch.testing.assert_close(head.pattern.sum(-1), torch.ones(2, 9).double())
        torch.testing.assert_close(head.OV.AB, dense(source)[0] @ dense(destination)[0])
        written = (head.pattern @ trace.embedded @ head.OV.AB) @ WEIGHTS.W_U
        torch.testing.assert_close(written, fc.path_logits(trace, (source, destination)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    weights = WEIGHTS.to(dtype)
    exact = weights.to(torch.float64)
    torch.testing.assert_close(fc.copying_scores(weights).double(), fc.copying_scores(exact), rtol=1e-3, atol=1e-3)
    assert fc.ov_circuit(weights, (0, 0)).dtype == torch.float32
    assert fc.circuit_eigenvalues(weights, "QK").dtype == torch.complex64
    ratio = fc.trace_ratios(weights)
    assert float(ratio.abs().max()) <= math.sqrt(6)


def test_errors():
    for function in (fc.ov_circuit, fc.qk_circuit):
        with pytest.raises(IndexError, match=r"head is 3\.0; the model has layers 0 to 2"):
            function(WEIGHTS, (3, 0))
        with pytest.raises(ValueError, match="head is 7"):
            function(WEIGHTS, 7)
    with pytest.raises(ValueError, match="circuit is 'VO', expected one of OV, QK"):
        fc.circuit_eigenvalues(WEIGHTS, "VO")
    for arguments, message in (
        (("start", (0, 0)), "source is 'start', expected .* one of embed"),
        (("embed", "end"), "destination is 'end', expected .* one of unembed"),
        (((1, 0), (1, 1)), "source .* is not in a layer before"),
        (((0, 0), (1, 1), "X"), "kind is 'X'"),
    ):
        with pytest.raises(ValueError, match=message):
            fc.virtual_weights(WEIGHTS, *arguments)
    with pytest.raises(ValueError, match="hops is 'some'"):
        fc.virtual_weights(WEIGHTS, "embed", "unembed", hops="some")
