"""The sweep command, end to end, on a small random model and on bad input."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import random_tokens, random_weights
from typer.testing import CliRunner

import pyfastcircuits as fc
from pyfastcircuits.cli import app


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    random_weights(2, norm="rmsnorm", dtype=torch.float32).save(folder / "model.safetensors")
    return folder


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens.npy"
    np.save(file, random_tokens(3, 12).numpy())
    return file


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def test_sweep_writes_what_the_library_says(model, tokens, tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("sweep", model, "--tokens", tokens, "--out", out, "--top", 3)
    assert result.exit_code == 0, result.output
    trace = fc.trace(fc.load_weights(model), torch.from_numpy(np.load(tokens)))
    expected = fc.pair_ablation(trace, kl=True)
    table = pq.read_table(out / "sweep.parquet")
    names = ["source_layer", "source_head", "dest_layer", "dest_head", "nll", "delta_nll", "kl"]
    assert table.column_names == names
    columns = {name: table[name].to_numpy() for name in names}
    assert np.array_equal(np.stack([columns[n] for n in names[:4]], 1), expected.pairs.reshape(-1, 4).numpy())
    for name, values in (("nll", expected.loss), ("delta_nll", expected.delta), ("kl", expected.kl)):
        np.testing.assert_array_equal(columns[name], values.double().numpy())
    orders = pq.read_table(out / "orders.parquet").to_pydict()
    assert orders["paths"] == ["uniform", "order 0 (direct path)", "order <= 1", "order <= 2", "full model"]
    np.testing.assert_allclose(orders["loss"][1:4], fc.order_losses(trace).tolist())
    assert orders["loss"][0] == pytest.approx(np.log(97))
    assert (out / "pairs.png").stat().st_size > 10_000
    (a, b), (c, d) = expected.top(1)[0][0]
    assert f"{a}.{b}" in result.output
    assert f"{c}.{d}" in result.output
    assert "pairs/s" in result.output
    for number in ("1.8", "5.2", "0.3"):
        assert number in result.output


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_any_depth(tmp_path, tokens, layers):
    file = tmp_path / "m.safetensors"
    random_weights(layers, dtype=torch.float32).save(file)
    result = run("sweep", file, "--tokens", tokens, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert pq.read_table(tmp_path / "out" / "sweep.parquet").num_rows == 16 * layers * (layers - 1) // 2
    assert (tmp_path / "out" / "pairs.png").exists() == (layers > 1)


@pytest.mark.parametrize(
    "option", [["--dtype", "float64"], ["--dtype", "bfloat16"], ["--backend", "reference"], ["--low-memory"]]
)
def test_options_agree(model, tokens, tmp_path, option):
    for name, more in (("plain", []), ("other", option)):
        assert run("sweep", model, "--tokens", tokens, "--out", tmp_path / name, *more).exit_code == 0
    plain, other = (pq.read_table(tmp_path / n / "sweep.parquet")["nll"].to_numpy() for n in ("plain", "other"))
    np.testing.assert_allclose(plain, other, rtol=2e-2 if "bfloat16" in option else 1e-5)


def test_token_text(model, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("1 2 3\n4 5 6\n")
    assert run("sweep", model, "--tokens", file, "--out", tmp_path / "out").exit_code == 0


BAD = {
    "model": (["no-such-model"], "no-such-model: neither a file or folder nor a bundled model"),
    "scope": (["--scope", "nowhere"], "scope is 'nowhere'"),
    "both": (["--text", "x"], "--text and --tokens: give one of them"),
    "cuda": (["--backend", "cuda"], "backend='cuda' needs a CUDA device"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(model, tokens, tmp_path, what):
    if what == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, message = BAD[what]
    name = [] if what == "model" else [model]
    result = run("sweep", *name, *arguments, "--tokens", tokens, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2\n3\n", "lengths"),
        ("a b\n", "not a text of token ids"),
        ("", "none"),
        ("1 200\n", "is 200"),
        ("5\n", "at least 2"),
    ],
)
def test_bad_tokens_are_one_line(model, tmp_path, content, message):
    file = tmp_path / "tokens.txt"
    file.write_text(content)
    result = run("sweep", model, "--tokens", file, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output


def test_bad_arrays_are_one_line(model, tmp_path):
    for name, write in (
        ("float.npy", lambda f: np.save(f, np.zeros(4))),
        ("pickled.npy", lambda f: np.save(f, np.array([{}], dtype=object), allow_pickle=True)),
        ("empty.npy", lambda f: f.touch()),
    ):
        write(tmp_path / name)
        result = run("sweep", model, "--tokens", tmp_path / name, "--out", tmp_path / "out")
        assert (result.exit_code, name in result.output) == (1, True)


def test_a_folder_that_cannot_be_written_is_found_before_the_work(model, tokens, tmp_path):
    (tmp_path / "file").touch()
    result = run("sweep", model, "--tokens", tokens, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot write there" in result.output


def test_text_without_a_tokenizer_and_a_broken_one(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    result = run("sweep", model, "--text", text, "--out", tmp_path / "out")
    assert (result.exit_code, "no tokenizer.json" in result.output) == (1, True)
    (model / "tokenizer.json").write_text("{")
    result = run("sweep", model, "--text", text, "--out", tmp_path / "out")
    assert (result.exit_code, "not a readable tokenizer" in result.output) == (1, True)
    (model / "tokenizer.json").unlink()
    result = run("sweep", model, "--text", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert (result.exit_code, "missing.txt" in result.output) == (1, True)


def test_info():
    result = run("info")
    assert result.exit_code == 0
    assert f"cpu_tier: {fc.build_info()['cpu_tier']}" in result.output


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_writes_what_the_library_says(model, tmp_path, kind):
    result = run("composition", model, "--kind", kind, "--out", tmp_path / "out", "--top", 2)
    assert result.exit_code == 0, result.output
    weights = fc.load_weights(model)
    scores, z = fc.composition_scores(weights, kind), fc.composition_z_scores(weights, kind)
    table = pq.read_table(tmp_path / "out" / f"composition-{kind}.parquet").to_pydict()
    where = tuple(table[n] for n in ("source_layer", "source_head", "dest_layer", "dest_head"))
    np.testing.assert_array_equal(table["score"], scores.double()[where].numpy())
    np.testing.assert_array_equal(table["z"], z.double()[where].numpy())
    assert len(table["score"]) == 16
    best = int(np.argmax(table["z"]))
    assert f"{where[0][best]}.{where[1][best]}" in result.output
    assert ("eigenvalues_real" in table) == (kind == "K")
    assert (tmp_path / "out" / f"composition-{kind}.png").stat().st_size > 10_000


def test_composition_of_the_bundled_induction_model(tmp_path):
    """The previous-token head composes with the induction heads through keys: z > 3, and a positive spectrum."""
    weights = fc.load_weights("induction-2l")
    half = torch.randint(0, weights.d_vocab, (4, 40), generator=torch.Generator().manual_seed(0))
    trace = fc.trace(weights, torch.cat((half, half), 1))
    previous = int(trace.pattern(0).diagonal(-1, -2, -1).mean((0, 2)).argmax())
    induction = trace.pattern(1).diagonal(-39, -2, -1).mean((0, 2))
    heads = (induction > 0.4).nonzero()[:, 0].tolist()
    assert heads
    z = fc.composition_z_scores(weights, "K")
    spectra = fc.composed_eigenvalues(weights, [((0, previous), (1, head)) for head in heads])
    for head, spectrum in zip(heads, spectra, strict=True):
        assert float(z[0, previous, 1, head]) > 3
        assert float(fc.positivity(spectrum)) > 0.9
    result = run("composition", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "1.00" in result.output


def test_composition_of_bad_input(tmp_path, model):
    random_weights(1, dtype=torch.float32).save(tmp_path / "one.safetensors")
    for arguments, message in (
        (("composition", tmp_path / "one.safetensors"), "composition needs two heads in different layers"),
        (("composition", "no-such-model"), "no-such-model"),
        (("composition", model, "--backend", "cuda"), "backend='cuda'"),
    ):
        result = run(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert message in result.output.replace("\n", " ")
    assert run("composition", model, "--kind", "X").exit_code == 2
