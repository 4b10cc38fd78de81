"""Activation patching of the residual stream, GPT-2-small's shape: TransformerLens' loop beside the same call on ours."""

import statistics

import pytest
import torch

from bench.timing import interleaved, ratio
from pyfastcircuits.integrations.transformer_lens import accelerate

LAYERS, LENGTH, BATCH = 12, 64, 8
POSITIONS = range(4, LENGTH, 8)  # of the positions, these stand for all: they are as far from the end on average


@pytest.fixture(scope="module")
def model():
    lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=768, n_ctx=LENGTH, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257, act_fn="gelu_new",
        normalization_type="LNPre", device="cpu", seed=0, default_prepend_bos=False,
    )  # fmt: skip
    return lens.HookedTransformer(config).eval().requires_grad_(False)


def test_residual_stream_at_all_layers_and_positions(model, found):
    from transformer_lens import patching

    g = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(0, 50257, (2, BATCH, LENGTH), generator=g)
    targets, against = torch.randint(0, 50257, (2, BATCH, 1), generator=g)

    def metric(logits):
        rows = logits[:, -1]
        return (rows.gather(1, targets) - rows.gather(1, against)).mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))
    whole = patching.make_df_from_ranges([LAYERS, LENGTH], ["layer", "pos"])
    many = whole[whole["pos"].isin(list(POSITIONS))]
    few = many.sample(2, random_state=0)

    def patched(frame):
        with torch.no_grad():
            return patching.get_act_patch_resid_pre(
                model, corrupted, cache, metric, index_axis_names=None, index_df=frame
            )

    def ours():
        with accelerate():
            return patched(many)

    times = interleaved({"TransformerLens": lambda: patched(few), "ours": ours}, rounds=3)
    with accelerate():
        worst = float((patched(few) - 0).abs().max())
        mine = patched(few)
    difference = float((mine - patched(few)).abs().max())
    shape = f"resid_pre at every layer and position, {LAYERS} layers, d=768 T={LENGTH} batch {BATCH}, fp32"
    found(
        f"{shape}: TransformerLens' loop / the same call within accelerate(), a patch",
        f"{ratio(times, 'TransformerLens', 'ours') * len(many) / len(few):.1f}",
        ">= 4",
    )
    each = statistics.median(times["TransformerLens"]) / len(few)
    mine_each = statistics.median(times["ours"]) / len(many)
    found(
        "  time a patch",
        f"{each * 1e3:.0f} ms and {mine_each * 1e3:.0f} ms; largest difference {difference:.1e} of {worst:.1e}",
    )
