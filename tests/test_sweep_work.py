"""Chunks of a sweep: whatever the cut, the same effects of each sequence, means and standard errors."""

import itertools

import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc
from pyfastcircuits.sweeps.corpus import Given
from pyfastcircuits.sweeps.moments import Moments
from pyfastcircuits.sweeps.work import WORK, Cut, ablate, experiments, work

WEIGHTS, TOKENS = random_weights(3, norm="rmsnorm"), random_tokens(5, 11)


def findings(made, cut, tokens=TOKENS):
    for chunk in cut.chunks(len(tokens), len(made.labels)):
        before = made.trace(tokens.roll(1, 0)[chunk.sequences]) if made.mode == "resample" else None
        yield made.run(chunk, made.trace(tokens[chunk.sequences]), before)


def gathered(made, cut, tokens=TOKENS):
    total = Moments.of(made)
    for found in findings(made, cut, tokens):
        total.add(found)
    return total


@pytest.mark.parametrize("case", ["path", "direct", "edge recomputed", "joint", "head mean", "layer resample"])
@pytest.mark.parametrize("cut", [Cut(2, 7), Cut(5, 1000)])
def test_chunks_add_up_to_the_whole_run(case, cut):
    """Means are those of one run over everything; sequences and standard errors those of each position's values."""
    scope, *more = case.split()
    mode = next((x for x in more if x in ("mean", "resample")), "zero")
    attention = "recomputed" if "recomputed" in more else "frozen"
    made = work(WEIGHTS, WEIGHTS, scope, mode, attention, {}, Given(TOKENS))
    assert sorted(map(str, made.labels)) == sorted(map(str, experiments(WEIGHTS, scope)))
    run = fc.trace(WEIGHTS, TOKENS)
    whole = ablate(run, scope, mode, attention, {"per_token": True, "kl": True}, made.labels)
    total = gathered(made, cut)
    for name, values in (("nll", whole.delta), ("kl", whole.kl)):
        by_sequence = values.mean(-1)
        error = by_sequence.std(1) / len(TOKENS) ** 0.5
        torch.testing.assert_close(total.mean(name), by_sequence.mean(1), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(total.standard_error(name), error, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(total.baseline, run.loss)
    expected = [run.loss[None], fc.order_losses(run), *fc.layer_marginals(run)]
    torch.testing.assert_close(total.mean_losses, torch.cat(expected))


def test_sums_do_not_depend_on_the_cut_where_values_do_not():
    made = work(WEIGHTS, WEIGHTS, "path", "zero", "frozen", {}, Given(TOKENS))
    (found,) = findings(made, Cut(5, 1000))
    whole, parts = Moments.of(made), Moments.of(made)
    whole.add(found)
    for chunk in Cut(2, 13).chunks(5, len(made.labels)):
        rows, some = chunk.sequences, chunk.experiments
        losses = found.losses[rows] if some.start == 0 else found.losses[rows, :0]
        effects = {name: x[rows, some] for name, x in found.effects.items()}
        parts.add(type(found)(chunk, found.positions[rows], effects, found.clean[rows], losses))
    for name in made.metrics:
        assert torch.equal(whole.mean(name), parts.mean(name))
        assert torch.equal(whole.standard_error(name), parts.standard_error(name))
    assert torch.equal(whole.losses, parts.losses)
    both = whole + parts
    torch.testing.assert_close(both.mean("nll"), whole.mean("nll"))
    assert torch.equal(both.sequences, 2 * whole.sequences)


def test_sequences_of_different_lengths_count_by_their_positions():
    where = torch.zeros(5, 11, dtype=torch.bool)
    for i, last in enumerate((1, 4, 9, 0, 10)):
        where[i, :last] = True
    made = work(WEIGHTS, WEIGHTS, "head", "zero", "frozen", {"positions": where}, Given(TOKENS))
    total, run = gathered(made, Cut(2, 5)), fc.trace(WEIGHTS, TOKENS)
    torch.testing.assert_close(total.mean("nll"), fc.head_ablation(run, positions=where).delta.flatten())
    values = fc.head_ablation(run, positions=where, per_token=True).delta.flatten(0, 1)
    sums, counts = values.nansum(-1), where.sum(-1)
    mean = sums.sum(1) / counts.sum()
    left = (sums - mean[:, None] * counts)[:, counts > 0]
    error = (left.square().sum(1) * 4 / 3).sqrt() / counts.sum()
    torch.testing.assert_close(total.standard_error("nll"), error)
    assert total.sequences.tolist() == [4] * len(made.labels)


def test_tokens_asked_about_are_cut_too():
    targets, against = TOKENS.flip(1), torch.tensor([1, 2, 3, 4, 5])
    options = {"metric": "logit_difference", "targets": targets, "against": against, "positions": [2, -1]}
    made = work(WEIGHTS, WEIGHTS, "layer", "zero", "frozen", options, Given(TOKENS))
    expected = fc.layer_ablation(fc.trace(WEIGHTS, TOKENS), kl=True, **options)
    total = gathered(made, Cut(2, 2))
    torch.testing.assert_close(total.mean("logit_difference"), expected.delta)
    torch.testing.assert_close(total.mean("kl"), expected.kl)
    torch.testing.assert_close(total.baseline, expected.baseline)


def test_one_sequence_has_no_standard_error():
    made = work(WEIGHTS, WEIGHTS, "layer", "zero", "frozen", {}, Given(TOKENS[:1]))
    assert gathered(made, Cut(2, 2), TOKENS[:1]).standard_error("nll").isnan().all()


def test_chunks_cover_everything_once():
    for sequences, count, cut in ((5, 48, Cut(2, 7)), (1, 1, Cut(4, 4)), (4, 0, Cut(3, 9))):
        cells = [
            (i, j)
            for chunk in cut.chunks(sequences, count)
            for i in range(*chunk.sequences.indices(sequences))
            for j in range(*chunk.experiments.indices(count))
        ]
        assert sorted(cells) == list(itertools.product(range(sequences), range(count)))
        assert [x.index for x in cut.chunks(sequences, count)] == list(range(len(list(cut.chunks(sequences, count)))))
    endless = itertools.islice(Cut(2, 7).chunks(None, 10), 4)
    assert [(x.sequences.start, x.experiments.start) for x in endless] == [(0, 0), (0, 7), (2, 0), (2, 7)]


def test_chunks_take_seconds():
    """All experiments of some sequences; where those of one take long, so many that the clean logits are a fiftieth."""
    small = work(WEIGHTS, WEIGHTS, "path", "zero", "frozen", {}, Given(TOKENS))
    assert small.cut(512).experiments == 48
    assert small.cut(512).sequences > small.cut(1024).sequences > 1
    wide = random_weights(4, 16, 16, 256, 16, 60_000, biases=False, dtype=torch.float32)
    large = work(wide, wide, "path", "zero", "frozen", {}, Given(TOKENS))
    assert large.cut(64) == Cut(1, 1536)
    cut = large.cut(2048)
    assert cut.sequences == 1
    assert 50 * 256 <= cut.experiments * 16 < 1536 * 16


def test_chunks_make_bases_for_several_sequences():
    """Each chunk makes W_O @ W_U of all destinations anew: a quarter of the work on one sequence of this size."""
    layers, heads, d, r, vocabulary, length = 2, 8, 768, 64, 20_000, 128
    pairs = heads**2
    cut = Cut.of((layers, d, r, vocabulary), "path", "frozen", pairs, length, 1, WORK["cpu"])
    bases = heads * r * d * vocabulary
    paths, others = pairs * length * vocabulary * r, (3 * layers + 5) * length * vocabulary * d
    assert cut.experiments == pairs
    assert bases < (paths + others) * cut.sequences / 20


def test_an_error_says_in_which_sequences():
    made = work(WEIGHTS, WEIGHTS, "layer", "zero", "frozen", {}, Given(TOKENS))
    with pytest.raises(IndexError, match=r"tokens\[0, 0\] is 97, .* \(of sequences 7 to 8\)"):
        made.trace(torch.full((2, 5), 97), 7)


@pytest.mark.parametrize("learns", [False, True])
def test_per_sequence_is_the_mean_of_per_token(learns):
    weights = random_weights(2)
    weights.W_O.requires_grad_(learns)
    run = fc.trace(weights, TOKENS, (TOKENS > 20).long().index_fill(1, torch.tensor([0, 1]), 1))
    found, single = (fc.pair_ablation(run, kl=True, **{f"per_{x}": True}) for x in ("sequence", "token"))
    assert found.values.requires_grad == learns
    torch.testing.assert_close(found.delta, single.delta.nanmean(-1))
    torch.testing.assert_close(found.kl, single.kl.nanmean(-1))
    torch.testing.assert_close(found.baseline, single.baseline.nanmean(-1))
    assert found.table().num_rows == found.delta.numel()
    with pytest.raises(ValueError, match="per_sequence is True, but per_token is too"):
        fc.pair_ablation(run, per_sequence=True, per_token=True)
