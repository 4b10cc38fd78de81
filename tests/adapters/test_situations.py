"""Models as people have them: wrapped, adapted, quantised, offloaded, hooked, changed; each is exact or refused by name."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import build, tokens  # noqa: E402

import pyfastcircuits as fc  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def llama(dtype=torch.float64):
    return build("llama 3, grouped", dtype)


def check_exact(model, inner=None, digits=1e-9):
    """The sum over orders is the model's own logits, with attention as transformers' eager function has it."""
    inner = model if inner is None else inner
    run = fc.trace(model, tokens())
    inner.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = inner(tokens(), use_cache=False).logits.to(run.final.dtype)
    assert float((run.logits() - theirs).abs().max() / theirs.abs().max()) <= digits
    assert torch.isfinite(fc.head_ablation(run, attention="recomputed").values).all()
    last = fc.order_losses(run)[-1]
    torch.testing.assert_close(last, run.loss)
    return run


class Quantized(nn.Module):
    """A Linear kept in eight bits, as quantisation libraries have it: its forward alone knows the weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class LowRank(nn.Module):
    """What PEFT puts in the place of a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.first, self.second = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features, bias=False)
        self.to(linear.weight.dtype)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.second(self.first(x))


def in_place_of(model, kind, names=("q_proj", "k_proj", "v_proj", "o_proj")):
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name)))
    return model


def test_a_quantised_model_is_read_through_its_own_modules():
    model = in_place_of(llama(), Quantized)
    model.config.quantization_config = {"bits": 8}
    run = check_exact(model)
    assert not run.weights.W_V.held  # no layer is kept dequantised


def test_an_adapter_that_is_not_merged():
    check_exact(in_place_of(llama(), LowRank))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "head", "merged"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    model, lora = llama(), {"r": 2, "init_lora_weights": False}
    if kind == "ia3":
        names = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        config = peft.IA3Config(**names, init_ia3_weights=False)
    elif kind == "head":
        config = peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], **lora)
    else:
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], use_dora=kind == "dora", **lora
        )
    wrapped = peft.get_peft_model(model, config).double().eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if kind == "merged":
        wrapped = wrapped.merge_and_unload()
        check_exact(wrapped)
    else:
        check_exact(wrapped, wrapped.get_base_model())


def test_prompts_that_peft_learned_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PROMPT_TUNING: it puts tokens of its own in front"):
        fc.trace(peft.get_peft_model(llama(), config), tokens())


@pytest.mark.parametrize("older", [False, True])
def test_weight_norm(older):
    model = llama()
    of = nn.utils.weight_norm if older else nn.utils.parametrizations.weight_norm
    for layer in model.model.layers:
        of(layer.self_attn.v_proj)
        of(layer.self_attn.o_proj)
        for parameter in layer.self_attn.v_proj.parameters():
            parameter.data *= 1.5
    check_exact(model)


@pytest.mark.parametrize("to", ["cpu_offload", "disk_offload"])
def test_offloaded_layers_are_fetched_one_at_a_time(to, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, folder = llama(torch.float32), [tmp_path] if to == "disk_offload" else []
    getattr(accelerate, to)(model, *folder, execution_device="cpu")
    run = check_exact(model, digits=1e-5)
    assert not run.weights.W_Q.held


class Around:
    """A wrapper like nnsight's, which holds the model as `_model`."""

    def __init__(self, model):
        self._model, self.dispatched = model, True

    def dispatch(self):
        self.dispatched = True


def test_wrappers():
    model = llama()
    expected = fc.trace(model, tokens()).loss
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model), Around(model), Around(compiled)):
        assert fc.trace(wrapped, tokens()).loss == expected
        assert fc.CircuitWeights.from_model(wrapped).n_layers == 3
    lazy = Around(model)
    lazy.dispatched = False
    with pytest.raises(ValueError, match=r"Around that has not loaded its weights: call its dispatch\(\) first"):
        fc.trace(lazy, tokens())
    model.compile(backend="eager")
    assert fc.trace(model, tokens()).loss == expected


def test_autocast_and_inference_mode_change_nothing():
    model = llama(torch.float32)
    expected = fc.trace(model, tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert fc.trace(model, tokens()).loss == expected
    with torch.inference_mode():
        assert fc.trace(model, tokens()).loss == expected


@pytest.mark.parametrize("wide", ["norm", "head"])
def test_a_bfloat16_model_with_a_part_in_fp32(wide):
    model = build("gemma2", torch.bfloat16)

    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    if wide == "head":
        weight = model.lm_head.weight.detach().float()
        model.lm_head = Head(weight.shape[1], len(weight), bias=False)
        model.lm_head.weight.data = weight
    else:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
    run = check_exact(model, digits=0.05)
    assert run.weights.W_E.dtype == torch.bfloat16
    assert (run.weights.W_U if wide == "head" else run.weights.ln_w).dtype == torch.float32


def test_layers_that_are_shared_or_fewer_than_configured():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    assert check_exact(model).weights.n_layers == 3
    model = llama()
    model.config.num_hidden_layers = 2
    assert check_exact(model).weights.n_layers == 2
    model = llama()
    del model.model.layers[1]
    assert check_exact(model).weights.n_layers == 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_that_the_model_has_counts_and_not_its_flags(tied):
    model = llama()
    model.config.tie_word_embeddings = tied
    model.lm_head = nn.Linear(24, 89, bias=True).double()
    run = check_exact(model)
    torch.testing.assert_close(run.weights.b_U, model.lm_head.bias.detach())


def test_an_output_vocabulary_of_its_own_size():
    model = llama()
    model.lm_head = nn.Linear(24, 3, bias=False).double()
    run = fc.trace(model, tokens())
    torch.testing.assert_close(run.logits(), model(tokens(), use_cache=False).logits.detach(), rtol=1e-5, atol=1e-5)
    found = fc.head_ablation(run, targets=torch.tensor([0, 2]), positions=-1)
    assert torch.isfinite(found.values).all()
    with pytest.raises(ValueError, match="d_vocab_out is 3, but d_vocab is 89"):
        fc.head_ablation(run)


def test_an_adapter_on_gpt2():
    """Its Linears are kept transposed."""

    class OnConv1D(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.base_layer, self.more = linear, nn.Linear(linear.nx, linear.nf, bias=False).double()

        def forward(self, x):
            return self.base_layer(x) + self.more(x)

    model = build("gpt2")
    for layer in model.transformer.h:
        layer.attn.c_attn, layer.attn.c_proj = OnConv1D(layer.attn.c_attn), OnConv1D(layer.attn.c_proj)
    check_exact(model)


def changed(part, function):
    model = llama()
    model.get_submodule(part).register_forward_hook(function)
    return model


HOOKED = {
    "lm_head": lambda _, read, gave: gave + torch.arange(gave.shape[-1]),
    "": lambda _, read, gave: setattr(gave, "logits", gave.logits * 2),
    "model.norm": lambda _, read, gave: gave * 1.1,
    "model.embed_tokens": lambda _, read, gave: gave + 1,
    "model.layers.1.self_attn.v_proj": lambda _, read, gave: gave * 1.3,
    "model.layers.2.self_attn": lambda _, read, gave: (gave[0] + 1, gave[1]),
}


@pytest.mark.parametrize("part", HOOKED)
def test_a_hook_that_changes_what_weights_say_is_named(part):
    name = part or "LlamaForCausalLM"
    with pytest.raises(RuntimeError, match=rf"differs from the model's .*by .*: likely a hook on {name}; remove"):
        fc.trace(changed(part, HOOKED[part]), tokens())


def test_a_hook_on_a_layer_is_a_source():
    """What it adds to the residual stream is no attention head's."""
    check_exact(changed("model.layers.1", lambda _, read, gave: (gave[0] if isinstance(gave, tuple) else gave) + 1))


def test_a_forward_that_was_replaced_is_named():
    model = llama()
    attention = model.model.layers[0].self_attn
    whole = attention.forward
    attention.forward = lambda *given, **more: (2 * whole(*given, **more)[0], None)
    with pytest.raises(
        RuntimeError, match=r"likely a forward of its own that model\.layers\.0\.self_attn has been given"
    ):
        fc.trace(model, tokens())
    attention.forward = lambda *given, **more: (whole(*given, **more), whole(*given, **more))[0]
    with pytest.raises(ValueError, match="model attended 4 times in 3 layers: a forward method has been replaced"):
        fc.trace(model, tokens())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LlamaForSequenceClassification", "LlamaForSequenceClassification gives no next-token logits"),
        ("LlamaModel", "LlamaModel gives no next-token logits"),
        ("BertForMaskedLM", "BertForMaskedLM gives no next-token logits: it is an encoder"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration gives no next-token logits"),
    ],
)
def test_models_without_next_token_logits_are_refused_by_name(name, message):
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 89, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "d_model": 24}
    model = kind(kind.config_class(**sizes, num_attention_heads=2, num_layers=1, d_kv=4, d_ff=8, num_heads=2))
    with pytest.raises(ValueError, match=message):
        fc.trace(model, tokens())


def test_position_ids():
    model, places = build("gpt2"), torch.arange(3, 14)
    run = fc.trace(model, tokens(), position_ids=places)
    with torch.no_grad():
        theirs = model(tokens(), position_ids=places[None].expand(2, -1)).logits
    torch.testing.assert_close(run.logits(), theirs)
    assert not torch.equal(run.logits(), fc.trace(model, tokens()).logits())
    for wrong, error, message in (
        (places[None], ValueError, r"position_ids has shape \[1, 11\], expected \[11\] or \[2, 11\]"),
        (places + 999, IndexError, "position_ids"),
        (places - 9, IndexError, "position_ids holds -6"),
        (places.double(), TypeError, "position_ids has dtype torch.float64, expected integers"),
    ):
        with pytest.raises(error, match=message):
            fc.trace(model, tokens(), position_ids=wrong)
    with pytest.raises(ValueError, match="position_ids is given, but BloomForCausalLM takes none"):
        fc.trace(build("bloom"), tokens(), position_ids=places)


def test_weights_that_change_past_torchs_counters_are_noticed():
    model = llama()
    run = fc.trace(model, tokens())
    loss = run.loss
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for use in (lambda: run.loss, run.logits, lambda: fc.order_losses(run), lambda: fc.head_ablation(run)):
        with pytest.raises(
            RuntimeError, match="changed in place since this run was made, past torch's version counters"
        ):
            use()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(before[name])
    assert run.loss == loss


def test_attention_that_looks_ahead_is_refused():
    model = llama()
    whole = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *given, **more: whole(*given, **(more | {"attention_mask": None}))
    with pytest.raises(ValueError, match="attention of layer 0 is not causal, and such is not supported"):
        fc.trace(model, tokens())
