"""frozen_attention on the CPU: every tier against fp64, no worse than torch at the same dtype."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate
from support.attention_cases import Attention, assert_as_accurate_rows, eager, exact, forward, make

import pyfastcircuits as fc
from pyfastcircuits import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def bare(call: Attention, precision="ieee"):
    return torch.ops.pyfastcircuits.frozen_attention(*call, precision)


def check(call: Attention) -> None:
    out, lse = bare(call)
    assert out.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    assert_as_accurate_rows(call, (out, lse), eager(call), exact(call))
    if call.lse is None:
        assert lse.dtype == torch.float64
        again, none = bare(call._replace(lse=lse))
        assert torch.equal(again.nan_to_num(7), out.nan_to_num(7))
        assert none.numel() == 0


@pytest.mark.matrix(dtype=DTYPES, rank=[0, 1, 37, 64, 129], whole=[False, True], transposed=[False, True])
def test_against_fp64(tier, dtype, rank, whole, transposed):
    check(make(r=rank, dtype=dtype, whole=whole, transposed=transposed))


@pytest.mark.parametrize("window", [1, 2, 47, 100, 300, 2**40])
@pytest.mark.parametrize("transposed", [False, True])
def test_windows(tier, window, transposed):
    check(make(T=230, r=8, window=window, whole=True, transposed=transposed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.01, 1.0, 50.0, 1e6])
def test_softcap(tier, dtype, softcap):
    check(make(T=70, softcap=softcap, dtype=dtype))
    check(make(T=70, softcap=softcap, dtype=dtype, size=100.0, window=20, transposed=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    S=st.integers(0, 5),
    B=st.integers(0, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(0, 210),
    r=st.integers(0, 70),
    s=st.integers(0, 70),
    window=st.none() | st.integers(1, 210),
    softcap=st.none() | st.floats(0.5, 50),
    whole=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape(S, B, kv, group, T, r, s, **options):
    check(make(S, B, kv * group, kv, T, r, s, **options))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1, 1), (40, 1, 2, 2, 60, 8, 3), (1, 1, 4, 4, 1000, 16, 8), (2, 1, 1, 1, 130, 9, 1100)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_one_and_of_many_tasks(tier, shape, transposed):
    check(make(*shape, transposed=transposed))


def test_no_heads():
    q, values = torch.ones(2, 0, 5, 3), torch.ones(4, 2, 0, 5, 6)
    assert ops.frozen_attention(q, q, values).shape == (4, 2, 0, 5, 6)
    assert ops.attention_lse(q, q).shape == (2, 0, 5)


@pytest.mark.parametrize("size", [1e4, 1e10])
def test_huge_scores(tier, size):
    """Weights sum to 1 whatever the size of the scores, which float32 cannot hold the logsumexp of."""
    call = make(size=size)
    check(call)
    call = call._replace(values=torch.ones_like(call.values))
    lse = bare(call)[1]
    torch.testing.assert_close(bare(call._replace(lse=lse))[0], torch.ones(3, 2, 4, 131, 19), rtol=0, atol=1e-6)


def test_scores_far_below_zero(tier):
    call = make(r=2)
    call.q[..., 0], call.k[..., 0] = 1e3, -1e3
    check(call)


def test_padding_hides_whatever_stands_there(tier):
    call = make(whole=True)
    call.mask[0, :70], call.mask[1] = False, False
    check(call)
    out, lse = bare(call)
    assert (out[:, 1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    for name, position in (("k", 2), ("values", 3), ("pre", 1)):
        there = call.mask.view(*[1] * (position - 2 + (name == "pre")), 2, *[1] * (name != "pre"), 131)
        there = there.unsqueeze(-1) if name != "pre" else call.mask
        spoiled = torch.where(there, getattr(call, name), torch.nan)
        assert torch.equal(bare(call._replace(**{name: spoiled}))[0], out)


def test_padding_has_no_gradient(tier):
    call = make(whole=True, transposed=True)
    call.mask[0, :70], call.mask[1] = False, False
    lse = bare(forward(call))[1]
    values = torch.where(lse[..., None] == -torch.inf, torch.nan, call.values)
    out = bare(call._replace(lse=lse, values=values))[0]
    assert (out[:, ~call.mask.unsqueeze(1).expand(-1, 2, -1)] == 0).all()
    check(call._replace(lse=lse))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_without_finite_scores_are_nan(tier, value):
    call = make()
    call.q[0, 1, 40, 3] = value
    call.k[:, :, :, 3].abs_()
    check(call)
    out = bare(call)[0]
    assert out[:, 0, 1, 40].isnan().all()
    assert out[:, 1].isfinite().all()
    payload = call.q.clone()
    payload[0, 1, 40, 3:4].view(torch.int32).fill_(0x7FC00001)
    assert bare(call._replace(q=payload))[0][:, 0, 1, 40].isnan().all()


def test_a_value_that_is_nan_reaches_no_row_before_its_panel(tier):
    call = make(T=300)
    call.values[1, 0, 0, 200, 5] = torch.nan
    out = bare(call)[0]
    assert out[1, 0, :2, 200:, 5].isnan().all()
    out[1, 0, :2, 192:, 5] = 0
    assert out.isfinite().all()


@pytest.mark.bf16_dots
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_bf16_dot_products(dtype, transposed):
    """Exact for rounded q, k and values, but for the rounding of the weights, to 2^-8."""
    call = make(T=300, r=37, s=20, dtype=dtype, transposed=transposed)
    rounded = call._replace(q=call.q.bfloat16(), k=call.k.bfloat16(), values=call.values.bfloat16(), lse=None)
    lse = bare(forward(rounded), "bf16")[1]
    truth = exact(rounded._replace(lse=lse))[0]
    size = exact(rounded._replace(values=rounded.values.abs(), lse=lse))[0]
    ours = bare(call._replace(lse=lse), "bf16")[0]
    assert ((ours - truth).abs() <= 2**-8 * size).all()
    assert (ours - truth).square().mean().sqrt() < 2**-9 * size.square().mean().sqrt()
    torch.testing.assert_close(lse, exact(forward(rounded))[1])


def test_bf16_without_the_instructions_raises(monkeypatch):
    tier = fc.build_info()["cpu_tiers"][0]
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", tier)
    call = make()
    with pytest.raises(RuntimeError, match=rf"precision='bf16' needs .* the tier in force is {tier}"):
        ops.frozen_attention(call.q, call.k, call.values, precision="bf16")


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_inputs(tier, transposed):
    call = make(whole=True, transposed=transposed)
    wide = torch.full((2, 131, 4, 2, 37), torch.nan)
    wide[..., 1, :] = call.q.transpose(1, 2)
    strided = call._replace(
        q=wide[..., 1, :].transpose(1, 2),
        k=call.k.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        values=call.values.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        lse=None if call.lse is None else call.lse.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        pre=call.pre.T.contiguous().T,
        post=call.post.repeat_interleave(2, 1)[:, ::2],
        mask=call.mask.T.contiguous().T,
    )
    for x, y in zip(bare(call), bare(strided), strict=True):
        assert torch.equal(x, y)
    check(call._replace(values=call.values[:1].expand(4, -1, -1, -1, -1)))


def test_results_do_not_depend_on_threads_or_on_what_else_is_asked(tier):
    call = make(S=3, T=400, r=16, s=16, whole=True)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(bare(call))
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    alone = bare(call._replace(values=call.values[1:2]))
    assert torch.equal(alone[0], outcomes[0][0][1:2])
    some = call._replace(q=call.q[:1], k=call.k[:1], values=call.values[:, :1], pre=call.pre[:1], post=call.post[:1])
    assert torch.equal(bare(some._replace(mask=call.mask[:1]))[0], outcomes[0][0][:, :1])


@pytest.mark.processes
def test_scratch_may_hold_anything():
    """The allocator fills what it hands out with NaN: results must not change."""
    code = (
        "import torch; from support.attention_cases import make; import pyfastcircuits\n"
        "for t in (False, True):\n"
        "    out = torch.ops.pyfastcircuits.frozen_attention(*make(T=200, whole=True, transposed=t), 'ieee')[0]\n"
        "    print(out.double().abs().sum().item())"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "GLIBC_TUNABLES": f"glibc.malloc.perturb={fill}"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for fill in (0, 0x80)  # filled with the complement, 0x7f7f7f7f, which is huge
    ]
    assert "nan" not in results[0]
    assert results[0] == results[1]


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_gradients(kv):
    call = make(S=2, H=4, kv=kv, T=6, r=3, s=2, whole=True, dtype=torch.float64)
    names = ("pre", "post", "mask")
    options = {name: getattr(call, name) for name in names} | {"window": 4, "softcap": 2.0}

    def apply(values, lse=None):
        return ops.frozen_attention(call.q, call.k, values, lse, **options)

    lse = ops.attention_lse(call.q, call.k, mask=call.mask, window=4, softcap=2.0)
    values = call.values.requires_grad_()
    assert torch.autograd.gradcheck(apply, (values,))
    assert torch.autograd.gradcheck(lambda v: apply(v, lse), (values,))
    assert torch.autograd.gradgradcheck(apply, (values,))


def test_gradients_of_bf16_values():
    call = make(dtype=torch.bfloat16, whole=True)
    values = call.values.requires_grad_()
    out = ops.frozen_attention(call.q, call.k, values, pre=call.pre, post=call.post, mask=call.mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(out, values, weights)
    truth = exact(call._replace(values=weights, transposed=True))[0]
    assert gradient.dtype == torch.bfloat16
    assert_as_accurate(gradient, truth.bfloat16(), truth)


def test_public_form():
    call = make(whole=True, window=50, softcap=3.0)
    options = {"window": 50, "softcap": 3.0, "mask": call.mask}
    lse = ops.attention_lse(call.q, call.k, **options)
    out = ops.frozen_attention(call.q, call.k, call.values, lse, pre=call.pre, post=call.post, **options)
    assert torch.equal(out, bare(call)[0])
    assert torch.equal(lse, bare(call)[1])
    for backend in ("cpu", "reference"):
        same = ops.frozen_attention(
            call.q, call.k, call.values, pre=call.pre, post=call.post, backend=backend, **options
        )
        assert same.dtype == torch.float32
        torch.testing.assert_close(same, out, rtol=1e-5, atol=1e-5)
    twice = ops.frozen_attention(call.q, call.k, call.values, scale=2 * call.scale)
    assert torch.equal(twice, ops.frozen_attention(2 * call.q, call.k, call.values))


def test_is_what_torch_calls_attention():
    call = make(H=2, r=16, s=16)
    values = call.values[0]
    theirs = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, values, is_causal=True)
    torch.testing.assert_close(ops.frozen_attention(call.q, call.k, values[None])[0], theirs, rtol=1e-5, atol=2e-6)


BAD = {
    "q": ({"q": torch.ones(2, 3)}, ValueError, r"q has shape \[2, 3\], expected \[B, H, T, r\]"),
    "k": ({"k": torch.ones(2, 2, 130, 37)}, ValueError, r"k has shape \[2, 2, 130, 37\], expected \[2, 2, 131, 37\]"),
    "heads": (
        {"k": torch.ones(2, 3, 131, 37), "values": torch.ones(3, 2, 3, 131, 19)},
        ValueError,
        "4 heads are no multiple of 3",
    ),
    "values": ({"values": torch.ones(2, 2, 131, 19)}, ValueError, r"values has shape .*expected \[S, B, Hkv, T, s\]"),
    "values heads": (
        {"values": torch.ones(3, 2, 4, 131, 19)},
        ValueError,
        r"values has shape \[3, 2, 4, 131, 19\], exp",
    ),
    "lse": ({"lse": torch.ones(2, 4, 130)}, ValueError, r"lse has shape \[2, 4, 130\], expected \[2, 4, 131\]"),
    "pre": ({"pre": torch.ones(131)}, ValueError, r"pre has shape \[131\], expected \[2, 131\]"),
    "post": ({"post": torch.ones(2, 4, 131)}, ValueError, r"post has shape \[2, 4, 131\], expected \[2, 131\]"),
    "mask": ({"mask": torch.ones(2, 131)}, TypeError, "mask has dtype torch.float32, expected torch.bool"),
    "mask shape": ({"mask": torch.ones(2, 1) > 0}, ValueError, r"mask has shape \[2, 1\], expected \[2, 131\]"),
    "window": ({"window": 0}, ValueError, "window is 0, expected an integer from 1"),
    "window type": ({"window": 2.5}, TypeError, r"window is 2\.5, expected an integer"),
    "softcap": ({"softcap": -1.0}, ValueError, r"softcap is -1\.0, expected a positive number"),
    "dtype": (
        {"k": torch.ones(2, 2, 131, 37).double()},
        TypeError,
        "k has dtype torch.float64, but q has torch.float32",
    ),
    "half": ({"q": torch.ones(2, 4, 131, 37).half()}, TypeError, "q has dtype torch.float16, expected one of"),
    "lse dtype": ({"lse": torch.ones(2, 4, 131).long()}, TypeError, "lse has dtype torch.int64, expected floating"),
    "device": ({"pre": torch.ones(2, 131, device="meta")}, ValueError, "pre is on meta, but q is on cpu"),
    "gradient": ({"q": torch.ones(2, 4, 131, 37).requires_grad_()}, ValueError, r"q requires .* pass q\.detach\(\)"),
    "precision": ({"precision": "fp8"}, ValueError, "precision is 'fp8', expected one of ieee"),
    "tf32 on the CPU": ({"precision": "tf32"}, RuntimeError, "precision is 'tf32', expected 'ieee' or 'bf16'"),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of auto"),
    "cuda": ({"backend": "cuda"}, RuntimeError, r"no CUDA C\+\+ kernel of frozen_attention; take"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call = make()
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        ops.frozen_attention(**({"q": call.q, "k": call.k, "values": call.values} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3)}, r"q has shape \[2, 3\], expected \[B, H, T, r\]"),
        ({"k": torch.ones(2, 3, 131, 37)}, "q has 4 heads, no multiple of k's 3"),
        ({"k": torch.ones(2, 2, 131, 36)}, r"k has shape \[2, 2, 131, 36\], expected \[2, 2, 131, 37\]"),
        ({"values": torch.ones(3, 2, 4, 131, 19)}, r"values has shape \[3, 2, 4, 131, 19\], expected \[3, 2, 2, 131"),
        ({"values": torch.ones(3, 2, 2, 131, 19).double()}, "values has dtype torch.float64, but q has torch.float32"),
        ({"lse": torch.ones(2, 4)}, r"lse has shape \[2, 4\], expected \[2, 4, 131\]"),
        ({"mask": torch.ones(2, 131)}, "mask has dtype torch.float32, expected torch.bool"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"softcap": 0.0}, "softcap is 0, expected a positive number"),
        ({"transposed": True, "values": torch.ones(3, 2, 4, 131, 19)}, "lse is None, but the transposed form needs it"),
    ],
)
def test_errors_of_the_bare_op(change, message):
    with pytest.raises(RuntimeError, match=message):
        bare(make()._replace(**change))


@pytest.mark.processes
class TestTorchIntegration:
    def test_opcheck(self):
        op = torch.ops.pyfastcircuits.frozen_attention.default
        for options in ({}, {"whole": True, "window": 3, "softcap": 2.0}, {"transposed": True}):
            call = make(2, 1, 4, 2, 6, 3, 2, **options)
            torch.library.opcheck(op, (*call, "ieee"))
            torch.library.opcheck(op, (*call._replace(values=call.values.requires_grad_()), "ieee"))

    def test_compiles_whole(self):
        call = make(2, 1, 4, 2, 6, 3, 2, whole=True)

        def attend(q, values):
            lse = ops.attention_lse(q * 2, call.k, mask=call.mask)
            return ops.frozen_attention(q * 2, call.k, values, lse, pre=call.pre, mask=call.mask, window=None) + 1

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(call.q, call.values), attend(call.q, call.values))
        values = call.values.requires_grad_()
        ours, eagers = (torch.autograd.grad(f(call.q, values).sum(), values)[0] for f in (compiled, attend))
        assert torch.equal(ours, eagers)
