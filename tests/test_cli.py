"""The sweep command, end to end, on a small random model and on bad input."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.command import run
from support.random_models import random_tokens, random_weights
from typer.testing import CliRunner

import pyfastcircuits as fc
from pyfastcircuits.command.cli import app
from pyfastcircuits.command.made import check_folder
from pyfastcircuits.command.plain import percent, significant


def test_sweep_writes_what_the_library_says(model, tokens, tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("sweep", model, "--tokens", tokens, "--out", out, "--top", 3)
    assert result.exit_code == 0, result.output
    trace = fc.trace(fc.load_weights(model), torch.from_numpy(np.load(tokens)))
    expected = fc.pair_ablation(trace, kl=True)
    table = pq.read_table(out / "sweep.parquet")
    names = ["source_layer", "source_head", "dest_layer", "dest_head", "nll", "delta_nll", "kl", "standard_error"]
    assert table.column_names == names
    columns = {name: table[name].to_numpy() for name in names}
    assert np.array_equal(np.stack([columns[n] for n in names[:4]], 1), expected.pairs.reshape(-1, 4).numpy())
    for name, values in (("nll", expected.loss), ("delta_nll", expected.delta), ("kl", expected.kl)):
        np.testing.assert_allclose(columns[name], values.double().numpy(), rtol=1e-5)
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
    "model": (["no-such-model"], "MODEL is 'no-such-model': neither a file or folder nor a bundled model"),
    "mode": (["--mode", "resample"], "mode is 'resample', but the run has one sequence"),
    "against": (["--metric", "logit_difference"], "against is missing, but metric is 'logit_difference'"),
    "attention": (["--attention", "recomputed"], "attention is 'recomputed', but scope is 'path'"),
    "both": (["--text", "x"], "--text and --tokens: give one of them"),
    "cuda": (["--backend", "cuda"], "backend='cuda': there is no CUDA C++ kernel of sweep_nll; take backend='triton'"),
}


@pytest.mark.parametrize(
    ("option", "there"),
    [
        ("--scope", ["path", "direct", "edge", "joint", "head", "layer"]),
        ("--mode", ["zero", "mean", "resample"]),
        ("--metric", ["nll", "kl", "logit_difference", "probability", "rank", "top1"]),
    ],
)
def test_unknown_choices_list_those_there_are(model, tokens, option, there):
    result = run("sweep", model, "--tokens", tokens, option, "nowhere")
    assert result.exit_code == 2
    assert all(name in result.output for name in ["nowhere", *there])


SWEEPS = {
    "head": ["layer", "head", "nll", "delta_nll", "kl", "standard_error"],
    "layer": ["layer", "nll", "delta_nll", "kl", "standard_error"],
    "joint": ["source_layer", "source_head", "dest_layer", "dest_head", "nll", "delta_nll", "kl", "standard_error"],
}


@pytest.mark.parametrize("scope", SWEEPS)
def test_scopes(model, tokens, tmp_path, scope):
    arguments = ("--scope", scope, "--mode", "mean", "--attention", "recomputed", "--top", 2)
    result = run("sweep", model, "--tokens", tokens, "--out", tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    trace = fc.trace(fc.load_weights(model), torch.from_numpy(np.load(tokens)))
    ablation = {"head": fc.head_ablation, "layer": fc.layer_ablation}.get(scope)
    expected = (ablation or (lambda *a, **o: fc.pair_ablation(a[0], scope, *a[1:], **o)))(trace, "mean", "recomputed")
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table.column_names == SWEEPS[scope]
    np.testing.assert_allclose(table["nll"].to_numpy(), expected.values.double().flatten().numpy(), rtol=1e-6)
    kind = {"head": "heads", "layer": "layers"}.get(scope, "pairs")
    assert (tmp_path / f"{kind}.png").stat().st_size > 5_000
    assert f"{kind}/s" in result.output


def test_metrics(model, tokens, tmp_path):
    result = run("sweep", model, "--tokens", tokens, "--out", tmp_path, "--scope", "head", "--metric", "rank")
    assert result.exit_code == 0, result.output
    assert "rise of the rank without it" in result.output
    assert pq.read_table(tmp_path / "sweep.parquet").column_names == [
        "layer",
        "head",
        "rank",
        "delta_rank",
        "kl",
        "standard_error",
    ]


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(model, tokens, tmp_path, what):
    if what == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, message = BAD[what]
    name = [] if what == "model" else [model]
    if what == "mode":
        np.save(tokens, random_tokens(1, 12).numpy())
    result = run("sweep", *name, *arguments, "--tokens", tokens, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2\n3\n", "lengths"),
        ("a b\n", "line 1 holds 'a', expected ids"),
        ("", "none"),
        ("1 200\n", "is 200"),
        ("5\n", "at least 2"),
    ],
)
def test_bad_tokens_are_one_line(model, tmp_path, content, message):
    file = tmp_path / "tokens.txt"
    file.write_text(content)
    result = run("sweep", model, "--tokens", file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output


def test_bad_arrays_are_one_line(model, tmp_path):
    for name, write in (
        ("float.npy", lambda f: np.save(f, np.zeros(4))),
        ("pickled.npy", lambda f: np.save(f, np.array([{}], dtype=object), allow_pickle=True)),
        ("empty.npy", lambda f: f.touch()),
    ):
        write(tmp_path / name)
        result = run("sweep", model, "--tokens", tmp_path / name, "--out", tmp_path / "out")
        assert (result.exit_code, name in result.output) == (2, True)


def test_a_folder_that_cannot_be_written_is_found_before_the_work(model, tokens, tmp_path):
    (tmp_path / "file").touch()
    result = run("sweep", model, "--tokens", tokens, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot write there" in result.output


def test_several_processes_may_look_at_the_folder_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check_folder, [tmp_path / "out"] * 400))
    assert list((tmp_path / "out").iterdir()) == []


def test_text_without_a_tokenizer_and_a_broken_one(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    result = run("sweep", model, "--text", text, "--out", tmp_path / "out")
    assert (result.exit_code, "no tokenizer.json" in result.output) == (2, True)
    (model / "tokenizer.json").write_text("{")
    result = run("sweep", model, "--text", text, "--out", tmp_path / "out")
    assert (result.exit_code, "not a readable tokenizer" in result.output) == (2, True)
    (model / "tokenizer.json").unlink()
    result = run("sweep", model, "--text", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert (result.exit_code, "missing.txt" in result.output) == (2, True)


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


@pytest.mark.parametrize("command", ["composition", "heads"])
def test_figures_stay_whole_in_80_columns(command, tmp_path):
    found = []
    for width in ("80", "160"):
        result = CliRunner().invoke(app, [command, "--out", str(tmp_path)], env={"COLUMNS": width})
        assert result.exit_code == 0, result.output
        rows = [line for line in result.output.splitlines() if line.startswith("│")]
        found.append([[cell.strip() for cell in row.strip("│").split("│")] for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) > 3


def test_composition_of_bad_input(tmp_path, model):
    random_weights(1, dtype=torch.float32).save(tmp_path / "one.safetensors")
    for arguments, message in (
        (("composition", tmp_path / "one.safetensors"), "composition needs two heads in different layers"),
        (("composition", "no-such-model"), "no-such-model"),
        (("composition", model, "--backend", "cuda"), "backend='cuda'"),
    ):
        result = run(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
    assert run("composition", model, "--kind", "X").exit_code == 2


def test_tables_of_all_heads_are_what_the_library_says(worded, tmp_path):
    result = run("tables", worded, "--all-heads", "--out", tmp_path / "out", "-k", 4, "--normed")
    assert result.exit_code == 0, result.output
    weights = fc.load_weights(worded)
    tables = {
        name: pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
        for name in ("ov", "qk", "skip-trigrams", "copying", "bigrams")
    }
    assert {name: len(rows) for name, rows in tables.items()} == {
        "ov": 32,
        "qk": 32,
        "skip-trigrams": 32,
        "copying": 8,
        "bigrams": 4,
    }
    accuracy, eigenvalues = fc.copying_accuracy(weights), fc.copying_scores(weights)
    for i, row in enumerate(tables["copying"]):
        layer, head = row["layer"], row["head"]
        assert i == 4 * layer + head
        for name, x in {**accuracy._asdict(), "eigenvalues": eigenvalues}.items():
            assert row[name] == pytest.approx(float(x[layer, head]), abs=1e-6)
    for name, rows in tables.items():
        for row in rows:
            for column in ("source", "destination", "output", "token", "next"):
                if column in row:
                    assert row[f"{column}_text"] == (f"a{row[column]}" if row[column] else "[START]"), name
    for head in ((0, 1), (1, 3)):
        mine = {n: [r for r in rows if (r.get("layer"), r.get("head")) == head] for n, rows in tables.items()}
        best = fc.top_entries(fc.ov_circuit(weights, head, normed=True), 4, normalize="center")
        assert [(r["source"], r["output"]) for r in mine["ov"]] == list(
            zip(*(x.tolist() for x in best[1:]), strict=True)
        )
        np.testing.assert_allclose([r["logit"] for r in mine["ov"]], best.values, rtol=1e-5)
        scores = fc.qk_tables(weights, head, normed=True).token_token
        best = fc.top_entries(scores, 4, normalize="center")
        assert [(r["destination"], r["source"]) for r in mine["qk"]] == list(
            zip(*(x.tolist() for x in best[1:]), strict=True)
        )
        triples = fc.skip_trigrams(weights, head, k=4, normed=True).top(4)
        assert [(r["source"], r["destination"], r["output"]) for r in mine["skip-trigrams"]] == [t[:3] for t in triples]
        np.testing.assert_allclose([r["score"] for r in mine["skip-trigrams"]], [t.score for t in triples])
        assert [r["rank"] for r in mine["skip-trigrams"]] == [0, 1, 2, 3]
    best = fc.top_entries(fc.bigrams(weights, normed=True), 4, normalize="center")
    assert [(r["token"], r["next"]) for r in tables["bigrams"]] == list(
        zip(*(x.tolist() for x in best[1:]), strict=True)
    )


def test_tables_of_a_head_and_of_tokens(worded):
    weights = fc.load_weights(worded)
    result = run("tables", worded, "--head", "1.2", "--source", "a7", "--source", "[START]", "-k", 3)
    assert result.exit_code == 0, result.output
    found = fc.skip_trigrams(weights, (1, 2), [7, 0], 3)
    for tokens, values in ((found.destinations, found.attention), (found.outputs, found.logits)):
        for token, value in zip(tokens.flatten().tolist(), values.flatten().tolist(), strict=True):
            assert f"'a{token}' {significant(value, signed=True)}" in result.output
    assert "'[START]'" in result.output
    result = run("tables", worded, "--head", "1.2", "-k", 3)
    for triple in fc.skip_trigrams(weights, (1, 2), k=3).top(3):
        assert significant(triple.score, signed=True) in result.output
        assert f"'a{triple.output}'" in result.output
    result = run("tables", worded, "--source", "a9", "-k", 2)
    best = fc.top_per_row(fc.bigrams(weights), 2, [9], normalize="center")
    for token, value in zip(best.columns[0].tolist(), best.values[0].tolist(), strict=True):
        assert f"'a{token}' {significant(value, signed=True)}" in result.output
    result = run("tables", worded, "-k", 1)
    best, accuracy = fc.top_entries(fc.bigrams(weights), 1, normalize="center"), fc.copying_accuracy(weights)
    assert significant(float(best.values[0]), signed=True) in result.output
    assert percent(float(accuracy.positive[1, 3])) in result.output


def test_tables_without_a_tokenizer_show_ids(model):
    result = run("tables", model, "--head", "0.0", "--source", "5", "-k", 2)
    assert result.exit_code == 0, result.output
    assert f"'{int(fc.skip_trigrams(fc.load_weights(model), (0, 0), [5], 2).outputs[0, 0])}'" in result.output
    named = run("tables", "--model", model, "--head", "0.0", "--source", "5", "-k", 2)
    assert named.output == result.output


def test_tables_of_rotary_positions_at_an_offset(tmp_path):
    weights = random_weights(1, positional="rotary", dtype=torch.float32)
    weights.save(tmp_path / "m.safetensors")
    result = run("tables", tmp_path / "m.safetensors", "--head", "0.1", "--source", 8, "--offset", 3, "-k", 1)
    found = fc.skip_trigrams(weights, (0, 1), [8], 1, offset=3)
    assert f"'{int(found.destinations)}' {significant(float(found.attention), signed=True)}" in result.output


def test_tables_of_bad_input(worded, tmp_path):
    random_weights(0, dtype=torch.float32).save(tmp_path / "none.safetensors")
    for arguments, message in (
        ([worded, "--head", "4"], "--head is '4', expected LAYER.HEAD"),
        ([worded, "--head", "2.0"], "head is 2.0; the model has layers 0 to 1"),
        ([worded, "--head", "0.0", "--source", "a1 a2"], "'a1 a2' is 2 tokens, expected one: 'a1', 'a2'"),
        ([worded, "--source", ""], "'' is 0 tokens, expected one: none"),
        ([worded, "--head", "0.0", "--check"], "--head, --all-heads and --check: give one of them"),
        ([worded, "--source", "a1", "--all-heads"], "--source goes with --head, or alone"),
        ([worded, "--head", "0.0", "-k", 98], "k is 98, expected an integer from 1 to 97"),
        ([worded, "--head", "0.0", "--offset", 2], "offset is 2, expected 0"),
        ([worded, "--check"], "the model has 2 layers"),
        ([tmp_path / "none.safetensors", "--all-heads"], "has no heads"),
        ([tmp_path / "none.safetensors", "--source", "a"], "'a' is no token id, and this model has no tokenizer.json"),
        ([tmp_path / "none.safetensors", "--source", "97"], "--source '97' is token 97, expected 0 to 96"),
        (["no-such-model"], "no-such-model"),
    ):
        result = run("tables", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, arguments
        assert message in result.output.replace("\n", ""), arguments
        assert "Traceback" not in result.output
    assert run("tables", worded, "-k", 0).exit_code == 2


@pytest.mark.parametrize("layers", [1, 3])
def test_heads_writes_what_the_library_says(tmp_path, layers):
    weights, file = random_weights(layers, dtype=torch.float32), tmp_path / "m.safetensors"
    weights.save(file)
    options = ["--copy-length", 4, "--copies", 3, "--batch", 2, "--batches", 2, "--seed", 5, "--dtype", "float64"]
    result = run("heads", file, *options, "--out", tmp_path / "out", "--top", 2)
    assert result.exit_code == 0, result.output
    weights = weights.to(torch.float64)
    scores = fc.head_scores(weights, length=4, copies=3, batch=2, batches=2, seed=5)
    table = pq.read_table(tmp_path / "out" / "heads.parquet")
    assert table.schema.metadata[b"copies"] == b"3"
    columns = table.to_pydict()
    assert list(zip(columns["layer"], columns["head"], strict=True)) == [head for (head,) in scores.labels]
    for name in ("induction", "previous_token", "prefix_matching", "duplicate_token", "copying"):
        np.testing.assert_array_equal(columns[name], getattr(scores, name).flatten().numpy())
    shown = [line for line in result.output.splitlines() if "│" in line]
    for line, (((layer, head),), score) in zip(shown[:2], scores.top(2), strict=True):
        assert line.split("│")[1].strip() == f"{layer}.{head}"
        assert line.split("│")[2].strip() == significant(score)
    assert (tmp_path / "out" / "induction.parquet").exists() == (layers > 1)
    if layers > 1:
        found = fc.induction_heads(weights, scores)
        columns = pq.read_table(tmp_path / "out" / "induction.parquet").to_pydict()
        places = [columns[f"{end}_{part}"] for end in ("source", "dest") for part in ("layer", "head")]
        assert [((a, b), (c, d)) for a, b, c, d in zip(*places, strict=True)] == found.labels
        for name in ("induction", "previous_token", "k_composition", "matching", "copying"):
            np.testing.assert_array_equal(columns[name], getattr(found, name).numpy())


def test_heads_of_bad_input(model, tmp_path):
    random_weights(0, dtype=torch.float32).save(tmp_path / "none.safetensors")
    for arguments, message in (
        ([model], "length is 25, 4 copies and the token in front are 101, but W_pos has only 32"),
        ([model, "--copy-length", 1], "--copy-length is 1, expected at least 2"),
        ([model, "--copy-length", 4, "--batches", 0], "batches is 0, expected at least 1"),
        ([tmp_path / "none.safetensors", "--copy-length", 4], "has no heads"),
        (["no-such-model"], "no-such-model"),
    ):
        result = run("heads", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, arguments
        assert message in result.output.replace("\n", ""), arguments
        assert "Traceback" not in result.output


def test_check_of_the_bundled_models(monkeypatch):
    """The check itself, over the held-out text: a tenth of the work."""
    from pyfastcircuits.adapters import texts
    from pyfastcircuits.command import check

    monkeypatch.setattr(check, "corpus_tokens", lambda shown, held_out: texts.corpus_tokens(shown, True))
    monkeypatch.setattr(check, "SEEN", 60)
    monkeypatch.setattr(check, "TRIPLES", 20)
    result = run("tables", "bigram-0l", "--check")
    assert result.exit_code == 0, result.output
    for words in ("logits differ from the model's by", "mean KL(counts || table)", "Likeliest successors"):
        assert words in result.output
    result = run("tables", "skip-trigram-1l", "--check")
    assert result.exit_code == 0, result.output
    shown = {
        line.split("│")[1].strip(): line.split("│")[-2].strip() for line in result.output.splitlines() if "│" in line
    }
    assert (shown["indentation falls"], shown["open ... ,"]) == ("yes", "no")
    assert "0.7" in shown
