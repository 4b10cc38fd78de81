"""Weights: what is accepted, what is refused, and files."""

import json
import pickle

import pytest
import torch
from support.random_models import KINDS, random_tokens, random_weights

import pyfastcircuits as fc


def parts(**changes):
    w = random_weights()
    return dict(w.tensors()) | {"positional": w.positional} | changes


def test_a_model_of_ones_own():
    w = fc.CircuitWeights(**parts())
    assert (w.n_layers, w.n_heads, w.d_model, w.d_head, w.d_vocab, w.n_ctx) == (2, 4, 20, 6, 97, 32)
    assert w.W_E is not None
    assert w.to(torch.float32).compute_dtype == torch.float32


BAD = {
    "W_O": (
        parts(W_O=torch.zeros(2, 4, 5, 20).double()),
        ValueError,
        r"W_O has shape \[2, 4, 5, 20\], expected \[2, 4, 6,",
    ),
    "W_V": (
        parts(W_V=torch.zeros(2, 4, 20, 6).double()),
        ValueError,
        r"W_V has shape \[2, 4, 20, 6\], expected \[2, 2, 20",
    ),
    "W_U": (parts(W_U=torch.zeros(97, 20).double()), ValueError, r"W_U has shape \[97, 20\], expected \[20, 20\]"),
    "b_U of W_U": (parts(W_U=torch.zeros(20, 5).double()), ValueError, r"b_U has shape \[97\], expected \[5\]"),
    "W_Q": (
        parts(W_Q=torch.zeros(4, 20, 6).double()),
        ValueError,
        r"W_Q has shape \[4, 20, 6\], expected 4 dimensions",
    ),
    "kv heads": (parts(W_K=torch.zeros(2, 3, 20, 6).double()), ValueError, "W_Q's heads a multiple of W_K's"),
    "empty": (parts(W_E=torch.zeros(0, 20).double()), ValueError, r"W_E is \[0, 20\].*must not be zero"),
    "b_U": (parts(b_U=torch.zeros(5).double()), ValueError, r"b_U has shape \[5\], expected \[97\]"),
    "W_pos missing": (parts(W_pos=None), ValueError, "W_pos is missing, but positional is 'shortformer'"),
    "W_pos given": (parts(positional="none"), ValueError, "W_pos is given, but positional is 'none'"),
    "positional": (parts(positional="alibi"), ValueError, "positional is 'alibi', expected one of none, standard"),
    "norm": (parts(norm="batch"), ValueError, "norm is 'batch', expected one of layernorm, rmsnorm"),
    "scale": (parts(attention_scale=0.0), ValueError, "attention_scale is 0.0"),
    "eps": (parts(eps=-1.0), ValueError, "eps is -1.0"),
    "rotary_dim": (parts(rotary_dim=5), ValueError, "rotary_dim is 5, expected an even number of at most d_head = 6"),
    "dtype": (
        parts(W_Q=random_weights().W_Q.float()),
        TypeError,
        "W_Q has dtype torch.float32, but W_E has torch.float64",
    ),
    "half": (parts(W_E=random_weights().W_E.half()), TypeError, "W_E has dtype torch.float16, expected one of"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(what):
    arguments, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.CircuitWeights(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["W_E", "W_K", "b_O", "W_pos"])
def test_weights_that_are_not_finite_are_named_with_their_place(name, value):
    tensor = dict(random_weights().tensors())[name].clone()
    tensor[(-1,) * tensor.dim()] = value
    place = ", ".join(str(n - 1) for n in tensor.shape)
    with pytest.raises(ValueError, match=rf"{name}\[{place}\] is {value}: weights must be finite"):
        fc.CircuitWeights(**parts(**{name: tensor}))


@pytest.mark.parametrize(("norm", "positional"), KINDS)
@pytest.mark.parametrize("as_folder", [True, False])
def test_saved_and_loaded(tmp_path, norm, positional, as_folder):
    w = random_weights(norm=norm, positional=positional)
    w.save(tmp_path / "model.safetensors")
    loaded = fc.load_weights(tmp_path if as_folder else tmp_path / "model.safetensors")
    assert (loaded.norm, loaded.positional, loaded.rotary_dim) == (norm, positional, w.rotary_dim)
    assert torch.equal(fc.trace(loaded, random_tokens()).logits(), fc.trace(w, random_tokens()).logits())


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(
            FileNotFoundError,
            match=r"name_or_path is '.*nothing': neither a file or folder nor a bundled model \(bigram-0l",
        ):
            fc.load_weights(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
            fc.load_weights(tmp_path)

    def test_a_pickle_is_never_opened(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (pytest.fail, ("the pickle was opened",))

        for name in ("model.pt", "model.bin", "model.safetensors"):
            (tmp_path / name).write_bytes(pickle.dumps(Trap()))
            with pytest.raises(ValueError, match=r"is a pickle by its name|is not a readable safetensors file"):
                fc.load_weights(tmp_path / name)

    def test_corrupt(self, tmp_path):
        file = tmp_path / "model.safetensors"
        random_weights().save(file)
        whole = file.read_bytes()
        for damaged in (b"", whole[:100], whole[:-40], b"\xff" * 64 + whole):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
                fc.load_weights(file)

    def test_other_tensors(self, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "model.safetensors"
        tensors = {name: t.contiguous() for name, t in random_weights().tensors()}
        save_file(tensors, file)
        with pytest.raises(ValueError, match="holds no 'pyfastcircuits' metadata"):
            fc.load_weights(file)
        metadata = {"pyfastcircuits": json.dumps({"positional": "shortformer"})}
        save_file({k: t for k, t in tensors.items() if k != "W_O"}, file, metadata=metadata)
        with pytest.raises(ValueError, match=r"does not hold a CircuitWeights: .*W_O"):
            fc.load_weights(file)
        save_file(tensors | {"W_extra": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(ValueError, match=r"does not hold a CircuitWeights: .*W_extra"):
            fc.load_weights(file)

    def test_names_that_are_no_paths(self):
        for name in ("x" * 5000, "a/" * 5000):
            with pytest.raises(
                OSError, match=r"name_or_path is '.*\.\.\.: (it cannot be read \(File name too long\)|neither)"
            ):
                fc.load_weights(name)
        with pytest.raises(OSError, match=r"name_or_path is '.*a.*0b': neither"):
            fc.load_weights("a\0b")

    def test_nested_metadata(self, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "model.safetensors"
        save_file({"W_E": torch.zeros(1)}, file, metadata={"pyfastcircuits": "[" * 100_000})
        with pytest.raises(
            ValueError, match=r"name_or_path is '.*does not hold a CircuitWeights: its metadata is nested"
        ):
            fc.load_weights(file)

    @pytest.mark.parametrize("name", ["", "no/such/folder/m.safetensors", "x" * 5000, "a\0b"])
    def test_what_cannot_be_written(self, tmp_path, name):
        with pytest.raises(OSError, match=r"path is '.*, which cannot be written: "):
            random_weights().save(tmp_path / name)


def test_a_file_of_half_the_size(tmp_path):
    weights = random_weights(2, dtype=torch.float32)
    for name in ("whole", "half"):
        weights.save(tmp_path / f"{name}.safetensors", half=name == "half")
    whole, half = (fc.load_weights(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    assert half.W_E.dtype == torch.float32
    for (name, kept), (_, rounded) in zip(whole.tensors(), half.tensors(), strict=True):
        assert torch.equal(torch.as_tensor(kept).half().float(), torch.as_tensor(rounded)), name
