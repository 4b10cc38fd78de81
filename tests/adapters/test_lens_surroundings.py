"""What stands around and inside a TransformerLens model: wrappers, hooks, tokenizers, tables that grow; encoders."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import tokens  # noqa: E402
from test_lens import assert_exact, logits_of  # noqa: E402
from test_lens_configurations import ROTARY, WITH_MLP, built  # noqa: E402

import pyfastcircuits as fc  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif("HookedTransformer" not in vars(lens), reason="TransformerLens 4 has no HookedTransformer"),
]
KINDS = {
    "attention only": {},
    "MLP": WITH_MLP,
    "no norm": {"normalization_type": None},
    "capped": {"output_logits_soft_cap": 3.0},
}


def double(x, hook):
    return 2 * x


HOOKS = {  # what the weights do not say
    "embed.hook": ("hook_embed", r"what the embedding gives .* likely a hook on hook_embed"),
    "positions": ("hook_pos_embed", r"what the embedding gives .* likely a hook on hook_pos_embed"),
    "values": ("blocks.1.attn.hook_v", r"what the heads of layer 1 write .* likely .*a hook on blocks.1.attn.hook_v"),
    "z": ("blocks.1.attn.hook_z", r"what the heads of layer 1 write .* likely .*a hook on blocks.1.attn.hook_z"),
    "written": ("blocks.1.hook_attn_out", r"what the heads of layer 1 write .* a hook on blocks.1.hook_attn_out"),
    "final norm": (
        "ln_final.hook_normalized",
        r"what the final norm gives .* likely a hook on ln_final.hook_normalized",
    ),
    "unembedding": ("unembed.hook_in", r"the logits by the weights differs .* likely a hook on unembed.hook_in"),
    "logits": ("unembed.hook_out", r"the logits by the weights differs .* likely a hook on unembed.hook_out"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_what_the_weights_say_are_named(name):
    model, (point, message) = built(WITH_MLP), HOOKS[name]
    model.add_hook(point, double)
    with pytest.raises(RuntimeError, match=message):
        fc.trace(model, tokens())


@pytest.mark.parametrize("point", ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.2.attn.hook_pattern"])
def test_hooks_on_what_no_weight_says_are_a_part_of_the_run(point):
    model = built(WITH_MLP)
    model.add_hook(point, double if "pattern" not in point else lambda x, hook: x.flip(1))
    assert_exact(fc.trace(model, tokens()), logits_of(model, tokens()))


def test_another_head_is_found():
    model = built({})
    forward = model.unembed.forward
    model.unembed.forward = lambda x: forward(x) + 1
    with pytest.raises(
        RuntimeError, match=r"the logits by the weights differs from the model's .unembed. .* a forward of its"
    ):
        fc.trace(model, tokens())


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_model(name):
    model = built(KINDS[name])
    whole = torch.compile(model, backend="eager")
    assert_exact(fc.trace(whole, tokens()), logits_of(model, tokens()))
    assert torch.equal(fc.CircuitWeights.from_model(whole).W_E, model.W_E)


def test_layers_that_do_not_run_as_listed_are_refused():
    fewer, twice = built({}), built({})
    fewer.cfg.n_layers = 2
    twice.blocks[1] = twice.blocks[0]
    for model in (fewer, twice):
        with pytest.raises(ValueError, match=r"a trace needs each of model.blocks to run once"):
            fc.trace(model, tokens())


def test_a_mask_with_gaps_is_refused():
    mask = torch.ones(2, 11)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match=r"mask has zeros between real tokens, which HookedTransformer leaves out"):
        fc.trace(built({}), tokens(), mask.long())
    with pytest.raises(ValueError, match=r"position_ids is given, but HookedTransformer takes none"):
        fc.trace(built({}), tokens(), position_ids=torch.arange(11) + 1)


def test_a_tokenizer_that_pads_on_the_left():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"[BOS]": 0, "[PAD]": 1, "word": 2}, unk_token="word"))
    special = {"bos_token": "[BOS]", "eos_token": "[BOS]", "pad_token": "[PAD]"}
    model, x = built({}), tokens().clamp_min(2)
    model.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    assert_exact(fc.trace(model, x), logits_of(model, x))
    x[0, :4] = 1
    with pytest.raises(ValueError, match=r"the model's tokenizer pads on the left, .* give the mask"):
        fc.trace(model, x)
    mask = (x != 1).long()
    assert_exact(fc.trace(model, x, mask), logits_of(model, x), real=mask.bool())


def test_tables_that_grow_are_the_same_model(monkeypatch):
    from transformer_lens.components.abstract_attention import AbstractAttention

    monkeypatch.setattr(AbstractAttention, "ROTARY_INITIAL_CACHE_SIZE", 12)
    model = built(ROTARY)
    short, weights = fc.trace(model, tokens()), fc.CircuitWeights.from_model(model)
    long = tokens(1, 30)
    assert_exact(fc.trace(model, long), logits_of(model, long))
    assert_exact(fc.trace(weights, long), logits_of(model, long))
    assert short.loss.isfinite()


def test_a_table_that_no_rates_make_is_refused():
    model = built(ROTARY)
    model.blocks[1].attn.rotary_cos[5] = 0.3
    with pytest.raises(ValueError, match=r"blocks.1.attn: its table of rotary positions turns at no constant rates"):
        fc.CircuitWeights.from_model(model)


def test_encoders_are_refused():
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_vocab": 89, "d_mlp": 20}
    bert = lens.HookedEncoder(
        lens.HookedTransformerConfig(**sizes, act_fn="gelu", attention_dir="bidirectional", device="cpu")
    )
    more = {"relative_attention_max_distance": 8, "relative_attention_num_buckets": 4, "decoder_start_token_id": 0}
    t5 = lens.HookedEncoderDecoder(
        lens.HookedTransformerConfig(
            **sizes, **more, act_fn="relu", positional_embedding_type="relative_positional_bias",
            attention_dir="bidirectional", normalization_type="RMS", device="cpu",
        )
    )  # fmt: skip
    for model in (bert, t5):
        for call in (fc.CircuitWeights.from_model, lambda model: fc.trace(model, tokens())):
            with pytest.raises(
                ValueError, match=f"{type(model).__name__} gives no next-token logits: it is an encoder"
            ):
                call(model)


def test_one_row_of_logits_is_checked():
    rows = []
    model = built({}, d_vocab=5000, n_ctx=600)
    model.unembed.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    fc.trace(model, tokens(2, 600))
    assert rows == [1]
