"""Hugging Face models of every family: the sum over sources and orders is the model's own logits."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, nothing_in_fp32, tokens  # noqa: E402
from support.refused import REFUSED  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.run.paths import order_streams  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("gpt2", "pythia", "llama 3, grouped", "mistral, window", "qwen2", "qwen3", "gemma2")
every_family = pytest.mark.parametrize("name", FAMILIES)


def assert_exact(ours, theirs):
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= 1e-9, f"relative error {error:.3g}"


def logits_of(model, *arguments, **options):
    with torch.no_grad():
        return model(*arguments, **options).logits


def capped(run, logits):
    cap = run.weights.logit_cap
    return logits if cap is None else cap * (logits / cap).tanh()


@every_family
def test_the_sum_over_paths_is_the_models_own_logits(name):
    model = build(name, **({"n_layer": 2} if name == "gpt2" else {"num_hidden_layers": 2}))
    run = fc.trace(model, tokens())
    paths = [path for order in range(3) for path in fc.enumerate_paths(2, run.weights.n_heads, order)]
    assert_exact(capped(run, sum(fc.path_logits(run, path) for path in paths)), logits_of(model, tokens()))


def outputs_of(model, suffix):
    """What the modules of this name give, one for each layer."""
    seen = []
    modules = [module for name, module in model.named_modules() if name.endswith(suffix)]
    handles = [module.register_forward_hook(lambda m, a, out: seen.append(out)) for module in modules]
    return seen, handles


@every_family
def test_sources_are_what_mlps_write_and_biases(name):
    model = build(name)
    seen, _ = outputs_of(model, "post_feedforward_layernorm" if name.startswith("gemma2") else ".mlp")
    with nothing_in_fp32(model):
        run = fc.trace(model, tokens())
    for layer, written in enumerate(seen):
        bias = run.apply_post_norm(run.weights.written_bias(layer).expand_as(written), layer)
        assert_exact(run.non_head_writes[layer], written + bias)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2, unscaled scores", "pythia", "llama", "llama, one kv head, tied, wide heads", "qwen2"]
)
def test_weights_alone_make_the_first_pattern(name):
    """Positions, rotary settings, scales and biases, where nothing else shapes a pattern."""
    model = build(name)
    alone = fc.trace(replace(fc.CircuitWeights.from_model(model), attention_only=True), tokens())
    torch.testing.assert_close(alone.pattern(0), fc.trace(model, tokens()).pattern(0), rtol=0, atol=1e-6)


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(name, padding):
    model = build(name)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, :1] = 0, 0
    if padding == "right":
        mask = mask.flip(1)
    places = (mask.cumsum(1) - 1).clamp_min(0)  # as each sequence counts alone
    with nothing_in_fp32(model):
        run = fc.trace(model, tokens(3), mask)
        theirs = logits_of(model, tokens(3), attention_mask=mask, position_ids=places)
    real = mask.bool()
    ours = capped(run, run.unembed(order_streams(run, run.weights.n_layers).sum(0)))
    assert_exact(ours[real], theirs[real])
    nll = -theirs[:, :-1].log_softmax(-1).gather(-1, tokens(3)[:, 1:, None])[..., 0]
    here = real[:, :-1] & real[:, 1:]
    assert run.token_losses.isnan().eq(~here).all()
    torch.testing.assert_close(run.token_losses[here], nll[here])
    torch.testing.assert_close(run.loss, nll[here].mean())
    for layer in range(run.weights.n_layers):
        attended = run.pattern(layer).movedim(1, -1)[real]  # [positions, T, H]
        assert float(attended.masked_fill(real[real.nonzero()[:, 0]][..., None], 0).abs().max()) < 1e-30


@pytest.mark.parametrize("name", [*FAMILIES, "gemma2, caps that bite"])
def test_losses_and_ablations_are_those_of_materialised_logits(name):
    model = build(name)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    with nothing_in_fp32(model):
        run = fc.trace(model, tokens(), mask)
    here = run.predicting

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1][here], tokens()[:, 1:][here])

    clean = run.logits()
    torch.testing.assert_close(run.loss, loss(clean))
    streams = order_streams(run, 3).cumsum(0)
    torch.testing.assert_close(fc.order_losses(run), torch.stack([loss(capped(run, run.unembed(s))) for s in streams]))
    paths = [(), ((0, 1),), ((0, 2), (1, 1)), ((0, 0), (1, 2), (2, 1)), ((1, 0), (2, 0))]
    expected = [capped(run, run.unembed(run.final) - fc.path_logits(run, path)) for path in paths]
    result = fc.path_ablation(run, paths, kl=True)
    torch.testing.assert_close(result.loss, torch.stack([loss(x) for x in expected]))
    torch.testing.assert_close(result.baseline, loss(clean))
    p, q = clean.log_softmax(-1), torch.stack(expected).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[..., :-1][:, here].mean(-1)
    torch.testing.assert_close(result.kl, kl)
    each = fc.path_ablation(run, paths, per_token=True)
    torch.testing.assert_close(each.loss[:, here].mean(-1), result.loss)
    assert each.loss.isnan().eq(~here).all()
    assert each.top(2)[0][0] == result.top(1)[0][0]


@every_family
def test_a_head_without_which(name):
    """Head ablation: the model's own forward pass with a head's output taken out, all else held."""
    model = build(name)
    run = fc.trace(model, tokens())
    result = fc.head_ablation(run)
    last = run.weights.n_layers - 1  # nothing reads it but the logits
    for head in range(run.weights.n_heads):
        z = run.pattern(last)[:, head] @ (
            run.normed(run.final * 0 + stream_before(run, last), last) @ run.weights.head("W_V", last, head)
        )
        bias = run.weights.head_biases(last)[head]
        without = run.final - run.apply_post_norm(z @ run.weights.head("W_O", last, head) + bias, last)
        expected = torch.nn.functional.cross_entropy(
            capped(run, run.unembed(without))[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
        )
        torch.testing.assert_close(result.loss[last, head], expected)


def stream_before(run, layer):
    x = run.embedded
    for earlier in range(layer):
        x = x + run.attend(x, earlier) + run.non_head_writes[earlier]
    return x


def test_the_loss_is_the_models():
    model = build("gpt2")
    with torch.no_grad():
        theirs = model(tokens(), labels=tokens()).loss
    torch.testing.assert_close(fc.trace(model, tokens()).loss, theirs.double(), rtol=1e-6, atol=0)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(name, dtype):
    model = build(name, dtype)
    run = fc.trace(model, tokens())
    assert run.weights.compute_dtype == torch.float32
    theirs = logits_of(model, tokens()).float()
    summed = capped(run, run.unembed(order_streams(run, run.weights.n_layers).sum(0)))
    digits = 4 * torch.finfo(dtype).eps  # of their last product, and of ours
    for ours in (run.logits(), summed):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= digits


@every_family
def test_views_and_no_copies(name):
    model = build(name)
    w = fc.CircuitWeights.from_model(model)
    kept = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for weight in (w.W_E, w.W_U, *w.W_Q, *w.W_K, *w.W_V, *w.W_O):
        assert weight.untyped_storage().data_ptr() in kept
    assert w.W_K.shape[1] == getattr(model.config, "num_key_value_heads", w.n_heads)


def test_the_model_is_left_as_it_was():
    model = build("llama")
    model.set_attn_implementation("sdpa")
    model.train()
    expected = fc.trace(build("llama"), tokens())
    run = fc.trace(model, tokens())
    torch.testing.assert_close(run.final, expected.final, rtol=1e-6, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not run.final.requires_grad


def test_circuits_of_real_models_have_the_norms_in_them():
    """OV, QK and direct circuits against the weights written out, Gemma's scaled embeddings and 1 + weight included."""
    model = build("gemma2, caps that bite")
    w, inner = fc.CircuitWeights.from_model(model), model.model
    E, U, f = inner.embed_tokens.weight * 24**0.5, model.lm_head.weight.T, inner.norm.weight + 1
    layer = inner.layers[1]
    pre, post = layer.input_layernorm.weight + 1, layer.post_attention_layernorm.weight + 1
    V = (layer.self_attn.v_proj.weight[6:12] * pre).T
    W_O = layer.self_attn.o_proj.weight[:, 12:18].T * post
    Q = (layer.self_attn.q_proj.weight[12:18] * pre).T
    K = (layer.self_attn.k_proj.weight[6:12] * pre).T
    full = E @ V @ W_O * f @ U
    torch.testing.assert_close(fc.ov_circuit(w, (1, 2)).AB, full.detach())
    torch.testing.assert_close(fc.qk_circuit(w, (1, 2), scaled=True).AB, (E @ Q @ K.T @ E.T).detach() / 24**0.5)
    torch.testing.assert_close(fc.bigrams(w).AB, (E * f @ U).detach())
    torch.testing.assert_close(fc.virtual_weights(w, "embed", "unembed").AB, (E * f @ U).detach())
    eigenvalues = torch.linalg.eigvals(full.detach())
    largest = eigenvalues.abs().sort(descending=True).values[:6]
    torch.testing.assert_close(fc.circuit_eigenvalues(w, "OV")[1, 2].abs().sort(descending=True).values, largest)
    before = inner.layers[0]
    V0 = (before.self_attn.v_proj.weight[:6] * (before.input_layernorm.weight + 1)).T
    W_O0 = before.self_attn.o_proj.weight[:, :6].T * (before.post_attention_layernorm.weight + 1)
    OV0, OV1 = V0 @ W_O0, V @ W_O
    score = torch.linalg.matrix_norm(OV0 @ OV1) / torch.linalg.matrix_norm(OV0) / torch.linalg.matrix_norm(OV1)
    torch.testing.assert_close(fc.composition_scores(w, "V")[0, 0, 1, 2], score.detach())


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(what):
    model, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        fc.trace(model(), tokens())


def test_a_configuration_that_does_not_fit_is_named():
    model = build("qwen2")
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match=r"k_proj.weight' has shape \[12, 24\], but its configuration says \[24, 24\]"):
        fc.trace(model, tokens())


def test_a_model_that_was_changed_is_noticed():
    model = build("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 1.01, out[1]))
    with pytest.raises(
        RuntimeError,
        match=r"the heads of layer 1 write by the weights differs .* by .*: likely a hook on model.layers.1.self_attn;",
    ):
        fc.trace(model, tokens())
    model = build("gpt2")
    model.transformer.ln_f.register_forward_hook(lambda m, a, out: out + 1)
    with pytest.raises(RuntimeError, match="the final norm gives"):
        fc.trace(model, tokens())


def test_a_run_that_is_not_finite_is_noticed():
    model = build("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * torch.inf)
    with pytest.raises(
        RuntimeError, match=r"what the heads of layer 1 write \(model.layers.1.self_attn\) is not finite"
    ):
        fc.trace(model, tokens())


BAD_MASKS = {
    "shape": (torch.ones(2, 10).long(), ValueError, r"mask has shape \[2, 10\], but tokens has \[2, 11\]"),
    "floats": (torch.ones(2, 11), TypeError, "mask is torch.float32, expected a tensor of bools or integers"),
    "list": ([1], TypeError, "mask is a list, expected a tensor"),
    "nothing": (torch.eye(2, 11).long(), ValueError, "mask leaves nothing to predict"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_bad_masks(what):
    mask, error, message = BAD_MASKS[what]
    with pytest.raises(error, match=message):
        fc.trace(build("gpt2"), tokens(), mask)


def test_weights_of_a_whole_model_are_asked_for_a_run():
    weights = fc.CircuitWeights.from_model(build("gpt2"))
    with pytest.raises(ValueError, match="attention_only is False"):
        fc.trace(weights, tokens())
    with pytest.raises(ValueError, match="tokens has 40 positions, but W_pos has only 32"):
        fc.trace(build("gpt2"), tokens(1, 40))
