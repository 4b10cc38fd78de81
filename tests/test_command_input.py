"""What commands read, and what they refuse before any work."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.command import COMMANDS, command, refused, run
from support.random_models import random_weights

import pyfastcircuits as fc
from pyfastcircuits.command import options


class TestTokens:
    @pytest.mark.parametrize("option", ["--source", "--against"])
    def test_a_token_that_the_tokenizer_does_not_know(self, worded, tmp_path, tokens, option):
        more = ["sweep", worded, "--tokens", tokens, "--metric", "logit_difference", "--out", tmp_path / "out"]
        more = ["tables", worded] if option == "--source" else more
        for unknown in ("unheard", "a97", "a1 unheard"):
            assert f"{option} {unknown!r} is unknown to the model's tokenizer" in refused(*more, option, unknown)
        assert f"{option} 'a1 a2' is 2 tokens" in refused(*more, option, "a1 a2")
        (worded / "tokenizer.json").unlink()
        for number in ("97", "9" * 30, "-1", "²"):
            assert f"{option} '{number}' is " in refused(*more, option, number)
        assert run(*more, option, "96").exit_code == 0

    def test_unknown_tokens_of_every_kind_of_tokenizer(self, model, tmp_path):
        from tokenizers import Tokenizer, models

        for kind in (
            models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
            models.Unigram([("a", -1.0)]),
            models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
            models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"),
            models.BPE({"a": 0}, []),
        ):
            Tokenizer(kind).save(str(model / "tokenizer.json"))
            assert run("tables", model, "--source", "a").exit_code == 0
            assert "error: --source " in refused("tables", model, "--source", "z")
            (tmp_path / "text").write_text("zzzz")
            refused("sweep", model, "--text", tmp_path / "text", "--out", tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (np.random.default_rng(0).bytes(4000), "expected a text in UTF-8, which has no byte 0x"),
            ("a1 a2 é".encode("latin-1"), "expected a text in UTF-8, which has no byte 0xe9 at 6"),
            ("a1 a2 a3".encode("utf-16"), "expected a text in UTF-8"),
            (b"a1 a2\0 a3", "it is a binary file"),
            (bytes(range(1, 127)), "it is a binary file"),
            (b"", "--text is empty: it gives no tokens"),
            (b"once upon a time a1 was there", "are unknown to the model's tokenizer, expected a text that it is for"),
        ],
    )
    def test_a_text_that_is_none(self, worded, tmp_path, content, says):
        file = tmp_path / "text"
        file.write_bytes(content)
        assert says in refused("sweep", worded, "--text", file, "--out", tmp_path / "out")

    def test_some_unknown_tokens_are_told(self, worded, tmp_path):
        file = tmp_path / "text"
        file.write_text("a1 a2 a3 unheard")
        result = run("sweep", worded, "--text", file, "--out", tmp_path / "out")
        assert result.exit_code == 0
        assert "warning: --text: 25% of its tokens are unknown to the model's tokenizer" in result.output

    def test_a_text_that_cannot_be_read(self, worded, tmp_path):
        for option in ("--text", "--tokens"):
            for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 5000)):
                output = refused("sweep", worded, option, path, "--out", tmp_path / "out")
                assert f"error: {option} is '{path}': it cannot be read (" in output
                assert "Errno" not in output

    def test_sequences_and_length_are_of_token_files_too(self, model, tmp_path):
        rows = torch.arange(60).view(6, 10) % 97
        np.save(tmp_path / "t.npy", rows.numpy())
        (tmp_path / "t.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows.tolist()))
        expected = fc.pair_ablation(fc.trace(fc.load_weights(model), rows[[0, 2, 5], :7])).loss
        for name in ("t.npy", "t.txt"):
            more = ["--tokens", tmp_path / name, "--sequences", 3, "--length", 7, "--out", tmp_path / name[2:]]
            assert "3 sequences of 7 tokens" in run("sweep", model, *more).output
            found = pq.read_table(tmp_path / name[2:] / "sweep.parquet")["nll"].to_numpy()
            np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-6)

    @pytest.mark.parametrize(
        ("array", "says"),
        [
            (np.array([[1, 2**63 + 5]], np.uint64), "id [0, 1] is 9223372036854775813, expected 0 to 96"),
            (np.array([[1, -1]]), "id [0, 1] is -1, expected 0 to 96"),
            (np.array([[1], [2]]), "it has shape [2, 1], expected at least one sequence of at least 2 ids"),
            (np.array([1, 97], np.uint8), "id [0, 1] is 97, expected 0 to 96"),
            (np.zeros((4, 0), int), "it has shape [4, 0], expected at least one sequence of at least 2 ids"),
            (np.zeros((0, 4), int), "it has shape [0, 4], expected at least one sequence"),
            (np.zeros(0, int), "expected at least one sequence"),
            (np.array(5), "it holds int64 of shape [], expected integers [T] or [B, T]"),
            (np.zeros((2, 2, 2), int), "it holds int64 of shape [2, 2, 2], expected integers"),
            (np.ones(4), "it holds float64 of shape [4], expected integers"),
            (np.ones(4, bool), "it holds bool of shape [4], expected integers"),
            (np.array(["a", "b"]), "it holds <U1 of shape [2], expected integers"),
            (np.zeros(3, [("a", int)]), "expected integers"),
            (np.array([{}], object), "it is not a readable .npy array"),
        ],
    )
    def test_arrays_that_are_no_ids(self, model, tmp_path, array, says):
        np.save(tmp_path / "t.npy", array, allow_pickle=True)
        output = refused("sweep", model, "--tokens", tmp_path / "t.npy", "--out", tmp_path / "out")
        assert f"error: --tokens is '{tmp_path / 't.npy'}': " in output
        assert says in output

    def test_files_that_are_no_arrays(self, model, tmp_path):
        whole = io.BytesIO()
        np.save(whole, np.arange(50))
        large = whole.getvalue().replace(b"(50,), ", b"(1000000000000,), ")
        zipped = io.BytesIO()
        np.savez(zipped, np.arange(50))
        for content in (b"", whole.getvalue()[:-9], whole.getvalue()[:40], large, zipped.getvalue(), b"1 2 3"):
            (tmp_path / "t.npy").write_bytes(content)
            output = refused("sweep", model, "--tokens", tmp_path / "t.npy", "--out", tmp_path / "out")
            assert "t.npy': it is not a readable .npy array (" in output

    def test_more_tokens_than_the_model_has_positions(self, model, tmp_path):
        np.save(tmp_path / "t.npy", np.zeros(40, int))
        output = refused("sweep", model, "--tokens", tmp_path / "t.npy", "--out", tmp_path / "out")
        assert "error: --tokens has " in output
        assert run("sweep", model, "--tokens", tmp_path / "t.npy", "--length", 32, "--out", tmp_path).exit_code == 0

    @pytest.mark.parametrize("word", ["2.0", "x", "1_0", "٣", "9" * 40, "0x1", "\x1b[31m"])
    def test_lines_that_are_no_ids(self, model, tmp_path, word):
        (tmp_path / "t.txt").write_text(f"1 2\n3 {word}\n")
        output = refused("sweep", model, "--tokens", tmp_path / "t.txt", "--out", tmp_path / "out")
        assert f"t.txt': line 2 holds {word!r}, expected ids" in output


class TestBeforeTheWork:
    @pytest.mark.parametrize("name", ["sweep", "composition"])
    def test_bf16_where_there_is_none(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", fc.build_info()["cpu_tiers"][0])
        monkeypatch.setattr(options, "load_model", pytest.fail)
        monkeypatch.setattr(fc, "load_weights", pytest.fail)
        output = refused(name, "--precision", "bf16", "--out", tmp_path)
        assert "error: --precision='bf16' needs a CPU with bfloat16 dot products; the tier in force is" in output
        assert "--precision is 'tf32', expected 'ieee' or 'bf16' on the CPU" in refused(name, "--precision", "tf32")

    @pytest.mark.parametrize("name", ["sweep", "composition", "tables", "heads"])
    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_backends_that_are_not_there(self, name, backend, tmp_path, monkeypatch):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(options, "load_model", pytest.fail)
        monkeypatch.setattr(fc, "load_weights", pytest.fail)
        output = refused(name, "--backend", backend, "--out", tmp_path)
        assert f"error: --backend='{backend}'" in output
        assert "needs a CUDA device" in output or "there is no CUDA C++ kernel of" in output

    def test_the_limit_is_left_to_the_bench(self, model, tokens, tmp_path):
        result = run(*command("sweep", model, tokens, tmp_path))
        assert "pairs/s of 33 tokens each\n" in result.output
        assert "machine's limit" not in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_predicts_other_tokens_than_it_reads(name, tokens, tmp_path):
    random_weights(2, predicted=3, dtype=torch.float32).save(tmp_path / "model.safetensors")
    output = refused(*command(name, tmp_path, tokens, tmp_path))
    assert "d_vocab_out is 3, but d_vocab is 97: the command is for models that predict the next token" in output
