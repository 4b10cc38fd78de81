"""Every family and its variants: experiments are plain reruns of the model's own modules, tables its own scores."""

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import (  # noqa: E402
    ALONE,
    CONFIGURATIONS,
    LATENT,
    WITHOUT_QK,
    build,
    nothing_in_fp32,
    tokens,
)
from support.configurations import FAMILIES as ONE_OF_EACH  # noqa: E402
from support.modules import NAMES  # noqa: E402
from support.plain import Plain  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.adapters.families import FAMILIES  # noqa: E402
from pyfastcircuits.model.queries import queries_or_keys  # noqa: E402
from pyfastcircuits.run.paths import order_streams  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def exact(ours, theirs, digits=1e-9):
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= digits, f"relative error {error:.3g}"


def nll(logits, given):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())


@lru_cache
def case(name):
    """A model, and a clean and a corrupted run of ours and of the oracle's."""
    model, given, others = build(name), tokens(), tokens(seed=1)
    with nothing_in_fp32(model):
        runs = [fc.trace(model, x) for x in (given, others)]
        return SimpleNamespace(
            model=model, given=given, run=runs[0], other=runs[1], plain=Plain(model, given), corrupted=Plain(model, others)
        )  # fmt: skip


def summed(run):
    """The logits of all paths."""
    cap, logits = run.weights.logit_cap, run.unembed(order_streams(run, run.weights.n_layers).sum(0))
    return logits if cap is None else cap * (logits / cap).tanh()


def test_every_family_has_a_configuration():
    assert {build(name).config.model_type for name in CONFIGURATIONS} == set(FAMILIES)
    assert set(NAMES) <= set(FAMILIES)


@every_configuration
def test_paths_and_heads_are_the_models(name):
    c = case(name)
    exact(c.run.logits(), c.plain.clean_logits)
    exact(summed(c.run), c.plain.clean_logits)
    for layer in range(c.run.weights.n_layers):
        exact(c.run.streams[layer], c.plain.clean_streams[layer])
        theirs = torch.stack([c.plain.clean_z[layer, head] for head in range(c.run.weights.n_heads)])
        exact(c.run.z(layer), theirs)


@every_configuration
def test_the_sum_over_paths_of_the_model_as_it_is(name):
    """Their norms and softmax in fp32 included, which round alike for both; of a layernorm the mean is rounded too."""
    model = case(name).model
    with torch.no_grad():
        theirs = model(tokens(), use_cache=False).logits  # a cache rounds otherwise in fp32
        exact(summed(fc.trace(model, tokens())), theirs, 1e-9)


@every_configuration
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_head_ablation(name, attention):
    c, sets = case(name), [[(0, 1)], [(0, 0), (1, 0), (1, 1)]]
    with nothing_in_fp32(c.model):
        found = fc.head_ablation(c.run, "zero", attention, heads=sets[: 2 if c.run.weights.n_layers > 1 else 1])
        for value, heads in zip(found.values, sets, strict=False):
            z = {head: 0 * c.plain.clean_z[head] for head in heads}
            exact(value, nll(c.plain.run(z, frozen=attention == "frozen"), c.given))


@every_configuration
def test_some_of_the_sequences(name):
    c = case(name)
    with nothing_in_fp32(c.model):
        found = fc.head_ablation(c.run[1:], "zero", "recomputed", heads=[(0, 1)])
        alone = Plain(c.model, c.given[1:])
        exact(found.values[0], nll(alone.run({(0, 1): 0 * alone.clean_z[0, 1]}), c.given[1:]))


@every_configuration
def test_activation_patching(name):
    c, head = case(name), (0, 1)
    with nothing_in_fp32(c.model):
        found = fc.activation_patching(c.run, c.other, heads=[head])
        exact(found.values[0], nll(c.corrupted.run({head: c.plain.clean_z[head]}), c.given))
    exact(found.baseline, nll(c.corrupted.clean_logits, c.given))


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if "one layer" not in name])
def test_path_patching(name):
    c, source, to = case(name), (0, 1), (1, 0)
    shared = [(source, (1, head)) for head in range(c.plain.heads // c.plain.kv)]  # that read its first key/value head
    with nothing_in_fp32(c.model), torch.no_grad():
        change = (c.plain.clean_z[source] - c.corrupted.clean_z[source]) @ c.plain.out_weight(*source)
        stream = c.corrupted.clean_streams[1] + c.corrupted.posted(change, 0)
        for kind in "Q" if name in LATENT else "QKV":  # theirs are made of two parts
            found = fc.path_patching(c.run, c.other, kind, pairs=[[(source, to)] if kind == "Q" else shared])
            exact(found.values[0], nll(c.corrupted.run(inputs={(*to, kind): stream}), c.given))


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in LATENT])
def test_weights_make_the_queries_and_keys_of_every_layer(name):
    """Biases, norms and positions of queries and of keys, in every layer."""
    c, w, places = case(name), case(name).run.weights, torch.arange(11)
    digits = 1e-7 if name == "gptj" else 1e-9  # whose angles are a table in fp32
    with nothing_in_fp32(c.model):
        for layer in range(w.n_layers):
            read = c.run.normed(c.run.streams[layer], layer)
            q, k, _ = c.run.forward.qkv(layer, read[None])
            ours = queries_or_keys(w, "Q", layer, read, places)
            exact(w.score_scale(layer) * ours, c.run.forward.score_scale(layer) * q[0], digits)
            exact(queries_or_keys(w, "K", layer, read, places), k[0], digits)


def alibi(config, heads):
    """What ALiBi adds to the scores of each distance [H, T, T]; transformers rounds Falcon's to bfloat16."""
    behind = torch.arange(11)[None, :] - torch.arange(11)[:, None]
    slopes = 2 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    if config.model_type == "bloom":
        return slopes[:, None, None] * behind
    bias = slopes.bfloat16()[:, None] * torch.arange(11).bfloat16()
    return (bias.double() / (config.hidden_size // heads) ** 0.5)[:, None].expand(-1, 11, -1)


@pytest.mark.parametrize("name", ALONE)
def test_tables_are_the_scores_behind_the_first_patterns(name):
    """Log patterns differ within a row as the tables' scores do, at all distances."""
    c, w = case(name), case(name).run.weights
    config, digits = c.model.config, 1e-6 if name == "gptj" else 1e-9
    cap = config.attn_logit_softcapping if config.model_type == "gemma2" else None
    for head in range(w.n_heads):
        scores, pattern = table_scores(c, head), c.run.pattern(0)[:, head]
        scores = scores if cap is None else cap * (scores / cap).tanh()
        if config.model_type == "bloom" or getattr(config, "alibi", False):
            scores = scores + alibi(config, w.n_heads)[head]
        ours, theirs = (x.diagonal(0, 1, 2)[..., None] - x for x in (scores, pattern.log()))
        seen = (pattern > 0).tril(-1)
        exact(ours[seen], theirs[seen], digits)
        assert bool(seen.any())


def table_scores(c, head):
    """[B, T, T], of the tables of a first layer's head; above the diagonal, zero."""
    scores = torch.zeros(*c.given.shape, c.given.shape[1], dtype=torch.float64)
    for offset in range(c.given.shape[1]):
        rotary = c.run.weights.positional == "rotary"
        table = fc.qk_tables(c.run.weights, (0, head), normed=True, offset=offset if rotary else 0).token_token
        here = torch.arange(offset, c.given.shape[1])
        scores[:, here, here - offset] = (table.A @ table.B)[c.given[:, here], c.given[:, here - offset]]
    return scores


@pytest.mark.parametrize("name", LATENT)
def test_tables_of_latents_are_refused(name):
    with pytest.raises(ValueError, match=r"weights\.qk_norm is 'of a run'.*qk_terms has the scores"):
        fc.qk_tables(case(name).run.weights, (0, 0))


@pytest.mark.parametrize("name", [name for name in ALONE if "alibi" not in name and "bloom" not in name])
def test_circuits_and_skip_trigrams_read_the_same_scores(name):
    w = case(name).run.weights
    table = fc.qk_tables(w, (0, 1), normed=True, offset=2).token_token.AB
    if w.b_Q is None and w.ln_b is None:
        torch.testing.assert_close(fc.qk_circuit(w, (0, 1), scaled=True, normed=True, offset=2).AB, table)
    found = fc.skip_trigrams(w, (0, 1), [7], 3, normed=True, offset=2)
    best = (table[:, 7] - table.mean(1)).topk(3)
    assert found.destinations[0].tolist() == best.indices.tolist()
    torch.testing.assert_close(found.attention[0], best.values)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((x, torch.float64) for x in CONFIGURATIONS), *((x, torch.float32) for x in ONE_OF_EACH)]
)
def test_padding_gives_each_sequence_what_it_gives_alone(name, side, dtype):
    model = case(name).model if dtype == torch.float64 else build(name, dtype)
    mask, given = torch.ones(3, 11, dtype=torch.long), tokens(3)
    mask[0, :4], mask[1, :1] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    digits = 1e-9 if dtype == torch.float64 else 2e-4
    with nothing_in_fp32(model) if dtype == torch.float64 else torch.no_grad():
        run = fc.trace(model, given, mask)
        found = fc.head_ablation(run, "zero", "recomputed", heads=[(0, 1)], per_token=True)
        for row, real in enumerate(mask.bool()):
            alone = Plain(model, given[row : row + 1, real])
            exact(summed(run)[row, real], alone.clean_logits[0], digits)
            changed = alone.run({(0, 1): 0 * alone.clean_z[0, 1]})
            losses = torch.nn.functional.cross_entropy(changed[0, :-1], given[row, real][1:], reduction="none")
            own = found.values[0, row][real[:-1] & real[1:]]
            exact(own, losses, digits)


@pytest.mark.parametrize(
    ("name", "longest"), [("llama, dynamic rope", 16), ("phi3, longrope", 16), ("gemma3, windows, dynamic rope", 16)]
)
def test_rotation_that_changes_with_the_length(name, longest):
    """A long sequence turns as the model turns it, and leaves runs of short ones as they are."""
    c, given = case(name), tokens(2, 20)
    with nothing_in_fp32(c.model):
        long, plain = fc.trace(c.model, given), Plain(c.model, given)
        exact(summed(long), plain.clean_logits)
        found = fc.head_ablation(long, "zero", "recomputed", heads=[(0, 1)])
        exact(found.values[0], nll(plain.run({(0, 1): 0 * plain.clean_z[0, 1]}), given))
        theirs = c.plain.run({(0, 1): 0 * c.plain.clean_z[0, 1]})
        exact(fc.head_ablation(c.run, "zero", "recomputed", heads=[(0, 1)]).values[0], nll(theirs, c.given))
    fc.qk_tables(long.weights, (1, 0), offset=longest - 1)
    with pytest.raises(ValueError, match=f"offset is {longest}, but the weights hold the rotation of sequences"):
        fc.qk_tables(long.weights, (1, 0), offset=longest)


@pytest.mark.parametrize("name", WITHOUT_QK)
def test_patterns_that_must_be_kept_are_said_to(name):
    with pytest.raises(ValueError, match=r"store is 'qk', but .* makes its patterns itself"):
        fc.trace(case(name).model, tokens(), store="qk")
