"""Path expansion: identities of the article, in fp64."""

import math

import pytest
import torch
from support import naive
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc


def all_paths(w):
    return [path for k in range(w.n_layers + 1) for path in fc.enumerate_paths(w.n_layers, w.n_heads, k)]


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_all_paths_sum_to_the_logits(layers, norm, positional):
    w = random_weights(layers, norm=norm, positional=positional)
    run = fc.trace(w, random_tokens())
    total = sum(fc.path_logits(run, path) for path in all_paths(w))
    torch.testing.assert_close(total, naive.Run(w, random_tokens()).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2, 4])
def test_graded_recursion_is_the_articles_rerun_algorithm(layers, biases, norm):
    w = random_weights(layers, 3, 3, norm=norm, biases=biases, positional="standard")
    tokens = random_tokens()
    run = fc.trace(w, tokens)
    expected = torch.stack(naive.order_losses_by_reruns(w, tokens))
    torch.testing.assert_close(fc.order_losses(run), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(fc.order_losses(run)[-1], run.loss, rtol=1e-12, atol=0)
    for order in range(layers + 1):
        torch.testing.assert_close(fc.order_losses(run, order), expected[: order + 1], rtol=1e-11, atol=0)


def test_orders_are_sums_of_path_logits():
    w = random_weights(3, norm="rmsnorm")
    tokens = random_tokens()
    run = fc.trace(w, tokens)
    logits = torch.zeros(2, 9, 97, dtype=torch.float64)
    for k, loss in enumerate(fc.order_losses(run)):
        logits += sum(fc.path_logits(run, path) for path in fc.enumerate_paths(3, 4, k))
        torch.testing.assert_close(loss, naive.loss(logits, tokens), rtol=1e-11, atol=0)
    per_token = fc.order_losses(run, 1, per_token=True)
    assert per_token.shape == (2, 2, 8)
    torch.testing.assert_close(per_token.mean((1, 2)), fc.order_losses(run, 1))


def test_layer_marginals_are_differences_of_losses():
    w, tokens = random_weights(3, norm="layernorm"), random_tokens()
    run = fc.trace(w, tokens)
    direct = fc.path_logits(run, ())
    single = [sum(fc.path_logits(run, [(layer, h)]) for h in range(4)) for layer in range(3)]
    marginals = fc.layer_marginals(run)
    for layer in range(3):
        rest = direct + sum(s for other, s in enumerate(single) if other != layer)
        given_direct = naive.loss(direct, tokens) - naive.loss(direct + single[layer], tokens)
        given_rest = naive.loss(rest, tokens) - naive.loss(rest + single[layer], tokens)
        torch.testing.assert_close(marginals.given_direct[layer], given_direct, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(marginals.given_rest[layer], given_rest, rtol=1e-9, atol=1e-12)
    assert fc.layer_marginals(fc.trace(random_weights(0), tokens)).given_rest.shape == (0,)


class TestTensorProductNotation:
    """The article's A (x) W acts on X [T, d] as A X W in row convention; vec is row-major here."""

    def setup_method(self):
        self.w = random_weights(2, 2, 2, d=7, r=3, vocabulary=11, biases=False, positional="none")
        self.tokens = random_tokens(1, 5, 11)
        self.run = fc.trace(self.w, self.tokens)
        self.X = torch.nn.functional.one_hot(self.tokens[0], 11).double()
        self.A = [self.run.pattern(layer)[0] for layer in range(2)]

    def ov(self, layer, head):
        return self.w.W_V[layer, head] @ self.w.W_O[layer, head]

    def product(self, A, W):
        """(A (x) W) X as one Kronecker matrix on vec(X)."""
        return (torch.kron(A, W.T.contiguous()) @ self.X.flatten()).view(len(A), W.shape[1])

    def test_a_head_is_a_tensor_product(self):
        circuit = self.w.W_E @ self.ov(0, 1) @ self.w.W_U
        torch.testing.assert_close(fc.path_logits(self.run, [(0, 1)])[0], self.product(self.A[0][1], circuit))

    def test_the_direct_path_is_the_identity_with_the_bigram_table(self):
        bigrams = self.product(torch.eye(5, dtype=torch.float64), self.w.W_E @ self.w.W_U)
        torch.testing.assert_close(fc.path_logits(self.run, ())[0], bigrams)

    def test_two_heads_compose_by_the_mixed_product_property(self):
        A1, A2 = self.A[0][0], self.A[1][1]
        circuit = self.w.W_E @ self.ov(0, 0) @ self.ov(1, 1) @ self.w.W_U
        composed = self.product(A2 @ A1, circuit)
        torch.testing.assert_close(fc.path_logits(self.run, [(0, 0), (1, 1)])[0], composed)
        first = torch.kron(A1, (self.w.W_E @ self.ov(0, 0)).T.contiguous())
        second = torch.kron(A2, (self.ov(1, 1) @ self.w.W_U).T.contiguous())
        torch.testing.assert_close((second @ first @ self.X.flatten()).view(5, 11), composed)

    def test_the_two_layer_equation(self):
        eye = torch.eye(5, dtype=torch.float64)
        total = self.product(eye, self.w.W_E @ self.w.W_U)
        for layer in range(2):
            for h in range(2):
                total = total + self.product(self.A[layer][h], self.w.W_E @ self.ov(layer, h) @ self.w.W_U)
        for h1 in range(2):
            for h2 in range(2):
                virtual = self.A[1][h2] @ self.A[0][h1]
                total = total + self.product(virtual, self.w.W_E @ self.ov(0, h1) @ self.ov(1, h2) @ self.w.W_U)
        torch.testing.assert_close(total, self.run.logits()[0])

    def test_scores_of_layer_two_are_the_four_terms(self):
        w, scale = self.w, self.w.d_head**0.5
        x0 = w.W_E[self.tokens[0]]
        written = [self.A[0][h] @ x0 @ self.ov(0, h) for h in range(2)]
        qk = w.W_Q[1, 0] @ w.W_K[1, 0].T
        sources = [x0, *written]
        scores = sum(a @ qk @ b.T for a in sources for b in sources) / scale
        hidden = ~torch.ones(5, 5).tril().bool()
        torch.testing.assert_close(scores.masked_fill(hidden, -torch.inf).softmax(-1), self.A[1][0])


@pytest.mark.parametrize(("layers", "heads"), [(0, 3), (1, 5), (3, 2), (4, 3)])
def test_paths_are_counted_and_enumerated(layers, heads):
    counts = fc.count_paths(layers, heads)
    assert counts == [math.comb(layers, k) * heads**k for k in range(layers + 1)]
    for order, count in enumerate(counts):
        paths = fc.enumerate_paths(layers, heads, order)
        assert len(set(paths)) == count
        assert paths == sorted(paths)
    assert fc.enumerate_paths(layers, heads, layers + 1) == []


def test_counts_beyond_64_bits():
    assert fc.count_paths(80, 64)[40] == math.comb(80, 40) * 64**40


BAD = {
    "decreasing": ([(1, 0), (0, 0)], ValueError, r"path \(\(1, 0\), \(0, 0\)\): layers must increase"),
    "equal": ([(1, 0), (1, 1)], ValueError, "layers must increase"),
    "layer": ([(2, 0)], IndexError, r"goes through head 2.0; the model has layers 0 to 1"),
    "head": ([(0, 4)], IndexError, r"goes through head 0.4; .* heads 0 to 3"),
    "negative": ([(0, -1)], IndexError, r"head 0.-1"),
    "not pairs": ((0, 1), ValueError, r"path is \(0, 1\), expected a tuple of \(layer, head\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_paths_are_named(what):
    path, error, message = BAD[what]
    run = fc.trace(random_weights(), random_tokens())
    with pytest.raises(error, match=message):
        fc.path_logits(run, path)
    with pytest.raises(error, match=message):
        fc.path_ablation(run, [path])


@pytest.mark.parametrize("order", [-1, 3])
def test_bad_orders_are_named(order):
    run = fc.trace(random_weights(), random_tokens())
    with pytest.raises(ValueError, match=f"max_order is {order}, expected 0 to 2"):
        fc.order_losses(run, order)
