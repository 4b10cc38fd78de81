"""GPT-2 small's shape with random weights: path ablation of pairs beside hooks, its memory, and the cost of a trace."""

import statistics
import time
from functools import wraps

import pytest
import torch

import pyfastcircuits as fc
from bench.timing import cpu_rate, interleaved, peak_bytes, ratio
from pyfastcircuits.adapters import recording

LAYERS, HEADS, D, R, V, T = 12, 12, 768, 64, 50257, 256


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def lens():
    """GPT-2 small in TransformerLens, layernorms with parameters, as it is before any folding."""
    library = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")
    config = library.HookedTransformerConfig(
        n_layers=LAYERS, d_model=D, n_ctx=1024, d_head=R, n_heads=HEADS, d_vocab=V, d_mlp=4 * D, act_fn="gelu_new",
        normalization_type="LN", device="cpu", seed=0, default_prepend_bos=False,
    )  # fmt: skip
    return library.HookedTransformer(config).eval().requires_grad_(False)


def hooked_pairs(model, tokens):
    """(source, destination) -> loss without that path: a forward pass, everything after the destination head held.

    The source is in layer 0: a later one also writes what earlier heads wrote, which belongs to other paths.
    """
    _, cache = model.run_with_cache(tokens)

    def loss(source, destination):
        (first, i), (last, j) = source, destination
        attention = model.blocks[first].attn
        bias = attention.b_V[i] + model.blocks[first].ln1.b @ attention.W_V[i]  # a source of its own
        written = (cache["z", first][:, :, i] - bias) @ attention.W_O[i]
        norm = model.blocks[last].ln1
        read = (written - written.mean(-1, keepdim=True)) / cache[f"blocks.{last}.ln1.hook_scale"] * norm.w
        change = read @ model.blocks[last].attn.W_V[j]

        def without(v, hook):
            v[:, :, j] -= change
            return v

        def held(_, hook):
            return cache[hook.name]

        names = [f"blocks.{layer}.hook_mlp_out" for layer in range(last, LAYERS)]
        names += [f"blocks.{layer}.hook_attn_out" for layer in range(last + 1, LAYERS)]
        hooks = [(f"blocks.{last}.attn.hook_v", without), *((name, held) for name in (*names, "ln_final.hook_scale"))]
        return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")

    return loss


def test_pairs_against_hooks(lens, tokens, found):
    """Ours over every twelfth pair, which has all layers and heads alike; hooks over a sample of those."""
    run, hooked = fc.trace(lens, tokens), hooked_pairs(lens, tokens)
    pairs = fc.enumerate_paths(LAYERS, HEADS, 2)[5::12]
    first = [i for i, (source, _) in enumerate(pairs) if source[0] == 0]
    sample = [first[0], first[len(first) // 2], first[-1]]
    times = interleaved(
        {
            "hooks": lambda: [hooked(*pairs[i]) for i in sample],
            "ours": lambda: fc.path_ablation(run, pairs),
        },
        rounds=3,
    )
    losses = fc.path_ablation(run, pairs).loss
    worst = max(abs(float(hooked(*pairs[i]) - losses[i])) for i in sample)
    each = statistics.median(times["ours"]) / len(pairs)
    found(f"GPT-2 small shape, T={T}, paths through two heads ablated: one hooked forward pass / ours, each",
          f"{ratio(times, 'hooks', 'ours') * len(pairs) / len(sample):.1f}", ">= 50")  # fmt: skip
    found(
        "  time of each, hooks", f"{statistics.median(times['hooks']) / len(sample) * 1e3:.0f} ms, {len(sample)} pairs"
    )
    found("  largest difference of a loss", f"{worst:.1e} nats")
    limit = (T - 1) * V * (2 * R / cpu_rate("fma") + 1 / cpu_rate("exp"))
    found("  time of each, ours", f"{each * 1e3:.2f} ms, {len(pairs)} pairs")
    found("  share of the machine's limit", f"{limit / each:.0%}")


def test_the_whole_sweep(lens, tokens, found):
    peak = peak_bytes(lambda: fc.pair_ablation(fc.trace(lens, tokens), kl=True))
    found(
        "all 9,504 pairs with KL, trace included: peak memory beyond the weights", f"{peak / 2**30:.2f} GiB", "<= 2 GB"
    )


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
LATENTS = {
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "n_group": 1, "topk_group": 1,
}  # fmt: skip
OLD = {"n_layer": 6, "n_head": HEADS, "n_embd": D}  # the names of sizes in older configurations
SHAPES = {
    "GPT2": {"n_layer": LAYERS}, "Llama": {"num_hidden_layers": LAYERS, "num_key_value_heads": 4}, "Bloom": OLD,
    "Cohere": {}, "Cohere2": {}, "DeepseekV3": LATENTS, "Falcon": {}, "Gemma": {}, "Gemma2": {}, "Gemma3": {},
    "GPTNeo": {"num_layers": 6, "num_heads": HEADS, "attention_types": [[["global", "local"], 3]]}, "GPTNeoX": {},
    "GptOss": EXPERTS, "GPTJ": {**OLD, "rotary_dim": 32}, "Granite": {}, "Mistral": {}, "Mixtral": EXPERTS, "Olmo": {},
    "Olmo2": {}, "Olmo3": {}, "OPT": {"ffn_dim": 4 * D}, "Phi": {}, "Phi3": {}, "Qwen2": {}, "Qwen2Moe": EXPERTS,
    "Qwen3": {}, "Qwen3Moe": EXPERTS, "SmolLM3": {}, "StableLm": {}, "Starcoder2": {},
}  # fmt: skip
USUAL = {
    "vocab_size": 32000, "hidden_size": D, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": R,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def built(family):
    """A model of a family with random weights, at the width of GPT-2 small."""
    transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    sizes = {} if family == "GPT2" else {**USUAL, "word_embed_proj_dim": D} if family == "OPT" else USUAL
    if family == "Falcon":  # which has no size of heads of its own
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"}
    config = kind.config_class(**{**sizes, **SHAPES[family]})
    return kind._from_config(config, attn_implementation="eager").eval(), config.vocab_size


@pytest.mark.parametrize("family", SHAPES)
def test_the_cost_of_a_trace(family, found):
    """Beside a forward pass; and of the trace, the logits that are compared with the model's own."""
    model, vocabulary = built(family)
    tokens = torch.randint(3, vocabulary, (1, 512), generator=torch.Generator().manual_seed(1))
    compared = []

    def timed(function):
        @wraps(function)
        def call(*given, **more):
            start = time.perf_counter()
            out = function(*given, **more)
            compared.append(time.perf_counter() - start)
            return out

        return call

    def forward():
        with torch.no_grad():
            model(tokens, use_cache=False)

    times = interleaved({"forward": forward, "trace": lambda: fc.trace(model, tokens)}, rounds=5)
    name = f"{family} shape, 1 x 512 tokens"
    found(f"{name}: trace / one eager forward pass", f"{1 / ratio(times, 'forward', 'trace'):.2f}", "<= 1.3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_check_logits", timed(recording._check_logits))
        head = model.get_output_embeddings()
        patch.setattr(head, "forward", timed(head.forward))
        shares = []
        for _ in range(5):
            compared.clear()
            start = time.perf_counter()
            fc.trace(model, tokens)
            shares.append(sum(compared) / (time.perf_counter() - start))
    found(
        f"{name}: logits compared with the model's own, share of a trace", f"{statistics.median(shares):.3f}", "<= 0.02"
    )
