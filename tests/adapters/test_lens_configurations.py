"""Every option of a HookedTransformer that shapes what it computes: exact, by its run and by its weights, or refused."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import tokens  # noqa: E402
from support.rerun_checks import check_clean, check_kept_as_queries_and_keys  # noqa: E402
from test_lens import assert_exact, logits_of  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.model.queries import queries_or_keys  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif("HookedTransformer" not in vars(lens), reason="TransformerLens 4 has no HookedTransformer"),
]
SIZES = {"n_layers": 3, "d_model": 24, "n_ctx": 32, "d_head": 6, "n_heads": 4, "d_vocab": 89, "dtype": torch.float64}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 6}
NTK = {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 16}
YARN = {
    "use_yarn_rope": True,
    "yarn_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_attention_factor": 1.3,
}
LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global", "local"]}
WITH_MLP = {"attn_only": False, "d_mlp": 40, "act_fn": "gelu"}

WHOLE = {  # models that are nothing but their heads: the weights alone are the model
    "layernorm": {},
    "layernorm, folded": {"normalization_type": "LNPre"},
    "rmsnorm": {"normalization_type": "RMS"},
    "rmsnorm, folded": {"normalization_type": "RMSPre"},
    "rmsnorm, final_rms": {"normalization_type": "RMS", "final_rms": True},
    "no norm": {"normalization_type": None},
    "eps": {"eps": 0.3},
    "no attention scale": {"use_attn_scale": False},
    "attention scale": {"attn_scale": 1.7},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scale by layer alone": {"scale_attn_by_inverse_layer_idx": True, "use_attn_scale": False},
    "another output vocabulary": {"d_vocab_out": 5},
    "norm of embeddings": {"post_embedding_ln": True},
    "norm of embeddings, rotary": {"post_embedding_ln": True, **ROTARY},
    "norms of queries and keys": {"use_qk_norm": True},
    "norms of queries and keys, rotary, grouped": {"use_qk_norm": True, "n_key_value_heads": 2, **ROTARY},
    "OLMoE's norms of queries and keys": {"original_architecture": "OlmoeForCausalLM", "n_key_value_heads": 2, **ROTARY},
    "grouped": {"n_key_value_heads": 1},
    "grouped, ungrouped": {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "rotary": ROTARY,
    "rotary, a part": ROTARY | {"rotary_dim": 4},
    "rotary, adjacent pairs": ROTARY | {"rotary_adjacent_pairs": True},
    "rotary, adjacent pairs, a part": ROTARY | {"rotary_adjacent_pairs": True, "rotary_dim": 2},
    "rotary, base": ROTARY | {"rotary_base": 37},
    "rotary, linear scaling": ROTARY | {"rotary_scaling_factor": 8.0},
    "rotary, NTK by parts": ROTARY | NTK,
    "rotary, yarn": ROTARY | YARN,
    "rotary, yarn, not cut": ROTARY | YARN | {"yarn_truncate": False},
    "rotary, dynamic, never reached": ROTARY | {"use_dynamic_ntk_rope": True},
    "rotary, wide windows": ROTARY | LOCAL | {"window_size": 32, "rotary_base_local": 11, "rotary_scaling_factor": 3.0},
    "shortformer": {"positional_embedding_type": "shortformer", "normalization_type": "LNPre"},
    "one input for each head": {"use_split_qkv_input": True},
    "one input for each head, grouped": {"use_split_qkv_input": True, "n_key_value_heads": 2},
    "one input for all three": {"use_attn_in": True},
    "results of heads": {"use_attn_result": True},
    "a hook on tokens": {"use_hook_tokens": True},
}  # fmt: skip
RUNS = {  # models that only a run of their own is exact for
    "MLP": WITH_MLP,
    "MLP, gated": WITH_MLP | {"gated_mlp": True, "act_fn": "silu"},
    "MLP, SoLU": WITH_MLP | {"act_fn": "solu_ln"},
    "MLP beside the heads": WITH_MLP | {"parallel_attn_mlp": True},
    "MLP, its input hooked": WITH_MLP | {"use_hook_mlp_in": True},
    "experts": WITH_MLP | {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
    "alibi": {"positional_embedding_type": "alibi"},
    "windows": LOCAL,
    "windows, rotary, other bases": ROTARY | LOCAL | {"rotary_base_local": 11, "rotary_base": 500},
    "windows, yarn in the others": ROTARY | YARN | LOCAL | {"yarn_global_attn_only": True, "yarn_attention_factor": 1.0},
    "shortformer, norms with parameters": {"positional_embedding_type": "shortformer"},
    "caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "norms after": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    "norms after, folded": {"normalization_type": "RMSPre", "use_normalization_before_and_after": True} | WITH_MLP,
    "no norms before and after": {"normalization_type": None, "use_normalization_before_and_after": True} | WITH_MLP,
    "OLMo 2": {"normalization_type": "RMS", "original_architecture": "Olmo2ForCausalLM", **ROTARY} | WITH_MLP,
    "OLMo 3, grouped": {"normalization_type": "RMS", "original_architecture": "Olmo3ForCausalLM", "n_key_value_heads": 2, **ROTARY, **LOCAL},
    "sinks": {"use_attention_sinks": True, "normalization_type": "RMS", **ROTARY},
    "rotary, dynamic": ROTARY | {"use_dynamic_ntk_rope": True, "train_seq_length": 8},
    "log n": {"use_logn_attn": True, "train_seq_length": 8},
}  # fmt: skip
UNLIKE = ("alibi", "rotary, dynamic", "log n")  # the scores of long sequences are not those of the weights


def built(options, seed=0, **more):
    config = {**SIZES, "attn_only": True, "normalization_type": "LN", "device": "cpu", "seed": 0, **options, **more}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**config))
    torch.nn.Module.to(model, config["dtype"])  # experts' routers are float32
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return model


def scores_of(model, x, **options):
    """The attention scores of each layer, -inf where nothing is attended to."""
    kept = []
    hooks = [(f"blocks.{i}.attn.hook_attn_scores", lambda scores, hook: kept.append(scores)) for i in range(3)]
    with torch.no_grad():
        model.run_with_hooks(x, fwd_hooks=hooks, **options)
    return kept


@pytest.mark.parametrize("name", WHOLE | RUNS)
def test_the_sum_over_all_paths_is_the_models_own_logits(name):
    model = built((WHOLE | RUNS)[name]).train()
    run = fc.trace(model, tokens())
    model.eval()
    assert_exact(run, logits_of(model, tokens()))
    assert run.weights.attention_only == (name in WHOLE)
    assert model.train().training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    check_clean(run)


@pytest.mark.parametrize("name", WHOLE)
def test_the_weights_of_a_model_of_heads_are_the_model(name):
    model = built(WHOLE[name])
    weights = fc.CircuitWeights.from_model(model)
    assert_exact(fc.trace(weights, tokens()), logits_of(model, tokens()))
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    run = fc.trace(weights, tokens(), mask)
    assert_exact(run, logits_of(model, tokens(), attention_mask=mask), real=mask.bool())


@pytest.mark.parametrize("name", [name for name in WHOLE | RUNS if name not in UNLIKE])
def test_queries_and_keys_by_the_weights_make_the_models_scores(name):
    model = built((WHOLE | RUNS)[name])
    run, cap = fc.trace(model, tokens()), model.cfg.attn_scores_soft_cap
    w, positions = run.weights, torch.arange(11)
    for layer, theirs in enumerate(scores_of(model, tokens())):
        read = run.normed(run.streams[layer], layer)
        if w.positional == "shortformer":
            read = read + w.W_pos[:11] / (1 if w.ln_w is None else w.ln_w[layer])
        q, k = (queries_or_keys(w, kind, layer, read, positions) for kind in "QK")
        ours = w.score_scale(layer) * q @ k.repeat_interleave(w.n_heads // k.shape[1], 1).mT
        seen = theirs.isfinite()
        capped = cap * (ours / cap).tanh() if cap > 0 else ours
        torch.testing.assert_close(capped[seen], theirs[seen], rtol=1e-10, atol=1e-10)
        terms = fc.qk_terms(run, (layer, 1)).values.sum(0)
        torch.testing.assert_close(terms[seen[:, 1]], ours[:, 1][seen[:, 1]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in WHOLE | RUNS if "rotary" in name and name not in UNLIKE])
@pytest.mark.parametrize("offset", [0, 3])
def test_rotary_tables_are_the_scores_of_a_first_layer(name, offset):
    model = built((WHOLE | RUNS)[name])
    weights, here = fc.CircuitWeights.from_model(model), torch.arange(offset, 11)
    table = fc.qk_tables(weights, (0, 1), normed=True, offset=offset).token_token
    theirs = scores_of(model, tokens())[0][0, 1, here, here - offset]
    seen, x = theirs.isfinite(), tokens()[0]
    ours = (table.A @ table.B)[x[here], x[here - offset]]
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-10, atol=1e-10)
    found = fc.skip_trigrams(weights, (0, 1), k=3, normed=True, offset=offset)
    whole = table.A @ table.B
    torch.testing.assert_close(found.attention[4], (whole - whole.mean(1, keepdim=True))[found.destinations[4], 4])


@pytest.mark.parametrize("name", WHOLE | RUNS)
def test_left_padding_gives_each_sequence_what_it_gives_alone(name):
    if name in UNLIKE[1:]:
        pytest.skip("it counts padding among the tokens of a sequence")
    model, x = built((WHOLE | RUNS)[name]), tokens()
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    run, alone = fc.trace(model, x, mask), fc.trace(model, x[:1, 4:])
    assert run.logits().isfinite().all()
    torch.testing.assert_close(run.logits()[0, 4:], alone.logits()[0], rtol=1e-9, atol=1e-9)
    for layer in range(3):
        torch.testing.assert_close(run.pattern(layer)[0, :, 4:, 4:], alone.pattern(layer)[0], rtol=1e-9, atol=1e-9)
    if name != "another output vocabulary":
        losses = fc.order_losses(run[:1]), fc.order_losses(alone)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in WHOLE | RUNS if name not in ("alibi", "another output vocabulary")])
def test_queries_and_keys_are_kept_for_long_contexts(name):
    model = built((WHOLE | RUNS)[name])
    check_kept_as_queries_and_keys(fc.trace(model, tokens()), fc.trace(model, tokens(), store="qk"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["layernorm", "rotary, a part", "norms of queries and keys", "MLP, gated", "scale by layer"]
)
def test_smaller_dtypes(name, dtype):
    model = built((WHOLE | RUNS)[name], dtype=dtype)
    run, theirs = fc.trace(model, tokens()), logits_of(model, tokens()).float()
    limit = 8 * torch.finfo(dtype).eps
    assert_exact(run, theirs, limit)
    if name in WHOLE:
        assert_exact(fc.trace(run.weights, tokens()), theirs, 8 * limit)


REFUSED = {
    "attention_dir is 'bidirectional', and attention that is not causal": {"attention_dir": "bidirectional"},
    "final_rms is True, but normalization_type is 'LN', and a final norm of another kind": {"final_rms": True},
    "positional_embedding_type 'relative_positional_bias' is not supported": {"positional_embedding_type": "relative_positional_bias"},
    "clip_qkv is 1.5, and clipped values are no linear function": {"clip_qkv": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_named(message):
    model = built(REFUSED[message])
    for call in (fc.CircuitWeights.from_model, lambda model: fc.trace(model, tokens())):
        with pytest.raises(ValueError, match=message):
            call(model)
