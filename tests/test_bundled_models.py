"""The bundled models do what they are shipped for."""

import importlib.util
from pathlib import Path

import pytest
import torch

import pyfastcircuits as fc
from pyfastcircuits.adapters.files import BUNDLED, model_folder
from pyfastcircuits.adapters.texts import TokenText, corpus_tokens, held_out_text, sequences_of, stdlib_files

SPEC = importlib.util.spec_from_file_location("train", Path(__file__).parents[1] / "examples" / "train.py")
train = importlib.util.module_from_spec(SPEC)


@pytest.fixture(scope="module", autouse=True)
def _script():
    import sys

    sys.modules["train"] = train
    SPEC.loader.exec_module(train)
    yield
    del sys.modules["train"]


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [("bigram-0l", 0, 1), ("skip-trigram-1l", 1, 8), ("induction-2l", 2, 8), ("deep-4l", 4, 8)],
)
def test_shape_and_files(name, layers, heads):
    w = fc.load_weights(name)
    assert (w.n_layers, w.n_heads) == (layers, heads)
    assert w.d_vocab >= 4096
    assert w.positional == "shortformer"
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in model_folder(name).iterdir()}


def test_small_enough_to_ship():
    sizes = [
        sum(f.stat().st_size for f in model_folder(name).iterdir() if f.name != "checkpoint.pt") for name in BUNDLED
    ]
    assert max(sizes) <= 12e6
    assert sum(sizes) <= 25e6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_induction(seed):
    """The issue's own words, written out: S of 50 uniform random tokens."""
    w = fc.load_weights("induction-2l")
    unit = torch.randint(0, w.d_vocab, (16, 50), generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat((torch.zeros(16, 1, dtype=torch.long), unit, unit), 1)
    run = fc.trace(w, tokens)
    assert run.token_losses[:, 50:].mean() <= run.token_losses[:, :50].mean() / 2
    induction = torch.stack([run.pattern(1)[:, :, t, t - 49] for t in range(51, 101)]).mean((0, 1))
    previous = torch.stack([run.pattern(0)[:, :, t, t - 1] for t in range(1, 101)]).mean((0, 1))
    assert induction.max() >= 0.4
    assert previous.max() >= 0.4
    scores = train.induction_scores(w)
    assert scores["induction"][1].argmax() == induction.argmax()
    assert scores["previous"][0].argmax() == previous.argmax()


def test_the_deep_model_has_induction_heads_and_paths_of_every_order():
    w = fc.load_weights("deep-4l")
    scores = train.induction_scores(w, sequences=16)
    assert scores["second"] <= scores["first"] / 2
    assert scores["induction"].max() >= 0.4
    assert scores["previous"][0].sum() >= 1.5  # its eight heads share what one could do
    tokens = sequences_of(TokenText("deep-4l"), held_out_text(), 128, 4)
    losses = fc.order_losses(fc.trace(w, tokens))
    assert losses[-1] < losses[0] - 1
    assert (losses.diff().abs() > 0.01).all()


def test_each_layer_helps_on_text_it_has_not_seen():
    losses = []
    for name in ("bigram-0l", "skip-trigram-1l", "induction-2l"):
        w = fc.load_weights(name)
        tokens = sequences_of(TokenText(name), held_out_text(), 128, 64)
        assert tokens.shape == (64, 128)
        losses.append(float(fc.trace(w, tokens).loss))
    assert losses[0] > losses[1] > losses[2]


def test_held_out_files_are_held_out():
    kept, trained = set(stdlib_files(held_out=True)), set(stdlib_files(held_out=False))
    assert kept
    assert not kept & trained
    assert 0.02 < len(kept) / (len(kept) + len(trained)) < 0.1


def test_the_text_of_the_tables_is_that_of_the_training():
    text = TokenText("bigram-0l")
    ours = corpus_tokens(text, held_out=True)
    assert torch.equal(ours, train.encode_files(text.tokenizer, held_out=True))


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    recipe = train.Recipe(layers=1, heads=2, width=16, steps=6, rows=2, context=128, vocabulary=400)
    monkeypatch.setitem(train.RECIPES, "tiny", recipe)
    files = stdlib_files(held_out=True)[:2]
    monkeypatch.setattr(train, "stdlib_files", lambda held_out: files)
    torch.set_num_threads(1)
    train.train("tiny", tmp_path / "whole", 100)

    real = train.learning_rate

    def killed(recipe, step):
        if step == 4:
            raise KeyboardInterrupt
        return real(recipe, step)

    monkeypatch.setattr(train, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train("tiny", tmp_path / "killed", 2)
    monkeypatch.setattr(train, "learning_rate", real)
    train.train("tiny", tmp_path / "killed", 2)
    whole, resumed = (dict(fc.load_weights(tmp_path / name).tensors()) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "# tiny" in (tmp_path / "whole" / "README.md").read_text()
