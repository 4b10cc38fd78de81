"""Features of a dictionary as nodes, and what they do to logits, heads and scores: each beside its plain form."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import naive
from support.hooked import Hooked
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc

F, D = 31, 20


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(layer=1, **options):
    return fc.Dictionary(
        normal(D, F, seed=1), normal(F, D, seed=2) / 3, normal(F, seed=3), normal(D, seed=4), layer=layer, **options
    )


def exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def losses(w, hooked, gone, tokens, scale):
    logits = naive.norm(hooked.final - gone, w, scale)[0] @ w.W_U + w.b_U
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", None])
@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_a_feature_is_ablated_as_by_a_hook_on_the_stream(norm, attention):
    w, tokens = random_weights(3, norm=norm), random_tokens()
    run, dictionary = fc.trace(w, tokens), made()
    clean, numbers = Hooked(w, tokens), (4, 17)
    active = (clean.streams[1] @ dictionary.W_enc + dictionary.b_enc).clamp_min(0)
    exact(dictionary.activations(run), active)
    features = [dictionary.feature(n) for n in numbers]
    for heads, gone, at in (
        ([features[0]], active[..., 4:5] * dictionary.W_dec[4], None),
        ([features], active[..., numbers] @ dictionary.W_dec[list(numbers)], None),
        ([features[1]], active[..., 17:18] * dictionary.W_dec[17] * (torch.arange(9) == 5)[:, None], 5),
    ):
        ours = fc.head_ablation(run, "zero", attention, heads=heads, at=at, per_token=True)
        frozen = clean if attention == "frozen" else None
        without = Hooked(w, tokens, lambda name, layer, h, x, gone=gone: x - gone if name in "QKV" and layer else x, frozen)  # fmt: skip
        exact(ours.values[0], losses(w, without, gone, tokens, clean.scales["final"] if frozen else None))


def test_a_feature_that_comes_back_is_taken_out_as_it_then_is():
    """Behind another change a hook takes out what the feature is then, as the MLP's of a transcoder would be."""
    w, tokens = random_weights(3, norm="rmsnorm"), random_tokens()
    run, dictionary = fc.trace(w, tokens), made(layer=2)

    def zeroed(name, layer, head, x):
        return 0 * x if (name, layer, head) == ("z", 0, 1) else x

    changed = Hooked(w, tokens, zeroed)
    active = (changed.streams[2] @ dictionary.W_enc + dictionary.b_enc).clamp_min(0)
    gone = active[..., 8:9] * dictionary.W_dec[8]
    both = Hooked(w, tokens, lambda *at: zeroed(*at[:3], at[3] - gone if at[0] in "QKV" and at[1] == 2 else at[3]))
    ours = fc.head_ablation(run, "zero", "recomputed", heads=[[(0, 1), dictionary.feature(8)]], per_token=True)
    exact(ours.values[0], losses(w, both, gone, tokens, None))
    assert ours.labels == [frozenset({(0, 1), "feature 2.8"})]


def test_edges_and_attribution():
    w, tokens = random_weights(3, norm="layernorm"), random_tokens()
    run, dictionary = fc.trace(w, tokens), made()
    parts = fc.feature_attribution(run, dictionary, against=5)
    direct = fc.head_ablation(
        run, heads=[dictionary.feature(n) for n in range(F)], effect="direct", metric="logit_difference", against=5
    )
    exact(parts.values, -direct.delta)
    assert parts.labels[3] == "feature 1.3"
    gone = dictionary.activations(run)[..., 6:7] * dictionary.W_dec[6]
    cut = fc.composition_ablation(run, "K", pairs=[(dictionary.feature(6), (2, 1))], per_token=True)
    without = Hooked(w, tokens, lambda name, layer, h, x: x - gone if (name, layer, h) == ("K", 2, 1) else x)
    exact(cut.values[0], losses(w, without, 0, tokens, None))
    with pytest.raises(ValueError, match="layers must increase"):
        fc.composition_ablation(run, "K", pairs=[(dictionary.feature(6), (0, 1))])

    for kind, name in zip("QKV", ("W_Q", "W_K", "W_V"), strict=True):
        ours = fc.feature_reads(run, dictionary, kind)
        assert float(ours[:, 0].abs().max()) == 0
        for feature, layer, head in ((3, 1, 0), (30, 2, 3)):
            wrote = dictionary.activations(run)[..., feature : feature + 1] * dictionary.W_dec[feature]
            read = run.normed(wrote, layer) @ w.head(name, layer, head)
            exact(ours[feature, layer, head], read.square().sum(-1).mean().sqrt())


@pytest.mark.parametrize("positional", ["shortformer", "rotary"])
def test_scores_in_features(positional):
    w, tokens = random_weights(3, norm="rmsnorm", positional=positional), random_tokens()
    run, dictionary = fc.trace(w, tokens), made(threshold=normal(F, seed=5).abs())
    where = {"sequence": 1, "destination": 6, "source": 4}
    ours = fc.feature_qk_terms(run, (2, 1), dictionary, **where)
    q, k, _ = run.forward.qkv(2, run.normed(run.streams[2], 2)[None])
    exact(ours.values.sum(), w.score_scale(2) * q[0, 1, 1, 6] @ k[0, 1, 0, 4])
    active = dictionary.activations(run)[1]
    counts = [int((active[place] > 0).sum()) + 1 for place in (6, 4)]
    assert len(ours.labels) == counts[0] * counts[1] < (F + 1) ** 2
    first, second = (int(active[place].argmax()) for place in (6, 4))
    value = ours.values[ours.labels.index((f"feature 1.{first}", f"feature 1.{second}"))]
    if positional == "shortformer":
        read = [active[t, n] * dictionary.W_dec[n] * run.scales[2][1, t] for t, n in ((6, first), (4, second))]
        exact(value, w.score_scale(2) * (read[0] @ w.W_Q[2, 1]) @ (read[1] @ w.W_K[2, 0]))


def test_encoders():
    run = fc.trace(random_weights(2, norm="layernorm"), random_tokens())
    stream, one = run.streams[1], made()
    reads = made(subtracts_b_dec=True, top=3).activations(run)
    plain = ((stream - one.b_dec) @ one.W_enc + one.b_enc).clamp_min(0)
    kept = plain.where(plain >= plain.topk(3, -1).values[..., -1:], 0)
    exact(reads, kept)
    exact(made(top=3, subtracts_b_dec=True).feature(5)(run)[0, ..., 0], kept[..., 5])
    logits = one.to_logits(run.weights)
    centred = one.W_dec - one.W_dec.mean(-1, keepdim=True)
    exact(fc.top_per_row(logits, 2).values, (centred @ run.weights.W_U).topk(2, -1).values)


def test_files_of_both_layouts(tmp_path):
    one = made(threshold=normal(F).abs(), subtracts_b_dec=True, top=4)
    tensors = {name: getattr(one, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    tensors["scaling_factor"] = torch.ones(F)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 4, "apply_b_dec_to_input": True}))
    turned = {"W_enc": one.W_enc.mT.contiguous(), "activation_function.threshold": tensors.pop("threshold")}
    save_file({**tensors, **turned}, tmp_path / "layer_1.safetensors")
    run = fc.trace(random_weights(2), random_tokens())
    saved = fc.Dictionary.load(str(tmp_path / "sae_weights.safetensors"), layer=1)
    exact(saved.activations(run), one.activations(run))
    (tmp_path / "cfg.json").unlink()
    traced = fc.Dictionary.load(str(tmp_path / "layer_1.safetensors"), layer=1)
    exact(traced.activations(run), made(threshold=one.threshold).activations(run))
    with pytest.raises(ValueError, match="has 2 safetensors files"):
        fc.Dictionary.load(str(tmp_path), layer=1)
    save_file({**tensors, "W_other": one.W_enc.clone()}, tmp_path / "layer_1.safetensors")
    with pytest.raises(ValueError, match="which holds W_other: not supported"):
        fc.Dictionary.load(str(tmp_path / "layer_1.safetensors"), layer=1)
    with pytest.raises(OSError, match="where there is no file"):
        fc.Dictionary.load(str(tmp_path / "none"), layer=1)


def test_gated_features(tmp_path):
    """An ablated feature of a gated dictionary in SAELens' layout, beside its definition and a hook on the stream."""
    one, gate, scale = made(), normal(F, seed=6), normal(F, seed=7) / 2
    tensors = {name: getattr(one, name) for name in ("W_enc", "W_dec", "b_dec")}
    save_file({**tensors, "b_mag": one.b_enc, "b_gate": gate, "r_mag": scale}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "gated", "apply_b_dec_to_input": True}))
    dictionary = fc.Dictionary.load(tmp_path, layer=1)
    w, tokens = random_weights(3, norm="layernorm"), random_tokens()
    run, clean = fc.trace(w, tokens), Hooked(w, tokens)
    product = (clean.streams[1] - one.b_dec) @ one.W_enc
    active = (product + gate > 0) * (product * scale.exp() + one.b_enc).relu()
    differs = (product * scale.exp() + one.b_enc > 0) & (product + gate <= 0)
    number = int((differs.any(0).any(0) & (active > 0).any(0).any(0)).nonzero()[0])
    exact(dictionary.activations(run), active)
    exact(dictionary.reconstruction(run), active @ one.W_dec + one.b_dec)
    gone = active[..., [number]] * one.W_dec[number]
    without = Hooked(w, tokens, lambda name, layer, h, x: x - gone if name in "QKV" and layer else x)
    ours = fc.head_ablation(run, "zero", "recomputed", heads=[dictionary.feature(number)], per_token=True)
    exact(ours.values[0], losses(w, without, gone, tokens, None))


def test_bad_dictionaries_are_named():
    run = fc.trace(random_weights(2), random_tokens())
    with pytest.raises(ValueError, match=r"W_enc has shape \[31, 20\], expected \[20, 31\]"):
        fc.Dictionary(normal(F, D), normal(F, D), layer=0)
    with pytest.raises(ValueError, match="layer is -1"):
        made(layer=-1)
    with pytest.raises(IndexError, match="layer is 3, but the model has 2 layers"):
        made(layer=3).activations(run)
    with pytest.raises(IndexError, match="number is 31, but the dictionary has 31 features"):
        made().feature(F)
    with pytest.raises(ValueError, match=r"head is 0.1, which reads before"):
        fc.feature_qk_terms(run, (0, 1), made(), sequence=0, destination=1, source=0)
    with pytest.raises(IndexError, match="source is 9, expected 0 to 8"):
        fc.feature_qk_terms(run, (1, 1), made(), sequence=0, destination=1, source=9)
    with pytest.raises(ValueError, match="r_mag is None, but a gated dictionary has both"):
        made(b_gate=normal(F))
    with pytest.raises(ValueError, match="threshold is given, but b_gate is too"):
        made(b_gate=normal(F), r_mag=normal(F), threshold=normal(F))
    with pytest.raises(ValueError, match="W_skip is given, but reads is 'stream'"):
        made(W_skip=normal(D, D))
    other = fc.Dictionary(normal(7, F), normal(F, 7), layer=0)
    with pytest.raises(ValueError, match=r"W_dec has shape \[31, 7\], but d is 20"):
        fc.head_ablation(run, heads=[other.feature(0)])
