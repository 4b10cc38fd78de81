"""The terms of C_QK: they sum to the scores of the head, and each is what its two components make alone."""

import pytest
import torch
from support import naive
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def scores_of(w, tokens, head):
    """By hand, head by head, from the clean residual stream: [B, T, T]."""
    layer, h = head
    run, kv = naive.Run(w, tokens), w.n_heads // w.W_K.shape[1]
    x = w.W_E[tokens] + (w.W_pos[: tokens.shape[1]] if w.positional == "standard" else 0)
    for i in range(layer):
        x = x + run.outputs[i].sum(0) + (0 if w.b_O is None else w.b_O[i])
    return scores_between(w, *[naive.norm(x, w, run.scales[layer])[0]] * 2, layer, h, kv, True)


def scores_between(w, left, right, layer, h, kv, biased):
    if biased and w.positional == "shortformer":
        left, right = left + w.W_pos[: left.shape[1]], right + w.W_pos[: right.shape[1]]
    q, k = left @ w.W_Q[layer, h], right @ w.W_K[layer, h // kv]
    if biased and w.b_Q is not None:
        q, k = q + w.b_Q[layer, h], k + w.b_K[layer, h // kv]
    if w.positional == "rotary":
        q, k = naive.rotate(q, w), naive.rotate(k, w)
    return q @ k.mT / (w.attention_scale or w.d_head**0.5)


def patterns_of(scores):
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("by", ["layer", "head", "component"])
def test_terms_sum_to_the_scores(by, norm, positional):
    w, tokens = random_weights(3, norm=norm, positional=positional), random_tokens()
    run = fc.trace(w, tokens)
    for head in [(0, 1), (1, 3), (2, 0)]:
        result = fc.qk_terms(run, head, by)
        count = {"layer": 1 + head[0], "head": 1 + 4 * head[0], "component": 1 + 5 * head[0]}[by]
        assert result.values.shape == (count**2, 2, 9, 9)
        assert len(set(result.labels)) == count**2
        total = result.values.sum(0)
        exact(total, scores_of(w, tokens, head))
        exact(patterns_of(total), run.pattern(head[0])[:, head[1]])
        exact(result.share.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("norm", [None, "layernorm"])
def test_the_four_terms_of_the_article(norm):
    """direct and heads, on the side of queries and of keys, written out; value biases are the heads'."""
    w, tokens = random_weights(2, norm=norm, positional="rotary"), random_tokens()
    clean = naive.Run(w, tokens)
    parts = {"direct": w.W_E[tokens] + w.b_O[0], "heads 0": clean.outputs[0].sum(0)}
    queries, keys = {}, {}
    for name, x in parts.items():
        x, biased = naive.norm(x, w, clean.scales[1])[0], name == "direct"
        queries[name] = naive.rotate(x @ w.W_Q[1, 2] + (w.b_Q[1, 2] if biased else 0), w)
        keys[name] = naive.rotate(x @ w.W_K[1, 1] + (w.b_K[1, 1] if biased else 0), w)
    result = fc.qk_terms(fc.trace(w, tokens), (1, 2))
    assert result.labels == [(a, b) for a in parts for b in parts]
    for (a, b), values in zip(result.labels, result.values, strict=True):
        exact(values, queries[a] @ keys[b].mT / w.d_head**0.5)


def test_a_head_among_the_components_is_what_a_hook_sees_it_write():
    w, tokens = random_weights(2, norm="rmsnorm"), random_tokens()
    clean, run = naive.Run(w, tokens), fc.trace(w, tokens)
    result = fc.qk_terms(run, (1, 0), "head")
    normed = [naive.norm(x, w, clean.scales[1])[0] for x in clean.outputs[0]]
    for a in range(4):
        for b in range(4):
            at = result.labels.index((((0, a),), ((0, b),)))
            exact(result.values[at], scores_between(w, normed[a], normed[b], 1, 0, 2, False))


def test_finer_terms_sum_to_coarser_ones():
    run = fc.trace(random_weights(3, norm="layernorm"), random_tokens())
    coarse, fine = (fc.qk_terms(run, (2, 1), by) for by in ("layer", "component"))

    def group(label):
        return f"heads {label[0][0]}" if isinstance(label[0], tuple) else "direct"

    for i, (a, b) in enumerate(coarse.labels):
        mine = [j for j, (x, y) in enumerate(fine.labels) if (group(x), group(y)) == (a, b)]
        exact(fine.values[mine].sum(0), coarse.values[i])
        exact(fine.share[mine].sum(), coarse.share[i])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("store", ["patterns", "qk"])
def test_shares_are_covariances_with_the_scores(masked, store):
    w, tokens = random_weights(2, norm="layernorm"), random_tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    if masked:
        mask[0, :3], mask[1, 7:] = False, False
    run = fc.trace(w, tokens, mask, store=store)
    result = fc.qk_terms(run, (1, 1))
    total, covariances, variance = result.values.sum(0), torch.zeros(4, dtype=torch.float64), 0
    for b in range(2):
        for t in range(9):
            allowed = [s for s in range(t + 1) if mask[b, s] and mask[b, t]]
            if allowed:
                mine = total[b, t, allowed] - total[b, t, allowed].mean()
                terms = result.values[:, b, t, allowed]
                covariances += ((terms - terms.mean(-1, keepdim=True)) * mine).sum(-1)
                variance += mine.square().sum()
    exact(result.share, covariances / variance)
    few = fc.qk_terms(run, (1, 1), per_token=False)
    assert few.metric == "share"
    exact(few.values, result.share)
    assert few.top(1)[0][0] == few.labels[int(few.values.abs().argmax())]


def test_the_table_has_a_row_for_each_score():
    result = fc.qk_terms(fc.trace(random_weights(), random_tokens()), (1, 0))
    table = result.table().to_pydict()
    row = {name: column[-3] for name, column in table.items()}
    assert len(table["score"]) == 4 * 2 * 9 * 9
    assert (row["label"], row["sequence"], row["position"], row["source_position"]) == ("heads 0 -> heads 0", 1, 8, 6)
    assert row["score"] == float(result.values[3, 1, 8, 6])


def test_a_part_of_a_run_and_lower_precision():
    w, tokens = random_weights(2, norm="layernorm"), random_tokens(3)
    run = fc.trace(w, tokens)
    whole = fc.qk_terms(run, (1, 1))
    exact(fc.qk_terms(run[1:], (1, 1)).values, whole.values[:, 1:])
    single = fc.qk_terms(fc.trace(w.to(torch.float32), tokens), (1, 1))
    assert single.values.dtype == torch.float32
    torch.testing.assert_close(single.values.double(), whole.values, rtol=1e-4, atol=1e-4)


BAD = {
    "head": (lambda run: fc.qk_terms(run, (2, 0)), IndexError, "head is 2.0; the model has layers 0 to 1"),
    "no pair": (lambda run: fc.qk_terms(run, 3), ValueError, r"head is 3, expected \(layer, head\)"),
    "by": (
        lambda run: fc.qk_terms(run, (1, 0), "order"),
        ValueError,
        "by is 'order', expected one of layer, head, comp",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    function, error, message = BAD[what]
    with pytest.raises(error, match=message):
        function(fc.trace(random_weights(), random_tokens()))
