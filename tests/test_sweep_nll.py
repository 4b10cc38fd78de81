"""sweep_nll on the CPU: every tier against fp64, no worse than torch at the same dtype."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.effects import assert_effects_within
from support.sweep_cases import Sweep, capped, exact, make, not_finite, partial
from torch import Tensor

import pyfastcircuits as fc

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def inputs(P=7, T=13, V=1001, r=37, G=3, K=2, **options) -> Sweep:
    return make(P, T, V, r, G, K, **options)


def check(sweep: Sweep, precision="ieee", cap=None) -> None:
    """Of factors that bf16 need not round, products are as exact as ever."""
    if precision == "bf16":
        sweep = sweep._replace(
            delta=sweep.delta.bfloat16().to(sweep.delta), basis=sweep.basis.bfloat16().to(sweep.basis)
        )
    ours = torch.ops.pyfastcircuits.sweep_nll(*sweep, precision, cap)
    assert_effects_within(ours, sweep, cap, relative=1e-13 if sweep.base.dtype == torch.float64 else 2e-6)


@pytest.mark.matrix(dtype=DTYPES, rank=[0, 1, 2, 37, 64, 129], scale=[False, True], mean=[False, True])
def test_against_fp64(tier, dtype, rank, scale, mean):
    check(inputs(r=rank, dtype=dtype, scale=scale, mean=mean))


@pytest.mark.matrix(dtype=DTYPES, cap=[0.5, 3.0, 30.0, 1e6], scale=[False, True], mean=[False, True])
def test_a_soft_cap(tier, dtype, cap, scale, mean):
    check(inputs(dtype=dtype, scale=scale, mean=mean, cap=cap), cap=cap)


@pytest.mark.parametrize("edge", ["huge logits", "a column of -inf", "one +inf", "a NaN", "equal", "descending"])
def test_a_soft_cap_of_edge_values(tier, edge):
    sweep = inputs()
    EDGES[edge](sweep.base)
    check(sweep._replace(clean_lse=capped(sweep.base.double(), 30.0).logsumexp(-1)), cap=30.0)


def with_outer(rank, depth, **options) -> tuple[Sweep, Tensor]:
    """Inputs with `basis` [1, d, V] and an outer [G, r, d] for it."""
    sweep = inputs(r=rank, V=401, **options)
    wide = make(1, 1, 401, depth, dtype=sweep.base.dtype).basis
    outer = make(1, 1, depth, rank, 3, dtype=sweep.base.dtype).basis / depth**0.5
    return sweep._replace(basis=wide), outer


def multiplied_out(sweep: Sweep, outer: Tensor, dtype=None) -> Sweep:
    """In fp64 unless another dtype is asked for, as are the other tensors."""
    dtype = dtype or torch.float64
    wide = sweep._replace(base=sweep.base.to(dtype), delta=sweep.delta.to(dtype))
    return wide._replace(basis=outer.to(dtype) @ sweep.basis[0].to(dtype))


@pytest.mark.matrix(
    dtype=DTYPES,
    shape=[(0, 5), (1, 1), (9, 4), (37, 200), (64, 401)],
    more=[{}, {"scale": True, "mean": True, "K": 3}],
)
def test_bases_made_of_an_outer(tier, dtype, shape, more):
    sweep, outer = with_outer(*shape, dtype=dtype, **more)
    ours = torch.ops.pyfastcircuits.sweep_nll(*sweep, "ieee", None, outer)
    relative = 1e-13 if dtype == torch.float64 else 5e-6  # a basis that is made is rounded too
    assert_effects_within(ours, multiplied_out(sweep, outer), relative=relative)


@pytest.mark.bf16_dots
def test_an_outer_with_bf16_dot_products():
    """The basis is rounded once it is made: as wrong as one given in fp32, no more."""
    sweep, outer = with_outer(64, 300)
    stored = multiplied_out(sweep, outer, torch.float32)
    truth = exact(multiplied_out(sweep, outer))[0]
    error, allowed = (
        (torch.ops.pyfastcircuits.sweep_nll(*x, "bf16", None, given)[0] - truth).abs().max()
        for x, given in ((sweep, outer), (stored, None))
    )
    assert 0 < error <= 1.1 * allowed


def test_an_outer_does_not_depend_on_threads_strides_or_the_other_rows(tier):
    sweep, outer = with_outer(20, 50, P=40, T=70)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(torch.ops.pyfastcircuits.sweep_nll(*sweep, "ieee", None, outer))
    strided = sweep._replace(basis=sweep.basis.mT.contiguous().mT)
    outcomes.append(torch.ops.pyfastcircuits.sweep_nll(*strided, "ieee", None, outer.mT.contiguous().mT))
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    some = sweep._replace(delta=sweep.delta[11:14], group=sweep.group[11:14])
    alone = torch.ops.pyfastcircuits.sweep_nll(*some, "ieee", None, outer)
    assert all(torch.equal(x, y[11:14]) for x, y in zip(alone[:2], outcomes[0][:2], strict=True))


def test_an_outer_elsewhere_is_multiplied_out():
    sweep, outer = with_outer(8, 20, dtype=torch.float64)
    for mine, truth in zip(
        partial(sweep, backend="reference", outer=outer),
        exact(multiplied_out(sweep, outer)),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("scratch", [1, 22 << 20])
def test_who_multiplies_an_outer_does_not_depend_on_threads(groups, scratch, monkeypatch):
    """Few groups are multiplied out, in slices of the vocabulary; many are the kernel's work, whatever the threads."""
    module = sys.modules["pyfastcircuits.ops.sweep_nll"]
    monkeypatch.setattr(module, "SCRATCH", scratch)
    given, kernel_of = [], module.kernel_of
    monkeypatch.setattr(module, "kernel_of", lambda *names: lambda *x: given.append(x) or kernel_of(*names)(*x))
    sweep = make(9, 21, 1500, 16, groups, 2, scale=True, mean=True)
    outer = make(1, 1, 200, 16, groups).basis / 200**0.5
    sweep = sweep._replace(basis=make(1, 1, 1500, 200).basis)
    threads, outcomes = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(partial(sweep, outer=outer))
    torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    assert len(given) == 3 * (4 if groups == 2 and scratch == 1 else 1)
    assert {len(x) for x in given} == {11 if groups == 8 else 10}
    assert_effects_within(outcomes[0], multiplied_out(sweep, outer), relative=5e-6)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (torch.ones(3, 8, 21), r"outer has shape \[3, 8, 21\], expected \[3, 8, 20\]"),
        (torch.ones(3, 7, 20), r"outer has shape \[3, 7, 20\], expected \[3, 8, 20\]"),
        (torch.ones(8, 20), r"outer has shape \[8, 20\], expected \[G, r, d\]"),
        (torch.ones(3, 8, 20).double(), "outer has dtype torch.float64, but base has torch.float32"),
        (torch.ones(2, 8, 20), r"group\[\d+\] is 2, expected 0 to 1"),
    ],
)
def test_a_bad_outer_is_named(outer, message):
    sweep, _ = with_outer(8, 20)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyfastcircuits.sweep_nll(*sweep, "ieee", None, outer)


@pytest.mark.bf16_dots
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 37, 64])
@pytest.mark.parametrize("mean", [False, True])
def test_bf16_dot_products_round_the_factors_and_nothing_else(dtype, rank, mean):
    check(inputs(r=rank, dtype=dtype, mean=mean), precision="bf16")


def test_bf16_without_the_instructions_raises(monkeypatch):
    tier = fc.build_info()["cpu_tiers"][0]
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", tier)
    a = inputs()
    with pytest.raises(RuntimeError, match=rf"precision='bf16' needs .* the tier in force is {tier}"):
        fc.ops.sweep_nll(a.base, a.delta, a.basis, a.tokens[:, 0], group=a.group, precision="bf16")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    P=st.integers(0, 9),
    T=st.integers(0, 40),
    V=st.integers(1, 800),
    r=st.integers(0, 70),
    G=st.integers(1, 4),
    K=st.integers(0, 3),
    scale=st.booleans(),
    mean=st.booleans(),
)
def test_any_shape(P, T, V, r, G, K, scale, mean):
    check(make(P, T, V, r, G, K, scale=scale, mean=mean))


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
@pytest.mark.parametrize("moved", [False, True])
def test_edge_values(tier, edge, moved):
    sweep = inputs()
    EDGES[edge](sweep.base)
    if not moved:
        sweep.delta.zero_()
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))


def test_what_is_not_finite(tier):
    check(not_finite())


def test_huge_logits_lose_nothing(tier):
    """The target is the whole row's mass: its loss is far below a rounding of the logit."""
    sweep = inputs(K=1)
    sweep.base[torch.arange(13), sweep.tokens[:, 0]] = 1e4
    nll = fc.ops.sweep_nll(sweep.base, sweep.delta, sweep.basis, sweep.tokens[:, 0], group=sweep.group)
    assert nll.abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_logits_add_nothing_to_the_divergence(tier, dtype):
    sweep = inputs(dtype=dtype)
    sweep.base[:, ::3] = -torch.inf
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))


def test_strided_inputs(tier):
    a = inputs(scale=True, mean=True)
    strided = Sweep(
        base=a.base.T.contiguous().T,
        delta=a.delta.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        basis=a.basis.mT.contiguous().mT,
        tokens=a.tokens.T.contiguous().T,
        group=torch.stack((a.group, a.group), 1)[:, 0],
        scale=a.scale.T.contiguous().T,
        clean_lse=torch.stack((a.clean_lse, a.clean_lse), 1)[:, 0],
        mean=True,
    )
    contiguous, results = (torch.ops.pyfastcircuits.sweep_nll(*x, "ieee") for x in (a, strided))
    for x, y in zip(contiguous, results, strict=True):
        assert torch.equal(x, y)
    check(a._replace(delta=a.delta[:1].expand(7, -1, -1), basis=a.basis[:1].expand(3, -1, -1)))


def test_results_do_not_depend_on_threads_or_on_the_other_rows(tier):
    sweep = inputs(P=40, T=70, V=700, r=16)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(torch.ops.pyfastcircuits.sweep_nll(*sweep, "ieee"))
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    some = sweep._replace(delta=sweep.delta[11:14], group=sweep.group[11:14])
    alone = torch.ops.pyfastcircuits.sweep_nll(*some, "ieee")
    assert all(torch.equal(x, y[11:14]) for x, y in zip(alone[:2], outcomes[0][:2], strict=True))


def test_slices_of_the_vocabulary_merge():
    a = inputs(V=1000, mean=True)
    whole, merged = partial(a), None
    for part in (slice(0, 130), slice(130, 131), slice(131, 1000)):
        cut = a._replace(base=a.base[:, part], basis=a.basis[..., part], tokens=a.tokens - part.start)
        merged = partial(cut) if merged is None else merged.merged(partial(cut))
    assert_effects_within(merged, a)
    torch.testing.assert_close(merged.log_total, whole.log_total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.picked, whole.picked, rtol=0, atol=0)


def test_public_form_returns_what_is_asked_for():
    a = inputs()
    targets, others = a.tokens.unbind(-1)
    call = (a.base, a.delta, a.basis, targets)
    nll = fc.ops.sweep_nll(*call, group=a.group)
    assert isinstance(nll, Tensor)
    assert nll.dtype == torch.float32
    logits = (a.base.double() + a.delta.double() @ a.basis.double()[a.group]).log_softmax(-1)
    clean = a.base.double().log_softmax(-1)
    expected = logits.gather(-1, a.tokens.expand(7, -1, -1))
    torch.testing.assert_close(nll.double(), -expected[..., 0], rtol=1e-5, atol=1e-5)
    nll2, kl, difference = fc.ops.sweep_nll(*call, group=a.group, kl=True, logit_difference=(targets, others))
    assert torch.equal(nll, nll2)
    torch.testing.assert_close(kl.double(), (clean.exp() * (clean - logits)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(difference.double(), expected[..., 0] - expected[..., 1], rtol=1e-5, atol=1e-5)
    assert fc.ops.sweep_nll(*call, group=a.group, backend="reference").dtype == torch.float32
    capped, capped_kl = fc.ops.sweep_nll(*call, group=a.group, cap=2.0, kl=True)
    p, q = (
        (2 * (x / 2).tanh()).log_softmax(-1)
        for x in (a.base.double(), a.base.double() + (a.delta @ a.basis[a.group]).double())
    )
    torch.testing.assert_close(
        capped.double(), -q.gather(-1, targets[:, None].expand(7, -1, -1))[..., 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(capped_kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)


def test_nothing_changed_is_the_clean_loss_with_no_divergence():
    a = inputs(G=1)
    targets = a.tokens[:, 0]
    nll, kl = fc.ops.sweep_nll(a.base, torch.zeros_like(a.delta), a.basis, targets, kl=True)
    clean = torch.nn.functional.cross_entropy(a.base.double(), targets, reduction="none")
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
    "cuda": (
        lambda a: a | {"backend": "cuda"},
        RuntimeError,
        r"there is no CUDA C\+\+ kernel of sweep_nll; take backend",
    ),
    "triton": (lambda a: a | {"backend": "triton"}, RuntimeError, "backend='triton' needs"),
    "precision": (lambda a: a | {"precision": "fp8"}, ValueError, "precision is 'fp8', expected one of ieee"),
    "tf32 on the CPU": (lambda a: a | {"precision": "tf32"}, RuntimeError, "precision is 'tf32', expected 'ieee' or"),
    "scale": (lambda a: a | {"scale": torch.ones(3)}, ValueError, r"scale has shape \[3\], expected \[7, 13\]"),
    "cap": (lambda a: a | {"cap": 0.0}, ValueError, "cap is 0.0, expected a positive number"),
    "vocabulary": (lambda a: a | {"base": a["base"][:, :0], "basis": a["basis"][..., :0]}, ValueError, "empty vocab"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if what in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    a = inputs()._asdict()
    a["targets"] = a.pop("tokens")[:, 0]
    del a["clean_lse"], a["mean"]
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.ops.sweep_nll(**change(a))


def test_unknown_tier_is_named(monkeypatch):
    other, here = ("neon", "baseline, avx2, avx512 or avx512_bf16")
    if fc.build_info()["cpu_tiers"][0] == "neon":
        other, here = ("avx2", "neon or neon_bf16")
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", other)
    with pytest.raises(RuntimeError, match=f"PYFASTCIRCUITS_CPU_TIER={other}: expected {here}$"):
        check(inputs())


@pytest.mark.processes
class TestTorchIntegration:
    def test_opcheck(self):
        for more in ({}, {"scale": True, "mean": True}):
            sweep = make(2, 3, 60, 4, 2, 2, **more)
            torch.library.opcheck(torch.ops.pyfastcircuits.sweep_nll.default, (*sweep, "ieee"))
            torch.library.opcheck(torch.ops.pyfastcircuits.sweep_nll.default, (*sweep, "ieee", 2.0))
        sweep, outer = with_outer(4, 6)
        torch.library.opcheck(torch.ops.pyfastcircuits.sweep_nll.default, (*sweep, "ieee", None, outer))

    def test_compiles_whole(self):
        a = make(2, 3, 60, 4, 2, 1)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(base, delta, basis, targets, group):
            return fc.ops.sweep_nll(base * 2, delta, basis, targets, group=group, kl=True)

        call = (a.base, a.delta, a.basis, a.tokens[:, 0], a.group)
        eager_result = fc.ops.sweep_nll(call[0] * 2, *call[1:4], group=call[4], kl=True)
        for x, y in zip(compiled(*call), eager_result, strict=True):
            assert torch.equal(x, y)
