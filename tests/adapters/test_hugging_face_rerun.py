"""Parts of Hugging Face models run again by their own modules."""

from dataclasses import fields, is_dataclass
from inspect import signature

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import CONFIGURATIONS, FAMILIES, WITHOUT_QK, build, nothing_in_fp32, tokens  # noqa: E402
from support.modules import names_of  # noqa: E402
from support.rerun_checks import (  # noqa: E402
    check_changes,
    check_clean,
    check_gradients,
    check_halves,
    check_kept_as_queries_and_keys,
    check_parts,
    check_scale,
)

import pyfastcircuits as fc  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPED = ("gemma2", "gpt_oss", "bloom", "falcon, alibi")  # caps, sinks and ALiBi shape more than scores
LEFT = torch.tensor([[0] * 4 + [1] * 7, [0] + [1] * 10, [1] * 11])


def attentions(model):
    names = names_of(model)
    return [layer.get_submodule(names["attention"]) for layer in model.get_submodule(names["layers"])]


def placed(model, mask):
    """The positions as each sequence counts them alone, where the model takes any."""
    known = mask is not None and "position_ids" in signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if known else {}


def hooked(model, mask=None):
    """The model's logits with something added to what a layer's attention gives."""

    def run(layer, change):
        hook = attentions(model)[layer].register_forward_hook(lambda m, a, out: (out[0] + change, *out[1:]))
        with torch.no_grad():
            out = model(tokens(len(change)), attention_mask=mask, **placed(model, mask)).logits
        hook.remove()
        return out

    return run


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_parts_of_the_model_again(name):
    model = build(name)
    with nothing_in_fp32(model):
        run = fc.trace(model, tokens())
        check_clean(run)
        check_changes(run, hooked(model))
        check_halves(run)
        if not name.startswith(SHAPED):
            check_scale(run)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_QK])
def test_kept_as_queries_and_keys(name):
    model = build(name)
    with nothing_in_fp32(model):
        for batch, mask in ((2, None), (3, LEFT)):
            run, other = (fc.trace(model, tokens(batch), mask, store=store) for store in ("patterns", "qk"))
            check_kept_as_queries_and_keys(run, other)
        check_clean(other)
        check_parts(other)
        check_gradients(other)


@pytest.mark.parametrize("name", [*FAMILIES, "falcon, one kv head, parallel"])
def test_padding_parts_and_gradients(name):
    model = build(name)
    with nothing_in_fp32(model):
        run = fc.trace(model, tokens(3), LEFT)
        check_clean(run)
        check_changes(run, hooked(model, LEFT))
        check_halves(run)
        check_parts(run)
        check_gradients(run)
        check_clean(run[1:2])
        check_halves(run[1:2])


def test_norms_of_queries_and_keys_bend_what_frozen_ones_do_not():
    run = fc.trace(build("qwen3"), tokens())
    one, other = torch.randn(2, 1, *run.embedded.shape, dtype=torch.float64)
    zero, a, b, both = (run.forward.qkv(1, x) for x in (0 * one, one, other, one + other))
    assert all(float((a[i] + b[i] - both[i] - zero[i]).abs().max()) > 0.1 for i in range(2))


def test_the_model_is_left_as_it_was():
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = fc.trace(build("gpt2"), tokens())
    model.set_attn_implementation("sdpa")
    model.train()
    run = fc.trace(model, tokens())
    stream = run.embedded[None].requires_grad_()
    after = run.forward.block(1, stream, stream)
    torch.testing.assert_close(after, expected.forward.block(1, stream, stream))
    run.forward.apply(1, *run.forward.qkv(1, stream, frozen=True)).sum().backward()
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(tensor.requires_grad and tensor.grad is None for tensor in model.parameters())
    assert not any(name.startswith("pyfastcircuits") for name in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype):
    """In the computing dtype at both ends, in the model's own between them."""
    model = build("gemma2", dtype)
    run, exact = fc.trace(model, tokens()), fc.trace(build("gemma2", torch.float32), tokens())
    stream, change = torch.randn(2, 3, *run.embedded.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = run.forward.block(1, stream, change), exact.forward.block(1, stream, change)
    assert ours.dtype == torch.float32
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 8 * torch.finfo(dtype).eps
    made = run.forward.qkv(1, run.normed(stream, 1))
    assert all(x.dtype == torch.float32 for x in (*made, run.forward.apply(1, *made)))


def test_scores_that_are_computed_in_fp32():
    model = build("gpt2", torch.bfloat16, reorder_and_upcast_attn=True)
    run = fc.trace(model, tokens())
    with torch.no_grad():
        patterns = model(tokens(), output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        assert torch.equal(run.pattern(layer), pattern.float())
    made = run.forward.qkv(0, run.normed(run.embedded[None], 0))
    ours, theirs = run.forward.apply(0, *made)[0], run.pattern(0) @ made[2][0]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 4 * torch.finfo(torch.bfloat16).eps


def kept(value):
    """Every tensor that is reachable, but for those of modules."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in kept(item)]


def test_long_contexts_keep_and_make_no_square_of_their_length():
    length, made = 2048, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            out = called(*args, **(kwargs or {}))
            made.extend(tensor.numel() for tensor in kept(out))
            return out

    model = build("gpt2", torch.float32, n_positions=length, n_layer=1)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, 0] = 0
    with Sizes():
        run = fc.trace(model, tokens(1, length), mask, store="qk")
        run.forward.block(0, run.embedded[None])
    assert len(kept(run)) > 20
    assert max(tensor.untyped_storage().nbytes() for tensor in kept(run)) < length * length
    assert max(made) < length * length
