"""Maps of activation patching are TransformerLens' own, run for run."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import tokens  # noqa: E402
from test_lens import hooked  # noqa: E402
from transformer_lens import patching  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.integrations.transformer_lens import accelerate  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif("HookedTransformer" not in vars(lens), reason="TransformerLens 4 has no HookedTransformer"),
]
KINDS = ["layernorm", "rmsnorm, rotary, grouped", "rmsnorm, folded, rotary by pairs, parallel", "gemma 2's"]
ASKED = {"targets": torch.tensor([3, 5, 7]), "against": torch.tensor([4, 4, 9])}
BY_POSITION = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_by_pos,
}
WHOLE = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}
NAMES = {
    "resid_mid": "get_act_patch_resid_mid", "z": "get_act_patch_attn_head_out_by_pos",
    "q": "get_act_patch_attn_head_q_by_pos", "k": "get_act_patch_attn_head_k_by_pos",
    "v": "get_act_patch_attn_head_v_by_pos", "pattern": "get_act_patch_attn_head_pattern_by_pos",
    "k, all positions": "get_act_patch_attn_head_k_all_pos", "z, all positions": "get_act_patch_attn_head_out_all_pos",
    "pattern, all positions": "get_act_patch_attn_head_pattern_all_pos",
}  # fmt: skip
WHOLE_NAMED = {f"{what}, all positions": theirs for what, theirs in WHOLE.items()}


def difference(logits):
    """At the last position of each sequence."""
    rows = logits[:, -1]
    return (rows.gather(1, ASKED["targets"][:, None]) - rows.gather(1, ASKED["against"][:, None])).mean()


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    model = hooked(request.param)
    clean, corrupted = tokens(3, 4), tokens(3, 4, seed=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        maps = {}
        for name, theirs in (BY_POSITION | WHOLE_NAMED).items():
            if name != "resid_mid" or "parallel" not in request.param:
                maps[name] = theirs(model, corrupted, cache, difference)
        yield model, clean, corrupted, cache, maps


def assert_same(ours, theirs):
    theirs = theirs.to(torch.float64)  # which it keeps in fp32
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < 2e-6, f"relative error {error:.3g}"


def test_maps_are_those_of_transformer_lens(both):
    model, clean, corrupted, _, maps = both
    first, second = fc.trace(model, clean), fc.trace(model, corrupted)
    asked = {"metric": "logit_difference", "positions": -1, **ASKED}
    for what in BY_POSITION:
        if what not in maps:
            with pytest.raises(ValueError, match="what is 'resid_mid', but the model has layers whose MLP"):
                fc.activation_patching(first, second, what=what)
            continue
        ours = fc.activation_patching(first, second, what=what, at="each", **asked).values
        assert_same(ours, maps[what].transpose(1, 2) if what in "zqkv" else maps[what])
    for what in WHOLE:
        ours = fc.activation_patching(first, second, what=what, **asked)
        assert_same(ours.values, maps[f"{what}, all positions"])


def test_their_own_functions_run_on_ours(both, monkeypatch):
    model, _, corrupted, cache, maps = both
    runs = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **more: runs.append(1) or forward(*args, **more))
    with accelerate():
        for what, name in [*NAMES.items()]:
            if what in maps:
                ours = getattr(patching, name)(model, corrupted, cache, difference)
                assert (ours.dtype, ours.shape) == (maps[what].dtype, maps[what].shape)
                assert_same(ours.double(), maps[what])
        assert len(runs) == len([what for what in NAMES if what in maps])
        every = patching.get_act_patch_block_every(model, corrupted, cache, difference)
        assert_same(every.double(), torch.stack([maps[what] for what in ("resid_pre", "attn_out", "mlp_out")]))
    assert patching.get_act_patch_resid_pre is BY_POSITION["resid_pre"]


def test_any_metric_any_index_and_single_entries_of_patterns():
    model = hooked("layernorm")
    clean, corrupted = tokens(2, 4), tokens(2, 4, seed=1)
    _, cache = model.run_with_cache(clean)

    def rows_and_mask(logits):
        assert (logits.shape, len(logits), logits.dtype) == ((2, 4, 89), 2, torch.float64)
        mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()
        return logits[mask].exp().sum() + logits[..., 3].sum() + logits[[0, 1], -1, [4, 5]].sum() + logits[None].max()

    def whole(logits):
        return -logits.log_softmax(-1)[:, :-1].gather(-1, corrupted[:, 1:, None]).mean()

    def entries(metric):
        return patching.get_act_patch_attn_head_pattern_dest_src_pos(model, corrupted, cache, metric)

    frame = patching.make_df_from_ranges([3, 4], ["layer", "pos"])[::5]
    some = {"index_axis_names": None, "index_df": frame, "return_index_df": True}
    calls = [
        lambda: patching.get_act_patch_resid_pre(model, corrupted, cache, rows_and_mask),
        lambda: patching.get_act_patch_attn_out(model, corrupted, cache, whole),
        lambda: entries(whole),
        lambda: patching.get_act_patch_mlp_out(model, corrupted, cache, rows_and_mask, **some)[0],
    ]
    expected = [call() for call in calls]
    with accelerate():
        for call, theirs in zip(calls, expected, strict=True):
            assert_same(call().double(), theirs)
        model.add_hook("blocks.0.hook_mlp_out", lambda out, hook: 0 * out)  # which ours would not see
        found = patching.get_act_patch_resid_pre(model, corrupted, cache, whole)
    assert_same(found.double(), patching.get_act_patch_resid_pre(model, corrupted, cache, whole))


def test_positions_together_and_each_way(both):
    """Several positions at once, other metrics, and noising, by a hook of our own."""
    model, clean, corrupted, cache, _ = both
    first, second = fc.trace(model, clean), fc.trace(model, corrupted)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    ours = fc.activation_patching(first, second, what="mlp_out", at=mask, per_token=True)
    for layer, values in enumerate(ours.values):

        def patch(out, hook):
            return torch.where(mask[..., None], cache[hook.name], out)

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", patch)])
        expected = -logits[:, :-1].log_softmax(-1).gather(-1, clean[:, 1:, None])[..., 0]
        torch.testing.assert_close(values, expected.to(values.dtype))
    back = fc.activation_patching(second, first, what="mlp_out", at=mask, direction="noise", per_token=True, targets=clean.roll(-1, 1), positions=range(3))  # fmt: skip
    torch.testing.assert_close(back.values, ours.values)
