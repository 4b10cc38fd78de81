"""A Llama that was trained on stories (5 layers, grouped keys): every experiment equals plain reruns of its modules."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import nothing_in_fp32  # noqa: E402
from support.effects import assert_ranked_as  # noqa: E402
from support.plain import Plain  # noqa: E402

import pyfastcircuits as fc  # noqa: E402

FOLDER = Path(__file__).parents[3] / "shared/models/stories260k"
LAYERS, HEADS, GROUP, LENGTH = 5, 8, 2, 22  # two query heads read one key/value head
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the trained model is not at {FOLDER}"),
]
TEXTS = (
    " Once upon a time, there was a little girl named Lily. Lily liked to play.",
    " One day, a big dog went to the park with his friend Tim. Tim was sad.",
)


def encoded(text):
    """The longest pieces that fit, after the token that begins a story."""
    pieces, ids = json.loads((FOLDER / "pieces.json").read_text()), [1]
    while text:
        best = max(
            (i for i, piece in enumerate(pieces) if piece and text.startswith(piece)), key=lambda i: len(pieces[i])
        )
        ids.append(best)
        text = text.removeprefix(pieces[best])
    return ids[:LENGTH]


@pytest.fixture(scope="module")
def case():
    """The model in fp64, two runs of ours, and two of the oracle's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64, attn_implementation="eager")
    given = [torch.tensor([encoded(text)]) for text in TEXTS]
    with nothing_in_fp32(model):
        runs, plains = [fc.trace(model, x) for x in given], [Plain(model, x) for x in given]
        yield SimpleNamespace(
            model=model, given=given[0], run=runs[0], other=runs[1], plain=plains[0], corrupted=plains[1], w=runs[0].weights
        )  # fmt: skip


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def nll(case, logits):
    return torch.nn.functional.cross_entropy(logits[0, :-1], case.given[0, 1:])


def zeros(case, heads):
    return {head: 0 * case.plain.clean_z[head] for head in heads}


EVERY = list(product(range(LAYERS), range(HEADS)))


def test_it_tells_stories(case):
    same(case.run.logits(), case.plain.clean_logits)
    assert float(case.run.loss) < 2.5  # of 6.2 for a uniform prediction
    same(fc.load_weights(FOLDER).W_E.double(), case.w.W_E)


def test_orders(case):
    """The article's reruns: every head gives what it gave with the orders below alone."""
    z, losses = zeros(case, EVERY), []
    for _ in range(LAYERS + 1):
        losses.append(nll(case, case.plain.run(z, frozen=True)))
        z = dict(case.plain.z)
    same(fc.order_losses(case.run), torch.stack(losses))
    same(losses[-1], case.run.loss)


def test_layer_marginals(case):
    none = zeros(case, EVERY)
    direct = nll(case, case.plain.run(none, frozen=True))
    single = dict(case.plain.z)
    whole = nll(case, case.plain.run(single, frozen=True))
    found = fc.layer_marginals(case.run)
    for layer in range(LAYERS):
        own, others = ({**a, **{head: b[head] for head in EVERY if head[0] == layer}} for a, b in ((none, single), (single, none)))  # fmt: skip
        same(found[0][layer], direct - nll(case, case.plain.run(own, frozen=True)))
        same(found[1][layer], nll(case, case.plain.run(others, frozen=True)) - whole)


@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_heads_and_layers_out(case, attention):
    heads, frozen = [(0, 1), (2, 3), (4, 7)], attention == "frozen"
    for mode in ("zero", "mean"):
        found = fc.head_ablation(case.run, mode, attention, heads=heads)
        for value, head in zip(found.values, heads, strict=True):
            z = case.plain.clean_z[head]
            instead = 0 * z if mode == "zero" else z.mean((0, 1)).expand_as(z)
            same(value, nll(case, case.plain.run({head: instead}, frozen=frozen)))
    found = fc.layer_ablation(case.run, "zero", attention)
    for layer in range(LAYERS):
        z = zeros(case, [(layer, head) for head in range(HEADS)])
        same(found.values[layer], nll(case, case.plain.run(z, frozen=frozen)))


def test_paths_and_pairs_out(case):
    """A path from the last layer but one, and all that a head writes by way of one of the last layer."""
    source, to = (3, 2), (4, 5)
    case.plain.run(zeros(case, [source]), frozen=True)
    logits = case.plain.run({to: case.plain.z[to]}, frozen=True)
    joint = case.plain.run(zeros(case, [source, to]), frozen=True)
    before = dict(case.plain.clean_z)
    case.plain.run(zeros(case, [head for head in EVERY if head[0] < 3]), frozen=True)
    first = dict(case.plain.z)[source]  # what it writes of all that is no head
    case.plain.run({source: before[source] - first}, frozen=True)
    alone = case.plain.run({to: case.plain.z[to]}, frozen=True)
    same(fc.path_ablation(case.run, [(source, to)]).values[0], nll(case, alone))
    same(fc.pair_ablation(case.run, "path", pairs=[(source, to)]).values[0], nll(case, alone))
    for scope, expected in (("direct", logits), ("edge", logits), ("joint", joint)):
        same(fc.pair_ablation(case.run, scope, pairs=[(source, to)]).values[0], nll(case, expected))
    joint = case.plain.run(zeros(case, [source, to]))
    same(fc.pair_ablation(case.run, "joint", "zero", "recomputed", pairs=[(source, to)]).values[0], nll(case, joint))


def readers(source, layer, kind, place):
    """The pairs that are cut where a head, or all that read a key/value head, read otherwise."""
    own = [place] if kind == "Q" else range(GROUP * place, GROUP * (place + 1))
    return [(source, (layer, head)) for head in own]


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_compositions_cut_and_paths_patched(case, kind):
    source, layer, place = (1, 3), 3, 1
    cut, weight = [readers(source, layer, kind, place)], case.plain.out_weight(*source)
    with torch.no_grad():
        stream = case.plain.clean_streams[layer] - case.plain.clean_z[source] @ weight
        expected = nll(case, case.plain.run(inputs={(layer, place, kind): stream}))
        same(fc.composition_ablation(case.run, kind, pairs=cut).values[0], expected)
        change = (case.plain.clean_z[source] - case.corrupted.clean_z[source]) @ weight
        stream = case.corrupted.clean_streams[layer] + change
        expected = nll(case, case.corrupted.run(inputs={(layer, place, kind): stream}))
        same(fc.path_patching(case.run, case.other, kind, pairs=cut).values[0], expected)


def test_activation_patching(case):
    heads = [(0, 0), (2, 5), (4, 1)]
    found = fc.activation_patching(case.run, case.other, heads=heads)
    for value, head in zip(found.values, heads, strict=True):
        same(value, nll(case, case.corrupted.run({head: case.plain.clean_z[head]})))


def test_edges_to_first_order(case):
    """By differences of two small steps."""
    found, step = fc.edge_attribution(case.run, case.other, "Q"), 1e-4
    pairs = [tuple(map(tuple, pair)) for pair in found.labels]
    for source, to in (((0, 1), (1, 4)), ((2, 6), (4, 3))):
        change = (case.plain.clean_z[source] - case.corrupted.clean_z[source]) @ case.plain.out_weight(*source).detach()
        steps = (case.corrupted.clean_streams[to[0]] + sign * step * change for sign in (1, -1))
        up, down = (nll(case, case.corrupted.run(inputs={(*to, "Q"): stream})) for stream in steps)
        first = (up - down) / (2 * step)
        torch.testing.assert_close(found.delta[pairs.index((source, to))], first, rtol=1e-5, atol=1e-9)


def test_logits_taken_apart_and_the_lens(case):
    model, plain = case.model, case.plain
    with torch.no_grad():
        direction = model.lm_head.weight[7] * model.model.norm.weight  # [d], of token 7's logit
        found = fc.direct_logit_attribution(case.run, "head", targets=7, positions=range(LENGTH), per_token=True)
        for head in ((0, 0), (2, 3), (4, 6)):
            written = plain.clean_z[head] @ plain.out_weight(*head)
            same(found.values[head][0], (written * plain.kept["final"] @ direction)[0])
        whole = fc.direct_logit_attribution(case.run, targets=7, positions=range(LENGTH), per_token=True)
        same(whole.values.sum(0), plain.clean_logits[..., 7])
        lens = fc.logit_lens(case.run)
        for layer in range(LAYERS):
            same(lens.values[layer], nll(case, model.lm_head(model.model.norm(plain.clean_streams[layer]))))
        same(lens.values[LAYERS], nll(case, plain.clean_logits))


def patterns(case, given):
    with torch.no_grad():
        return torch.stack(case.model(given, output_attentions=True).attentions)  # [L, B, H, T, T]


def test_terms_are_the_scores_behind_the_patterns(case):
    for layer, head in ((0, 2), (3, 5)):
        scores = fc.qk_terms(case.run, (layer, head)).values.sum(0)[0]
        hidden = torch.ones_like(scores).triu(1).bool()
        same(scores.masked_fill(hidden, -torch.inf).softmax(-1), patterns(case, case.given)[layer, 0, head])


def test_head_scores(case):
    copies = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:20].view(2, 10) + 3
    given = torch.cat((torch.ones(2, 1, dtype=torch.long), copies, copies), 1)
    scores, own = fc.head_scores(case.model, tokens=given), patterns(case, given)
    same(scores.induction, own.diagonal(-9, -2, -1)[..., 2:].mean((1, 3)))
    same(scores.duplicate_token, own.diagonal(-10, -2, -1)[..., 1:].mean((1, 3)))
    same(scores.previous_token, own.diagonal(-1, -2, -1).mean((1, 3)))


def full_circuits(case, layer, head):
    """OV and QK over the vocabulary of the model's own weights, the latter where positions are the same."""
    own = case.model.model.layers[layer]
    tokens, attention = case.model.model.embed_tokens.weight, own.self_attn
    read = tokens * own.input_layernorm.weight
    q, k, v = (
        read @ module.weight.unflatten(0, (-1, 8))[place].T
        for module, place in (
            (attention.q_proj, head),
            (attention.k_proj, head // GROUP),
            (attention.v_proj, head // GROUP),
        )
    )
    written = v @ case.plain.out_weight(layer, head)
    return written * case.model.model.norm.weight @ case.model.lm_head.weight.T, q @ k.T / 8**0.5


@torch.no_grad()
def test_copying_scores_and_skip_trigrams(case):
    scores = fc.copying_scores(case.w)
    for layer, head in ((0, 3), (4, 6)):
        ov, qk = full_circuits(case, layer, head)
        eigenvalues = torch.linalg.eigvals(ov)
        expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
        torch.testing.assert_close(scores[layer, head], expected, rtol=1e-6, atol=1e-9)
        found = fc.skip_trigrams(case.w, (layer, head), [403, 261], 4)
        attended = (qk - qk.mean(1, keepdim=True))[:, [403, 261]].T.topk(4)
        raised = (ov - ov.mean(1, keepdim=True))[[403, 261]].topk(4)
        assert torch.equal(found.destinations, attended.indices)
        assert torch.equal(found.outputs, raised.indices)
        same(found.attention, attended.values)
        same(found.logits, raised.values)


@pytest.mark.parametrize("final_norm", ["frozen", "recomputed"])
def test_pairs_are_ranked_in_fp32_as_in_fp64(case, final_norm):
    narrow = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    found, exact = (
        fc.pair_ablation(run, final_norm=final_norm).delta.double() for run in (fc.trace(narrow, case.given), case.run)
    )
    assert_ranked_as(found, exact)
