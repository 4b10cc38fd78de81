"""Local Hugging Face folders: memory-mapped weights without transformers, and the command."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

import pyarrow.parquet as pq  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.configurations import CONFIGURATIONS, FAMILIES, build, tokens  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.command.cli import app  # noqa: E402
from pyfastcircuits.model.layers import stacked  # noqa: E402
from pyfastcircuits.model.queries import frequencies  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(folder: Path, name: str, dtype=torch.float64, **options) -> Path:
    build(name, dtype).save_pretrained(folder, **options)
    return folder


IN_MEMORY = ("gpt2, scores scaled by layer",)  # a folder of it is refused
OPTIONS = ("eps", "norm", "norm_before_heads", "qk_norm", "qk_eps", "positional", "rotary_pairs", "rotary_scale", "rotary_length", "embed_scale", "write_scale", "logit_cap")  # fmt: skip


def assert_same(ours, theirs):
    own, expected = (dict(weights.tensors()) for weights in (ours, theirs))
    rotary = [x.pop("rotary_frequencies", None) is not None for x in (own, expected)]
    assert own.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(stacked(own[key]), stacked(tensor)), key
    for option in OPTIONS:
        assert getattr(ours, option) == getattr(theirs, option), option
    for layer in range(theirs.n_layers):
        assert ours.score_scale(layer) == pytest.approx(theirs.score_scale(layer), rel=1e-15)
        if any(rotary):  # in fp32 where the model keeps them
            torch.testing.assert_close(frequencies(ours, layer), frequencies(theirs, layer), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in IN_MEMORY])
def test_a_folder_holds_what_the_model_does(tmp_path, name):
    assert_same(fc.load_weights(saved(tmp_path, name)), fc.CircuitWeights.from_model(build(name)))


DEFAULTS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rope_parameters", "rope_theta", "partial_rotary_factor", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "attention_bias", "qkv_bias", "use_bias", "enable_bias", "bias", "tie_word_embeddings")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_that_leaves_defaults_out(tmp_path, name):
    """As transformers reads it."""
    edited(saved(tmp_path, name), **dict.fromkeys(DEFAULTS, "gone"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(fc.load_weights(tmp_path), fc.CircuitWeights.from_model(model))


def test_shards_older_names_and_older_configurations(tmp_path):
    """As on the hub: no prefix, masks kept as tensors, rotary options of their own, what is a default left out."""
    whole = fc.load_weights(saved(tmp_path / "whole", "gpt2"))
    shards = saved(tmp_path / "shards", "gpt2", max_shard_size="8KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert torch.equal(stacked(fc.load_weights(shards).W_O), stacked(whole.W_O))
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "whole" / "model.safetensors")
    assert torch.equal(stacked(fc.load_weights(tmp_path / "whole").W_V), stacked(whole.W_V))
    old = saved(tmp_path / "old", "pythia")
    config = json.loads((old / "config.json").read_text())
    del config["rope_parameters"], config["attention_bias"], config["tie_word_embeddings"]
    (old / "config.json").write_text(json.dumps(config | {"rotary_emb_base": 10000, "rotary_pct": 0.25}))
    assert frequencies(fc.load_weights(old), 0).tolist() == [1.0]  # of the 2 dimensions that are a quarter of 8


def test_float16_is_read_exactly_as_float32(tmp_path):
    folder = saved(tmp_path, "pythia", torch.float16)
    assert fc.load_weights(folder).W_E.dtype == torch.float32
    assert torch.equal(fc.load_weights(folder).W_E, build("pythia", torch.float16).gpt_neox.embed_in.weight.float())


def test_weights_stay_in_the_file_and_transformers_is_not_imported(tmp_path):
    """A process of its own: what it adds to its memory is file pages, and no module of transformers."""
    folder = saved(tmp_path, "llama", torch.float32)
    big = load_file(folder / "model.safetensors")
    big["model.layers.0.mlp.up_proj.weight"] = torch.zeros(20_000_000)  # 80 MB that circuits do not use
    big["model.embed_tokens.weight"] = torch.zeros(1_000_000, 24)  # 96 MB that they do
    big["lm_head.weight"] = torch.zeros(1_000_000, 24)
    save_file(big, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1_000_000}))
    code = f"""
import sys, torch, pyfastcircuits as fc
def memory(field):
    return int(next(x for x in open("/proc/self/status") if x.startswith(field)).split()[1]) / 1024
fc.load_weights("induction-2l")
anonymous, pages = memory("RssAnon"), memory("RssFile")
w = fc.load_weights({str(folder)!r})
assert not [m for m in sys.modules if m.split(".")[0] in ("transformers", "transformer_lens")]
print(memory("RssAnon") - anonymous, memory("RssFile") - pages)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    anonymous, pages = map(float, out.stdout.split())
    assert anonymous < 8
    assert pages < 215  # of 290


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "gone"}))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


BAD = {
    "family": (lambda f: edited(f, model_type="mamba"), ValueError, "model_type 'mamba' is not supported, only bloom, cohere"),
    "no family": (lambda f: edited(f, model_type="gone"), ValueError, "model_type None is not supported"),
    "pickle": (pickled, ValueError, r"weights in a pickle \(pytorch_model.bin\), and loading one runs code"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
    "missing": (lambda f: without(f, "model.norm.weight"), ValueError, "has no tensor 'model.norm.weight', which its configuration asks for"),
    "shape": (lambda f: edited(f, num_attention_heads=3, head_dim=6), ValueError, r"tensor 'model.layers.0.self_attn.q_proj.weight' has shape \[24, 24\], but its configuration says \[18, 24\]"),
    "layers": (lambda f: edited(f, num_hidden_layers=4), ValueError, "has no tensor 'model.layers.3.self_attn.q_proj.weight'"),
    "no layers": (lambda f: edited(f, num_hidden_layers=0), ValueError, "has no layers"),
    "option": (lambda f: edited(f, hidden_size="gone"), ValueError, "has no 'hidden_size'"),
    "config": (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is not readable JSON"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), ValueError, r"config\.json is not readable JSON: it is nested too deeply"),
    "odd": (lambda f: edited(f, num_hidden_layers=[2]), ValueError, "not 'list'"),
    "corrupt": (lambda f: (f / "model.safetensors").write_bytes(b"no"), ValueError, "not a readable safetensors file"),
    "quantized": (lambda f: edited(f, quantization_config={"bits": 4}), ValueError, "quantization_config is .*of a model on disk that is not read: load the model itself"),
    "shard": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'), FileNotFoundError, "gone.safetensors is missing"),
    "outside": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'), ValueError, "names '../a.safetensors', which is not a file of the folder"),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), ValueError, "holds a list, expected an object"),
}  # fmt: skip


MISSING = {
    "gpt2": ("transformer.h.1.attn.c_attn.bias", "transformer.wpe.weight", "transformer.h.0.ln_1.bias"),
    "pythia": ("gpt_neox.layers.0.attention.dense.bias", "embed_out.weight"),
    "gpt2, one layer, odd heads, not tied": ("lm_head.weight",),
    "llama, biases, yarn": ("model.layers.0.self_attn.v_proj.bias", "model.layers.1.input_layernorm.weight", "lm_head.weight"),
    "qwen2": ("model.layers.0.self_attn.k_proj.bias",),
    "qwen3": ("model.layers.2.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
    "gemma2": ("model.layers.0.post_attention_layernorm.weight",),
    "phi, norms of queries and keys, grouped": ("lm_head.bias", "model.layers.0.self_attn.q_layernorm.weight"),
    "stablelm, biases, parallel, norms of queries and keys": ("model.layers.0.self_attn.k_layernorm.norms.0.weight",),
    "gpt_oss, sinks, windows, yarn": ("model.layers.0.self_attn.sinks",),
    "bloom": ("transformer.word_embeddings_layernorm.bias",),
    "gptj": ("lm_head.bias",),
    "opt": ("model.decoder.layers.0.self_attn.out_proj.bias",),
    "deepseek_v3": ("model.layers.0.self_attn.kv_a_layernorm.weight",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "gone"), [(name, gone) for name, each in MISSING.items() for gone in each])
def test_a_tensor_that_the_configuration_asks_for_is_missed(tmp_path, name, gone):
    saved(tmp_path, name)
    held = load_file(tmp_path / "model.safetensors").keys()
    without(tmp_path, next(full for full in held if gone.endswith(full)))
    with pytest.raises(ValueError, match=r"has no tensor .*, which its configuration asks for"):
        [tensor[0] for _, tensor in fc.load_weights(tmp_path).tensors()]


def test_biases_that_no_configuration_asks_for_are_not_read(tmp_path):
    """As transformers leaves them out."""
    tensors = load_file(saved(tmp_path, "llama") / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}, tmp_path / "model.safetensors")
    assert fc.load_weights(tmp_path).b_Q is None


def test_scores_that_are_scaled_by_layer_want_the_model_itself(tmp_path):
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True, and of a model on disk this is not"):
        fc.load_weights(saved(tmp_path, *IN_MEMORY))


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(tmp_path, what):
    spoil, error, message = BAD[what]
    spoil(saved(tmp_path, "llama"))
    with pytest.raises(error, match=f"name_or_path is '.*': .*{message}"):
        fc.load_weights(tmp_path)


BY_COMMAND = ("gpt2", "pythia", "llama 3, grouped", "mistral, window", "qwen3", "gemma2", "olmo2", "bloom", "falcon, grouped, two norms")  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"[BOS]": 0, "?": 1} | {f"w{i}": i for i in range(2, 89)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", BY_COMMAND)
def test_sweep(tmp_path, name):
    folder = saved(tmp_path / "model", name, torch.float32)
    tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{2 + i * i % 87}" for i in range(40)))
    result = run("sweep", "--model", folder, "--text", text, "--length", 11, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    ids = torch.tensor([2 + i * i % 87 for i in range(40)]).view(4, 10)
    rows = torch.cat((torch.zeros(4, 1, dtype=torch.long), ids), 1)
    trace = fc.trace(build(name, torch.float32), rows)
    expected = fc.pair_ablation(trace)
    found = pq.read_table(tmp_path / "sweep.parquet")
    torch.testing.assert_close(torch.tensor(found["nll"].to_pylist()), expected.loss, rtol=1e-5, atol=1e-5)
    orders = pq.read_table(tmp_path / "orders.parquet").to_pydict()["loss"]
    torch.testing.assert_close(torch.tensor(orders[1:-1]), fc.order_losses(trace), rtol=1e-5, atol=1e-5)
    assert orders[-1] == pytest.approx(float(trace.loss), rel=1e-5)


@pytest.mark.parametrize("name", BY_COMMAND)
def test_composition(tmp_path, name):
    folder = saved(tmp_path / "model", name, torch.float32)
    result = run("composition", "--model", folder, "--kind", "V", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    weights = fc.CircuitWeights.from_model(build(name, torch.float32))
    weights = fc.center(weights) if weights.norm == "layernorm" else weights
    scores = fc.composition_scores(weights, "V")
    found = pq.read_table(tmp_path / "composition-V.parquet").to_pydict()
    row = [found[n][5] for n in ("source_layer", "source_head", "dest_layer", "dest_head")]
    assert found["score"][5] == pytest.approx(float(scores[tuple(row)]), rel=1e-5)


def test_the_command_names_what_is_wrong(tmp_path):
    folder = saved(tmp_path / "model", "llama", torch.float32)
    assert "model is given twice" in run("sweep", folder, "--model", folder, "--out", tmp_path).output
    assert (
        "has no tokenizer.json, so it reads token ids and no text; give tokens"
        in run("sweep", "--model", folder, "--out", tmp_path).output
    )
    without(folder, "model.layers.1.mlp.up_proj.weight")
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, tokens(1)[0].tolist())))
    result = run("sweep", "--model", folder, "--tokens", ids, "--out", tmp_path)
    assert result.exit_code == 2
    assert "has no tensor 'model.layers.1.mlp.up_proj.weight', which its configuration asks for" in " ".join(
        result.output.split()
    )
