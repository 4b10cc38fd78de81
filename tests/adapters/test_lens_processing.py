"""process_weights against TransformerLens' own processing: tensors, composition scores, eigenvalues, logits."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import build, tokens  # noqa: E402
from test_lens import boot, bridge, logits_of  # noqa: E402
from test_lens_configurations import ROTARY, WITH_MLP, built  # noqa: E402

import pyfastcircuits as fc  # noqa: E402
from pyfastcircuits.model.layers import stacked  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGURATIONS = {
    "layernorm": {},
    "layernorm, grouped, MLP": {"n_key_value_heads": 2, **WITH_MLP},
    "rmsnorm, rotary": {"normalization_type": "RMS", **ROTARY},
    "norms of queries and keys": {"use_qk_norm": True},
    "no norm": {"normalization_type": None},
    "capped": {"output_logits_soft_cap": 3.0},
}
FP32 = {"rtol": 1e-5, "atol": 2e-6}  # TransformerLens processes in fp32


def assert_processed_alike(ours, theirs):
    for name, tensor in ours.tensors():
        other = getattr(theirs, name)
        if name == "rotary_frequencies":
            continue
        whole = torch.zeros_like(stacked(tensor)) if other is None else stacked(other)
        torch.testing.assert_close(stacked(tensor).double(), whole.double(), **FP32)
    assert theirs.b_V is None or not theirs.b_V.any()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_hooked_transformer(name):
    if "HookedTransformer" not in vars(lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    raw, processed = built(CONFIGURATIONS[name]), built(CONFIGURATIONS[name])
    processed.process_weights_(center_unembed=name != "capped")
    ours = fc.process_weights(fc.CircuitWeights.from_model(raw))
    assert_processed_alike(ours, fc.CircuitWeights.from_model(processed))
    for kind in "QKV":
        torch.testing.assert_close(fc.composition_scores(ours, kind), processed.all_composition_scores(kind), **FP32)
    W_E, W_U = processed.W_E, processed.W_U
    for circuit, full in (("OV", W_E @ processed.OV @ W_U), ("QK", W_E @ processed.QK @ W_E.T)):
        mine, theirs = fc.circuit_eigenvalues(ours, circuit), full.eigenvalues
        torch.testing.assert_close(mine.abs().sort(-1).values, theirs.abs().sort(-1).values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.sum(-1), theirs.sum(-1), rtol=1e-3, atol=1e-3)
    if ours.attention_only:
        torch.testing.assert_close(
            fc.trace(ours, tokens()).logits(), logits_of(processed, tokens()), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama 3, grouped"])
def test_a_hugging_face_model_is_processed_as_its_bridge(name, tmp_path):
    bridge()
    model = boot(build(name), tmp_path)
    model.enable_compatibility_mode(disable_warnings=True)
    ours = fc.process_weights(fc.CircuitWeights.from_model(build(name)))
    theirs = fc.CircuitWeights.from_model(model)
    for part in ("W_Q", "W_K", "W_V", "W_O", "W_E", "W_U", "b_Q", "b_K", "b_O", "b_U"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        if mine is not None and other is not None:
            torch.testing.assert_close(stacked(mine).double(), stacked(other).double(), **FP32)
    for kind in "QKV":
        torch.testing.assert_close(fc.composition_scores(ours, kind), fc.composition_scores(theirs, kind), **FP32)
