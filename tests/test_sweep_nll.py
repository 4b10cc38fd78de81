"""sweep_nll on the CPU: every tier against fp64, no worse than torch at the same dtype."""

import os

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits import reference

TIERS = ("baseline", "avx2", "avx512", "avx512_bf16")
BEST = fc.build_info()["best_cpu_tier"]
HERE = TIERS[: TIERS.index(BEST) + 1]
pytestmark = pytest.mark.sanitize


@pytest.fixture(params=HERE)
def tier(request, monkeypatch):
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", request.param)
    return request.param


def inputs(P=7, T=13, V=1001, r=37, G=3, K=2, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "base": (normal(T, V) * 3).to(dtype),
        "delta": normal(P, T, r).to(dtype),
        "basis": (normal(G, r, V) * 0.3).to(dtype),
        "tokens": torch.randint(0, V, (T, K), generator=g),
        "group": torch.randint(0, G, (P,), generator=g),
    }


def torch_form(base, delta, basis, tokens, group, scale=None, clean_lse=None, precision="ieee"):
    """The same in torch at the inputs' own dtype (bfloat16 as fp32)."""
    if base.dtype == torch.bfloat16:
        base, delta, basis = base.float(), delta.float(), basis.float()
    if precision == "bf16":
        delta, basis = delta.bfloat16().float(), basis.bfloat16().float()
    logits = base + delta @ basis[group]
    if scale is not None:
        logits = logits * scale.to(logits.dtype)[..., None]
    picked = logits.gather(-1, tokens.expand(len(delta), -1, -1))
    change = logits.new_empty(0, len(base))
    if clean_lse is not None:
        p = (base - clean_lse.to(base.dtype)[:, None]).exp()
        change = torch.where(p > 0, p * (logits - base), 0.0).sum(-1)
    return logits.logsumexp(-1), picked, change


def check(arguments: dict[str, Tensor], precision="ieee", **more) -> None:
    ours = torch.ops.pyfastcircuits.sweep_nll(*arguments.values(), more.get("scale"), more.get("clean_lse"), precision)
    rounded = dict(arguments)
    if precision == "bf16":  # the op's stated error is the rounding of its factors; the rest must be as exact as ever
        rounded |= {name: arguments[name].bfloat16() for name in ("delta", "basis")}
    exact = reference.sweep_nll(*rounded.values(), **more)
    theirs = torch_form(*arguments.values(), **more, precision=precision)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        roundings = 8 if b.dtype == torch.float32 else 2 * arguments["delta"].shape[-1] + 16  # fp64: torch is the exact
        size = max(1.0, float(c[c.isfinite()].abs().max()) if c.isfinite().any() else 0.0)
        tiny = roundings * torch.finfo(b.dtype).eps * size
        assert_as_accurate(a, b, c, tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2, 37, 64, 129])
def test_against_fp64(tier, dtype, rank):
    arguments = inputs(r=rank, dtype=dtype)
    scale = torch.rand(7, 13, dtype=torch.float64) + 0.5
    clean = arguments["base"].double().logsumexp(-1)
    check(arguments)
    check(arguments, scale=scale)
    check(arguments, clean_lse=clean)
    check(arguments, scale=scale, clean_lse=clean)


@pytest.mark.skipif(BEST != "avx512_bf16", reason="this CPU has no bfloat16 dot products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 37, 64])
def test_bf16_dot_products_round_the_factors_and_nothing_else(dtype, rank):
    arguments = inputs(r=rank, dtype=dtype)
    check(arguments, precision="bf16")
    check(arguments, precision="bf16", clean_lse=arguments["base"].double().logsumexp(-1))


def test_bf16_without_the_instructions_raises(monkeypatch):
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", "baseline")
    a = inputs()
    with pytest.raises(RuntimeError, match=r"precision='bf16' needs .* the tier in force is baseline"):
        fc.ops.sweep_nll(a["base"], a["delta"], a["basis"], a["tokens"][:, 0], group=a["group"], precision="bf16")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    P=st.integers(0, 9),
    T=st.integers(0, 40),
    V=st.integers(1, 800),
    r=st.integers(0, 70),
    G=st.integers(1, 4),
    K=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(P, T, V, r, G, K, seed):
    check(inputs(P, T, V, r, G, K, seed=seed))


def test_shapes_larger_than_one_task(tier):
    check(inputs(P=70, T=150, V=401, r=8, G=5))
    check(inputs(P=3000, T=1, V=97, r=3, G=2))
    check(inputs(P=2, T=5, V=40_000, r=512, G=1))


EDGES = {
    "huge logits": lambda base: base.mul_(1e4),
    "a column of -inf": lambda base: base[:, 3].fill_(-torch.inf),
    "mostly -inf": lambda base: base[:, 1:].fill_(-torch.inf),
    "all -inf": lambda base: base[4].fill_(-torch.inf),
    "equal": lambda base: base.fill_(2.5),
    "one +inf": lambda base: base[2, 500:501].fill_(torch.inf),
    "two +inf": lambda base: base[2, 500:502].fill_(torch.inf),
    "a NaN": lambda base: base[5, 7:8].fill_(torch.nan),
    "NaN and +inf": lambda base: base[5, 7:9].copy_(torch.tensor([torch.nan, torch.inf])),
    "a NaN with a payload": lambda base: base[5, 7:8].view(torch.int32).fill_(0x7FC00001),
    "the lowest finite value as a mask": lambda base: base[:, 10:].fill_(torch.finfo(base.dtype).min),
    "ascending": lambda base: base.copy_(torch.arange(base.shape[1]) * 1.0),
    "descending": lambda base: base.copy_(torch.arange(base.shape[1], 0, -1) * 1.0),
    "far below zero": lambda base: base.sub_(5e4),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("flat", [False, True], ids=["moved", "unmoved"])
def test_edge_values(tier, edge, flat):
    arguments = inputs()
    EDGES[edge](arguments["base"])
    if flat:
        arguments["delta"].zero_()
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_logits_add_nothing_to_the_divergence(tier, dtype):
    arguments = inputs(dtype=dtype)
    arguments["base"][:, ::3] = -torch.inf
    check(arguments, clean_lse=arguments["base"].double().logsumexp(-1))


def test_strided_inputs(tier):
    a = inputs()
    strided = {
        "base": a["base"].T.contiguous().T,
        "delta": a["delta"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "basis": a["basis"].transpose(1, 2).contiguous().transpose(1, 2),
        "tokens": a["tokens"].T.contiguous().T,
        "group": torch.stack((a["group"], a["group"]), 1)[:, 0],
    }
    contiguous, results = (torch.ops.pyfastcircuits.sweep_nll(*x.values(), None, None, "ieee") for x in (a, strided))
    for x, y in zip(contiguous, results, strict=True):
        assert torch.equal(x, y)
    expanded = a | {"delta": a["delta"][:1].expand(7, -1, -1), "basis": a["basis"][:1].expand(3, -1, -1)}
    check(expanded)


def test_results_do_not_depend_on_threads_or_on_the_other_rows(tier):
    arguments = inputs(P=40, T=70, V=700, r=16)
    threads = torch.get_num_threads()
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(torch.ops.pyfastcircuits.sweep_nll(*arguments.values(), None, None, "ieee"))
    torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    some = arguments | {"delta": arguments["delta"][11:14], "group": arguments["group"][11:14]}
    alone = torch.ops.pyfastcircuits.sweep_nll(*some.values(), None, None, "ieee")
    assert all(torch.equal(x, y[11:14]) for x, y in zip(alone[:2], outcomes[0][:2], strict=True))


def test_slices_of_the_vocabulary_merge():
    a = inputs(V=1000)
    whole = torch.ops.pyfastcircuits.sweep_nll(*a.values(), None, None, "ieee")
    lse, picked = torch.full((7, 13), -torch.inf, dtype=torch.float64), torch.zeros(7, 13, 2, dtype=torch.float64)
    for part in (slice(0, 130), slice(130, 131), slice(131, 1000)):
        cut = a | {"base": a["base"][:, part], "basis": a["basis"][..., part], "tokens": a["tokens"] - part.start}
        one = torch.ops.pyfastcircuits.sweep_nll(*cut.values(), None, None, "ieee")
        lse, picked = torch.logaddexp(lse, one[0]), picked + one[1]
    torch.testing.assert_close(lse, whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(picked, whole[1], rtol=0, atol=0)


def test_public_form_returns_what_is_asked_for():
    a = inputs()
    targets, others = a["tokens"].unbind(-1)
    call = (a["base"], a["delta"], a["basis"], targets)
    nll = fc.ops.sweep_nll(*call, group=a["group"])
    assert isinstance(nll, Tensor)
    assert nll.dtype == torch.float32
    logits = (a["base"].double() + a["delta"].double() @ a["basis"].double()[a["group"]]).log_softmax(-1)
    clean = a["base"].double().log_softmax(-1)
    exact = -logits.gather(-1, targets[None, :, None].expand(7, -1, -1))[..., 0]
    torch.testing.assert_close(nll.double(), exact, rtol=1e-5, atol=1e-5)
    nll2, kl, difference = fc.ops.sweep_nll(*call, group=a["group"], kl=True, logit_difference=(targets, others))
    assert torch.equal(nll, nll2)
    torch.testing.assert_close(kl.double(), (clean.exp() * (clean - logits)).sum(-1), rtol=1e-4, atol=1e-5)
    expected = logits.gather(-1, a["tokens"].expand(7, -1, -1))
    torch.testing.assert_close(difference.double(), expected[..., 0] - expected[..., 1], rtol=1e-5, atol=1e-5)
    for backend in ("cpu", "reference"):
        assert fc.ops.sweep_nll(*call, group=a["group"], backend=backend).dtype == torch.float32


def test_nothing_changed_is_the_clean_loss_with_no_divergence():
    a = inputs(G=1)
    targets = a["tokens"][:, 0]
    nll, kl = fc.ops.sweep_nll(a["base"], torch.zeros_like(a["delta"]), a["basis"], targets, kl=True)
    clean = torch.nn.functional.cross_entropy(a["base"].double(), targets, reduction="none")
    torch.testing.assert_close(nll.double(), clean.expand(7, -1), rtol=1e-6, atol=1e-6)
    assert kl.abs().max() < 1e-6


BAD = {
    "base": (lambda a: a | {"base": a["base"][0]}, ValueError, r"base has shape \[1001\], expected \[T, V\]"),
    "delta": (
        lambda a: a | {"delta": a["delta"][:, :4]},
        ValueError,
        r"delta has shape \[7, 4, 37\], expected \[7, 13",
    ),
    "delta rank": (lambda a: a | {"delta": a["delta"][0]}, ValueError, r"delta has shape .*expected \[P, T, r\]"),
    "basis": (lambda a: a | {"basis": a["basis"][..., 1:]}, ValueError, r"basis has shape \[3, 37, 1000\], expected"),
    "targets": (lambda a: a | {"targets": a["targets"][1:]}, ValueError, r"targets has shape \[12\], expected \[13\]"),
    "group shape": (lambda a: a | {"group": a["group"][1:]}, ValueError, r"group has shape \[6\], expected \[7\]"),
    "group missing": (lambda a: a | {"group": None}, ValueError, "basis holds 3 groups, but group is None"),
    "group value": (lambda a: a | {"group": a["group"] + 2}, IndexError, r"group\[\d\] is \d, expected 0 to 2"),
    "target value": (
        lambda a: a | {"targets": a["targets"] + 900},
        IndexError,
        r"targets\[\d+\] is 1\d+, expected 0 to",
    ),
    "target type": (lambda a: a | {"targets": a["targets"] * 1.0}, TypeError, "targets has dtype torch.float32"),
    "dtype": (lambda a: a | {"delta": a["delta"].double()}, TypeError, "delta has dtype torch.float64, but base has"),
    "half": (lambda a: a | {"base": a["base"].half()}, TypeError, "base has dtype torch.float16, expected one of"),
    "backend": (lambda a: a | {"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of auto"),
    "cuda": (lambda a: a | {"backend": "cuda"}, RuntimeError, "backend='cuda' needs a CUDA device"),
    "triton": (lambda a: a | {"backend": "triton"}, RuntimeError, "backend='triton' needs"),
    "precision": (lambda a: a | {"precision": "fp8"}, ValueError, "precision is 'fp8', expected one of ieee"),
    "tf32 on the CPU": (lambda a: a | {"precision": "tf32"}, RuntimeError, "precision is 'tf32', expected 'ieee' or"),
    "scale": (lambda a: a | {"scale": torch.ones(3)}, ValueError, r"scale has shape \[3\], expected \[7, 13\]"),
    "vocabulary": (lambda a: a | {"base": a["base"][:, :0], "basis": a["basis"][..., :0]}, ValueError, "empty vocab"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if what in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    a = inputs()
    a["targets"] = a.pop("tokens")[:, 0]
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.ops.sweep_nll(**change(a))


def test_unknown_tier_is_named(monkeypatch):
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", "neon")
    with pytest.raises(RuntimeError, match="PYFASTCIRCUITS_CPU_TIER=neon: expected baseline, avx2"):
        check(inputs())


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="compiles and forks")
class TestTorchIntegration:
    def test_opcheck(self):
        a = inputs(P=2, T=3, V=60, r=4)
        clean = a["base"].double().logsumexp(-1)
        scale = torch.ones(2, 3, dtype=torch.float64)
        for more in ((None, None), (scale, clean)):
            torch.library.opcheck(torch.ops.pyfastcircuits.sweep_nll.default, (*a.values(), *more, "ieee"))

    def test_compiles_whole(self):
        a = inputs(P=2, T=3, V=60, r=4)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(base, delta, basis, targets, group):
            return fc.ops.sweep_nll(base * 2, delta, basis, targets, group=group, kl=True)

        call = (a["base"], a["delta"], a["basis"], a["tokens"][:, 0], a["group"])
        eager = fc.ops.sweep_nll(call[0] * 2, *call[1:4], group=call[4], kl=True)
        for x, y in zip(compiled(*call), eager, strict=True):
            assert torch.equal(x, y)
