"""Parts of TransformerLens models run again by their own modules."""

import pytest
import torch

lens = pytest.importorskip("transformer_lens", reason="pip install 'pyfastcircuits[transformer-lens]'")

from support.configurations import tokens  # noqa: E402
from support.rerun_checks import (  # noqa: E402
    check_changes,
    check_clean,
    check_gradients,
    check_halves,
    check_kept_as_queries_and_keys,
    check_parts,
    check_scale,
)
from test_hugging_face import nothing_in_fp32  # noqa: E402
from test_hugging_face_rerun import kept  # noqa: E402
from test_lens import BRIDGED, HOOKED, SIZES, bridged, hooked  # noqa: E402

import pyfastcircuits as fc  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
MASK = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])


def with_a_hook(model, mask=None):
    """The model's logits with something added to what a layer's attention gives."""
    options = {} if mask is None else {"attention_mask": mask}

    def run(layer, change):
        def hook(module, args, out):
            return (out[0] + change, *out[1:]) if isinstance(out, tuple) else out + change

        handle = model.blocks[layer].attn.register_forward_hook(hook)
        with torch.no_grad():
            out = model(tokens(len(change)), **options)
        handle.remove()
        return out

    return run


def check(model, mask=None):
    run = fc.trace(model, tokens(), mask)
    check_clean(run)
    check_changes(run, with_a_hook(model, mask))
    check_halves(run)
    return run


@pytest.mark.parametrize("name", HOOKED)
def test_parts_of_a_hooked_transformer_again(name):
    model = hooked(name)
    run = check(model)
    if name not in ("alibi", "gemma 2's"):
        check_scale(run)
    run = check(model, MASK)
    check_parts(run)
    check_gradients(run)
    if name == "alibi":
        with pytest.raises(ValueError, match="store is 'qk', but positional_embedding_type is 'alibi'"):
            fc.trace(model, tokens(), store="qk")
    else:
        check_kept_as_queries_and_keys(run, fc.trace(model, tokens(), MASK, store="qk"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", BRIDGED)
def test_parts_of_a_bridge_again(name, processed, tmp_path):
    model = bridged(name, tmp_path)
    if processed:
        model.enable_compatibility_mode(disable_warnings=True)
    with nothing_in_fp32(model):
        run = check(model)
        if not name.startswith("gemma2"):
            check_scale(run)
        run = check(model, MASK)
        check_parts(run)
        check_gradients(run)
        check_kept_as_queries_and_keys(run, fc.trace(model, tokens(), MASK, store="qk"))


def test_long_contexts_keep_no_square_of_their_length():
    if "HookedTransformer" not in vars(lens):
        pytest.skip("a TransformerBridge's mask is kept")
    length = 2048
    sizes = {**SIZES, "n_layers": 1, "n_ctx": length, "d_mlp": 40, "dtype": torch.float32}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, normalization_type="LN", device="cpu"))
    run = fc.trace(model, tokens(1, length), store="qk")
    assert max(tensor.untyped_storage().nbytes() for tensor in kept(run)) < length * length
