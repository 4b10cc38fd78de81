"""Hugging Face models that a trace refuses: how each is made, and what the error must say."""

import transformers

from support.configurations import build

SMALL_OPT = {"ffn_dim": 8, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def changed(model, name, value):
    setattr(model.config, name, value)
    return model


def made(family, kind="CausalLM", **options):
    config = getattr(transformers, f"{family}Config")(vocab_size=89, hidden_size=8, num_hidden_layers=1, **options)
    return getattr(transformers, f"{family}For{kind}")(config)


def of_two_eps():
    model = build("llama")
    model.model.norm.variance_epsilon = 1e-3
    return model


REFUSED = {
    "family": (lambda: made("Mpt", n_heads=2), "MptForCausalLM: model_type 'mpt' has no table, and its attention goes through neither transformers' interface"),
    "no logits": (lambda: build("llama").model, "LlamaModel gives no next-token logits: expected the family's causal language model, with an output embedding"),
    "encoder": (lambda: made("Bert", "MaskedLM", num_attention_heads=2, intermediate_size=8), "BertForMaskedLM gives no next-token logits: it is an encoder"),
    "cross": (lambda: changed(build("gpt2"), "add_cross_attention", True), "add_cross_attention is True, and attention to another model"),
    "bidirectional": (lambda: changed(build("gemma2"), "use_bidirectional_attention", True), "use_bidirectional_attention is True, and attention that is not causal"),
    "bloom": (lambda: changed(build("bloom"), "apply_residual_connection_post_layernorm", True), "apply_residual_connection_post_layernorm is True, and a norm of the whole residual stream"),
    "opt": (lambda: made("OPT", word_embed_proj_dim=8, do_layer_norm_before=False, **SMALL_OPT), r"do_layer_norm_before is False .* and a norm of the whole residual stream"),
    "opt, projected": (lambda: made("OPT", word_embed_proj_dim=4, **SMALL_OPT), "word_embed_proj_dim is not hidden_size, and projected embeddings"),
    "olmo": (lambda: changed(build("olmo"), "clip_qkv", 8.0), r"clip_qkv is 8\.0, and clipped values are no linear function"),
    "norms": (of_two_eps, r"model.norm has eps 0\.001, model.layers.2.input_layernorm has eps 1e-06, and norms that differ"),
    "deepseek": (lambda: build("deepseek_v3", attention_bias=True), "attention_bias is True, and biases in front of a norm of latents"),
}  # fmt: skip
