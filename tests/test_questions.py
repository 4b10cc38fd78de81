"""What a model is asked: other metrics, tokens and positions than the loss of the next token; two vocabularies."""

from types import SimpleNamespace

import pytest
import torch
from support import naive
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.adapters.start import start_of

TOKENS = random_tokens(3)
ANSWERS, OTHERS = torch.tensor([2, 0, 3]), torch.tensor([1, 1, 0])
CLASSES = random_weights(2, norm="layernorm", predicted=5)
LAST = {"targets": ANSWERS, "positions": -1}
METRICS = ("nll", "kl", "logit_difference", "probability", "rank", "top1")


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def by_hand(metric, logits, clean, targets, against):
    """A metric of logits [..., N, V'] at N positions whose clean logits are [N, V']: [..., N]."""

    def of(tokens, x):
        return x.gather(-1, tokens.expand(x.shape[:-1])[..., None])[..., 0]

    larger = (logits > of(targets, logits)[..., None]).sum(-1).double()
    return {
        "nll": lambda: -of(targets, logits.log_softmax(-1)),
        "kl": lambda: (clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum(-1),
        "logit_difference": lambda: of(targets, logits) - of(against, logits),
        "probability": lambda: of(targets, logits.softmax(-1)),
        "rank": lambda: larger,
        "top1": lambda: (larger == 0).double(),
    }[metric]()


def question(metric, targets=ANSWERS):
    tokens = {} if metric == "kl" else {"targets": targets}
    return tokens | ({"against": OTHERS} if metric == "logit_difference" else {})


def order_logits(run):
    """With all paths of order at most k, k = 0..L, [L + 1, B, T, V']."""
    w = run.weights
    by_order = [
        sum(fc.path_logits(run, path) for path in fc.enumerate_paths(w.n_layers, w.n_heads, k))
        for k in range(w.n_layers + 1)
    ]
    return torch.stack(by_order).cumsum(0)


class TestOrders:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
    @pytest.mark.parametrize("predicted", [97, 5])
    def test_every_metric_at_one_position(self, metric, norm, predicted):
        run = fc.trace(random_weights(2, norm=norm, predicted=predicted), TOKENS)
        logits, clean = order_logits(run)[..., -1, :], run.logits()[:, -1]
        expected = by_hand(metric, logits, clean, ANSWERS, OTHERS)
        asked = {"metric": metric, "positions": -1, **question(metric)}
        exact(fc.order_losses(run, **asked), expected.mean(-1))
        exact(fc.order_losses(run, 1, **asked), expected[:2].mean(-1))
        per_token = fc.order_losses(run, **asked, per_token=True)
        assert per_token.shape == (3, 3, 9)
        exact(per_token[..., -1], expected)
        assert per_token[..., :-1].isnan().all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_several_positions_of_padded_sequences(self, metric):
        w, mask = random_weights(2, norm="rmsnorm"), torch.ones(3, 9, dtype=torch.bool)
        mask[1, 6:] = False
        run = fc.trace(w, TOKENS, mask)
        real = mask[:, 1:] & mask[:, :-1]
        following = TOKENS[:, 1:][real]
        against = OTHERS[:, None].expand(3, 8)[real]
        expected = by_hand(
            metric, order_logits(run)[:, :, :-1][:, real], run.logits()[:, :-1][real], following, against
        )
        asked = {"metric": metric, **question(metric, None)}
        exact(fc.order_losses(run, **asked), expected.mean(-1))
        per_token = fc.order_losses(run, **asked, per_token=True)
        assert per_token.shape == (3, 3, 8)
        exact(per_token[:, real], expected)
        assert per_token[:, ~real].isnan().all()

    def test_the_last_order_is_the_model(self):
        run = fc.trace(CLASSES, TOKENS)
        for metric in ("nll", "rank", "top1", "probability"):
            clean = fc.head_ablation(run, metric=metric, **LAST).baseline
            exact(fc.order_losses(run, metric=metric, **LAST)[-1], clean)

    @pytest.mark.parametrize("metric", METRICS)
    def test_marginals(self, metric):
        run = fc.trace(random_weights(2, norm="layernorm", predicted=5), TOKENS)
        direct = fc.path_logits(run, ())
        single = [sum(fc.path_logits(run, [(layer, h)]) for h in range(4)) for layer in range(2)]

        def measured(logits):
            return by_hand(metric, logits[:, -1], run.logits()[:, -1], ANSWERS, OTHERS)

        better = 1 if metric in ("logit_difference", "probability", "top1") else -1
        asked = {"metric": metric, "positions": -1, **question(metric)}
        found, each = fc.layer_marginals(run, **asked), fc.layer_marginals(run, **asked, per_token=True)
        for layer in range(2):
            rest = direct + single[1 - layer]
            given_direct = better * (measured(direct + single[layer]) - measured(direct))
            given_rest = better * (measured(rest + single[layer]) - measured(rest))
            for whole, tokenwise, expected in zip((x[layer] for x in found), (x[layer] for x in each), (given_direct, given_rest), strict=True):  # fmt: skip
                exact(whole, expected.mean())
                exact(tokenwise[:, -1], expected)

    @pytest.mark.parametrize("metric", ["nll", "kl", "rank"])
    def test_work_is_cut(self, metric, monkeypatch):
        run, done = fc.trace(random_weights(3, norm="layernorm"), random_tokens(7)), []
        asked = {"metric": metric, "targets": 3, "positions": [2, -1]}
        whole = fc.order_losses(run, **asked), *fc.layer_marginals(run, **asked)
        monkeypatch.setattr("pyfastcircuits.run.memory.BLOCK_BYTES", 1 << 11)
        parts = fc.order_losses(run, **asked, progress=done.append), *fc.layer_marginals(run, **asked)
        for a, b in zip(whole, parts, strict=True):
            exact(a, b)
        assert len(done) > 2
        assert sum(done) == pytest.approx(4)

    def test_losses_of_answers_learn(self):
        w = random_weights(2, norm="rmsnorm", predicted=5)
        w.W_O.requires_grad_()

        def loss(w):
            return fc.order_losses(fc.trace(w, TOKENS), 1, **LAST).sum()

        (gradient,) = torch.autograd.grad(loss(w), w.W_O)
        step = torch.randn(w.W_O.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
        with torch.no_grad():
            moved = [loss(fc.CircuitWeights(**dict(w.tensors()) | {"W_O": w.W_O + sign * step}, norm="rmsnorm", positional="shortformer")) for sign in (1, -1)]  # fmt: skip
        torch.testing.assert_close((gradient * step).sum(), (moved[0] - moved[1]) / 2, rtol=1e-6, atol=0)
        assert not fc.order_losses(fc.trace(w, TOKENS), metric="probability", **LAST).requires_grad

    def test_bad_questions(self):
        run = fc.trace(random_weights(), TOKENS)
        for function in (fc.order_losses, fc.layer_marginals):
            with pytest.raises(ValueError, match="metric is 'accuracy', expected one of nll"):
                function(run, metric="accuracy")
            with pytest.raises(ValueError, match="against is missing, but metric is 'logit_difference'"):
                function(run, metric="logit_difference")
            with pytest.raises(
                ValueError, match="positions holds the last one, 8, which has no next token: give targets"
            ):
                function(run, positions=-1)
            with pytest.raises(IndexError, match="targets is 97, expected 0 to 96"):
                function(run, targets=97)


class TestTwoVocabularies:
    def test_a_run(self):
        run = fc.trace(CLASSES, TOKENS)
        exact(run.logits(), naive.Run(CLASSES, TOKENS).logits)
        assert (CLASSES.d_vocab, CLASSES.d_vocab_out, run.logits().shape) == (97, 5, (3, 9, 5))
        exact(order_logits(run)[-1], run.logits())

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("low_memory", [False, True])
    def test_heads_by_every_metric_are_reruns(self, metric, low_memory):
        run, clean = fc.trace(CLASSES, TOKENS), naive.Run(CLASSES, TOKENS).logits[:, -1]
        asked = {"metric": metric, "positions": -1, "low_memory": low_memory, **question(metric)}
        found = fc.head_ablation(run, attention="recomputed", **asked)
        for layer in range(2):
            for head in range(4):
                logits = naive.Run(CLASSES, TOKENS, zero={(layer, head)}).logits[:, -1]
                torch.testing.assert_close(
                    found.values[layer, head],
                    by_hand(metric, logits, clean, ANSWERS, OTHERS).mean(),
                    rtol=1e-8,
                    atol=1e-9,
                )
        exact(found.baseline, by_hand(metric, clean, clean, ANSWERS, OTHERS).mean())

    @pytest.mark.parametrize("metric", METRICS)
    def test_every_experiment(self, metric):
        run, other = fc.trace(CLASSES, TOKENS), fc.trace(CLASSES, TOKENS.flip(1))
        asked = {"metric": metric, "positions": -1, **question(metric)}
        for found in (
            fc.pair_ablation(run, **asked),
            fc.pair_ablation(run, "joint", **asked),
            fc.layer_ablation(run, **asked),
            fc.path_ablation(run, [(), [(0, 1)], [(0, 1), (1, 2)]], **asked),
            fc.composition_ablation(run, "K", **asked),
            fc.activation_patching(run, other, **asked),
            fc.path_patching(run, other, "V", **asked),
            fc.logit_lens(run, **asked),
        ):
            assert found.values.isfinite().all()
        if metric in ("nll", "logit_difference", "probability"):
            assert fc.edge_attribution(run, other, "Q", exact=2, **asked).values.isfinite().all()
        parts = fc.direct_logit_attribution(run, **LAST)
        exact(parts.values.sum(), run.logits()[:, -1].gather(1, ANSWERS[:, None]).mean())

    def test_the_next_token_is_none(self):
        run, message = fc.trace(CLASSES, TOKENS), "d_vocab_out is 5, but d_vocab is 97: targets must be given"
        for ask in (
            fc.order_losses,
            fc.layer_marginals,
            fc.head_ablation,
            fc.pair_ablation,
            fc.logit_lens,
            fc.direct_logit_attribution,
            lambda run: fc.head_ablation(run, metric="rank", positions=3),
            lambda run: fc.sweep(CLASSES, TOKENS),
        ):
            with pytest.raises(ValueError, match=message):
                ask(run)
        for ask in (lambda: run.loss, lambda: run.token_losses, lambda: run.stream_losses(run.final[None])):
            with pytest.raises(ValueError, match="d_vocab is 97: no next token is predicted, so a run has no loss"):
                ask()
        with pytest.raises(IndexError, match="targets is 5, expected 0 to 4"):
            fc.head_ablation(run, targets=5)
        assert fc.head_ablation(run, metric="kl").values.isfinite().all()

    def test_a_vocabulary_that_is_larger_than_the_one_that_is_read(self):
        w = random_weights(1, vocabulary=7, predicted=30)
        run = fc.trace(w, random_tokens(2, 9, 7))
        exact(fc.head_ablation(run, targets=29).baseline, -run.logits().log_softmax(-1)[:, :-1, 29].mean())
        assert fc.ov_circuit(w, (0, 0)).shape == (7, 30)
        with pytest.raises(IndexError, match=r"tokens\[.*\] is .*, expected 0 to 6"):
            fc.trace(w, torch.tensor([[1, 29]]))

    def test_circuits(self):
        W_E, W_U = CLASSES.W_E, CLASSES.W_U
        exact(fc.bigrams(CLASSES).AB, W_E @ W_U)
        exact(fc.ov_circuit(CLASSES, (1, 2)).AB, W_E @ CLASSES.W_V[1, 1] @ CLASSES.W_O[1, 2] @ W_U)
        assert fc.ov_tables(CLASSES, (1, 2)).token.shape == (97, 5)
        best = fc.top_entries(fc.bigrams(CLASSES), 3, normalize="center")
        centered = W_E @ W_U - (W_E @ W_U).mean(1, keepdim=True)
        exact(best.values, centered.flatten().sort(descending=True).values[:3])
        exact(centered[best.rows, best.columns], best.values)
        found = fc.skip_trigrams(CLASSES, (0, 0), k=5)
        assert found.outputs.shape == found.destinations.shape == (97, 5)
        assert int(found.outputs.max()) == 4
        assert fc.circuit_eigenvalues(CLASSES, "QK").shape == (2, 4, 6)
        assert fc.virtual_weights(CLASSES, (0, 0), "unembed").shape == (6, 5)
        assert fc.composition_scores(CLASSES, "K").shape == (2, 4, 2, 4)

    @pytest.mark.parametrize(
        ("ask", "message"),
        [
            (lambda: fc.copying_scores(CLASSES), "an OV circuit that is not square has no eigenvalues"),
            (lambda: fc.circuit_eigenvalues(CLASSES, "OV"), "an OV circuit that is not square has no eigenvalues"),
            (lambda: fc.copying_accuracy(CLASSES), "no head can raise the token it attends to"),
            (lambda: fc.skip_trigrams(CLASSES, (0, 0), k=2, among=[1, 2]), "among is given, but a destination is no"),
            (lambda: fc.induction_heads(CLASSES), "no head copies what it finds"),
        ],
    )
    def test_what_needs_one_vocabulary(self, ask, message):
        with pytest.raises(ValueError, match=f"d_vocab_out is 5, but d_vocab is 97: {message}"):
            ask()

    def test_ranks_need_a_square(self):
        with pytest.raises(ValueError, match=r"matrix has shape \[97, 5\], expected a square one"):
            fc.diagonal_ranks(fc.ov_circuit(CLASSES, (0, 0)))

    def test_heads_are_scored_by_what_they_attend_to(self):
        w = random_weights(2, positional="none")
        classes = fc.CircuitWeights(**dict(w.tensors()) | {"W_U": w.W_U[:, :5], "b_U": w.b_U[:5]})
        found, whole = fc.head_scores(classes, length=5), fc.head_scores(w, length=5)
        assert set(whole.measured) - set(found.measured) == {"copying"}
        for name in found.measured:
            exact(getattr(found, name), getattr(whole, name))


class TestSweeps:
    def test_orders_are_of_the_same_question(self):
        run = fc.trace(CLASSES, TOKENS)
        for metric in METRICS:
            asked = {"metric": metric, "positions": -1, **question(metric), "targets": ANSWERS}
            found = fc.sweep(CLASSES, TOKENS, "head", **asked)
            assert torch.equal(found.orders, fc.order_losses(run, **LAST))
            assert torch.equal(found.marginals.given_rest, fc.layer_marginals(run, **LAST).given_rest)
            assert torch.equal(found.result.values, fc.head_ablation(run, **asked, kl=True).values)
        by_object = fc.sweep(CLASSES, TOKENS, "head", metric=fc.Rank(ANSWERS), positions=-1)
        assert torch.equal(by_object.orders, fc.order_losses(run, **LAST))

    def test_examples_are_of_the_answers(self):
        found = fc.sweep(CLASSES, TOKENS, "head", **LAST)
        again = fc.head_ablation(fc.trace(CLASSES, TOKENS), **LAST, per_token=True)
        for (label, _), example in zip(found.result.top(3), found.examples(3, context=4), strict=True):
            harm = again.delta[label[0]][:, -1]
            sequence = int(harm.argmax())
            assert example.target == ANSWERS[sequence]
            assert example.context == TOKENS[sequence, -4:].tolist()
            assert example.ablated - example.clean == pytest.approx(float(harm.max()))


class TestAttribution:
    def test_metrics_that_are_linear(self):
        run = fc.trace(CLASSES, TOKENS)
        logit = fc.direct_logit_attribution(run, metric="logit", **LAST)
        assert logit.metric == "logit"
        assert torch.equal(logit.values, fc.direct_logit_attribution(run, **LAST).values)
        difference = fc.direct_logit_attribution(run, metric="logit_difference", against=OTHERS, **LAST)
        assert difference.metric == "logit_difference"
        exact(difference.values, logit.values - fc.direct_logit_attribution(run, targets=OTHERS, positions=-1).values)
        for same in (
            fc.direct_logit_attribution(run, against=OTHERS, **LAST),
            fc.direct_logit_attribution(run, metric=fc.LogitDifference(ANSWERS, OTHERS), positions=-1),
        ):
            assert torch.equal(same.values, difference.values)
            assert same.metric == "logit_difference"

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"metric": "nll"}, "metric is 'nll', which is not linear .* expected 'logit' or 'logit_difference'"),
            ({"metric": "probability", "against": 3}, "metric is 'probability', which is not linear"),
            ({"metric": fc.KL()}, r"metric is KL\(...\), which is not linear"),
            ({"metric": "logit_difference"}, "against is missing, but metric is 'logit_difference'"),
            ({"metric": "logit", "against": 3}, "against is given, but metric is 'logit'"),
            ({"metric": fc.LogitDifference(1, 2), "targets": 3}, "which holds its tokens: give them there alone"),
            ({"metric": "accuracy"}, "metric is 'accuracy', expected one of .* logit"),
        ],
    )
    def test_other_metrics_are_no_sums(self, asked, message):
        with pytest.raises(ValueError, match=message):
            fc.direct_logit_attribution(fc.trace(random_weights(), TOKENS), **asked)


def lens(prepended, token):
    return SimpleNamespace(
        cfg=SimpleNamespace(default_prepend_bos=prepended), tokenizer=SimpleNamespace(bos_token_id=token)
    )


def hugging_face(token, generated=None):
    config = SimpleNamespace(model_type="gpt2", bos_token_id=token)
    return SimpleNamespace(config=config, generation_config=SimpleNamespace(bos_token_id=generated))


@pytest.mark.parametrize(
    ("model", "start"),
    [
        (lens(True, 11), 11),
        (lens(False, 11), None),
        (SimpleNamespace(cfg=SimpleNamespace(default_prepend_bos=True), tokenizer=None), None),
        (hugging_face(7), 7),
        (hugging_face(None, 9), 9),
        (hugging_face(97, 9), 9),
        (hugging_face(None), None),
        (SimpleNamespace(config=SimpleNamespace(model_type="gpt2")), None),
        (CLASSES, None),
    ],
)
def test_the_start_token_of_a_model(model, start):
    assert start_of(model, 97) == start


def test_heads_rest_on_the_models_own_start_token(monkeypatch):
    w, seen = random_weights(2), []

    def trace(model, tokens, **more):
        seen.append(tokens)
        return fc.trace(w, tokens)

    monkeypatch.setattr("pyfastcircuits.experiments.heads.trace", trace)
    for model, given, start in ((hugging_face(7), None, 7), (lens(True, 11), None, 11), (lens(False, 11), None, 0), (hugging_face(7), 3, 3)):  # fmt: skip
        found = fc.head_scores(model, weights=w, length=5, batches=1, **({} if given is None else {"start": given}))
        assert found.setup["start"] == start
        assert bool((seen[-1][:, 0] == start).all())
        assert not bool((seen[-1][:, 1:] == start).any())
