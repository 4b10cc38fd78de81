"""`fc.report` of models of other libraries: a Hugging Face folder with MLPs and biases, and the model itself."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from support.command import run
from support.configurations import build, tokens

import pyfastcircuits as fc


def data_of(file):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"))[1]
    )


def test_a_folder_of_a_hugging_face_model(tmp_path):
    folder = tmp_path / "model"
    build("gpt2", torch.float32).save_pretrained(folder)
    ids = tokens(2)
    np.save(tmp_path / "tokens.npy", ids.numpy())
    given = ("--tokens", tmp_path / "tokens.npy", "--length", 8, "--out", tmp_path / "r.html")
    result = run("report", folder, *given)
    assert result.exit_code == 0, result.output
    data = data_of(tmp_path / "r.html")
    assert {"embed", "0.0", "mlp 0", "mlp 2"} <= set(data["attribution"]["labels"])
    assert all(data[name] for name in ("pairs", "composition", "trigrams", "attention", "scores"))
    assert data["heads"] == [[layer, head] for layer in range(3) for head in range(4)]


def test_grouped_heads_and_the_model_itself(tmp_path):
    from pyfastcircuits.adapters.files import load_model

    folder = tmp_path / "model"
    build("llama 3, grouped", torch.float32).save_pretrained(folder)
    model = load_model(folder, torch.float32)
    data = data_of(fc.report(model, tokens(2)[:, :8], out=tmp_path / "r.html"))
    losses = fc.order_losses(fc.trace(model, tokens(2)[:, :8]))
    assert np.allclose(data["orders"]["losses"], losses.tolist(), rtol=1e-5)
    assert data["composition"]["K"]["z"]["shape"] == [3 * 16]
