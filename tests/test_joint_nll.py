"""joint_nll on the CPU: every tier against fp64, no worse than torch at the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.effects import assert_effects_within
from support.sweep_cases import Joint, capped, joint, make, not_finite, partial

import pyfastcircuits as fc

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def inputs(S=5, T=13, V=1001, r=37, G=3, K=2, P=9, **options) -> Joint:
    return joint(make(S, T, V, r, G, K, **options), P)


def run(case: Joint, precision="ieee", cap=None):
    return torch.ops.pyfastcircuits.joint_nll(*case, precision, cap)


def check(case: Joint, precision="ieee", cap=None) -> None:
    """Of factors that bf16 need not round, products are as exact as ever."""
    if precision == "bf16":
        case = case._replace(delta=case.delta.bfloat16().to(case.delta), basis=case.basis.bfloat16().to(case.basis))
    ours = run(case, precision, cap)
    assert_effects_within(ours, case, cap, relative=1e-13 if case.base.dtype == torch.float64 else 2e-6)


@pytest.mark.matrix(dtype=DTYPES, rank=[0, 1, 37, 129], mean=[False, True], cap=[None, 3.0])
def test_against_fp64(tier, dtype, rank, mean, cap):
    check(inputs(r=rank, dtype=dtype, mean=mean, cap=cap), cap=cap)


@pytest.mark.bf16_dots
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_dot_products_round_the_factors_and_nothing_else(dtype):
    check(inputs(dtype=dtype, mean=True), precision="bf16")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    S=st.integers(1, 9),
    T=st.integers(0, 40),
    V=st.integers(1, 500),
    r=st.integers(0, 70),
    G=st.integers(1, 4),
    K=st.integers(0, 3),
    P=st.integers(0, 20),
    mean=st.booleans(),
)
def test_any_shape(S, T, V, r, G, K, P, mean):
    check(inputs(S, T, V, r, G, K, P, mean=mean))


def test_shapes_larger_than_one_task(tier):
    check(inputs(S=12, T=150, V=401, r=8, G=5, P=70))
    check(inputs(S=500, T=3, V=97, r=3, G=2, P=300))
    check(inputs(S=4, T=200, V=1_000, r=129, G=1, P=6))


EDGES = {
    "huge logits": lambda base: base.mul_(1e4),
    "mostly -inf": lambda base: base[:, 1:].fill_(-torch.inf),
    "all -inf": lambda base: base[4].fill_(-torch.inf),
    "one +inf": lambda base: base[2, 500:501].fill_(torch.inf),
    "NaN and +inf": lambda base: base[5, 7:9].copy_(torch.tensor([torch.nan, torch.inf])),
    "the lowest finite value as a mask": lambda base: base[:, 10:].fill_(torch.finfo(base.dtype).min),
    "ascending": lambda base: base.copy_(torch.arange(base.shape[1]) * 1.0),
    "far below zero": lambda base: base.sub_(5e4),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_edge_values(tier, edge, cap):
    case = inputs()
    EDGES[edge](case.base)
    check(case._replace(clean_lse=capped(case.base.double(), cap).logsumexp(-1)), cap=cap)


def test_what_is_not_finite(tier):
    check(joint(not_finite(), 6))


def test_an_ablation_without_bounds_stays_in_its_own_columns(tier):
    """All of its logits are -inf; a panel's padding is none of them."""
    case = inputs(S=2, V=1001, r=1, G=1, P=4)
    case.basis.abs_()
    case.delta[1] = -torch.inf
    check(case)


def test_a_pair_is_what_the_sum_of_its_changes_does(tier):
    """Two ablations at once are one ablation of twice the rank."""
    a = inputs(S=4, G=4, P=12, mean=True)
    one, other = (a.pairs[:, i] for i in (0, 1))
    delta = torch.cat((a.delta[one], a.delta[other]), -1)
    basis = torch.cat((a.basis[a.group[one]], a.basis[a.group[other]]), 1)
    group = torch.arange(12)
    single = fc.ops.sweep_partial(a.base, delta, basis, a.tokens, a.clean_lse, group=group, mean=True)
    for x, y in zip(run(a), single, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_strided_inputs(tier):
    a = inputs(mean=True)
    strided = Joint(
        base=a.base.T.contiguous().T,
        delta=a.delta.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        basis=a.basis.mT.contiguous().mT,
        tokens=a.tokens.T.contiguous().T,
        group=torch.stack((a.group, a.group), 1)[:, 0],
        pairs=a.pairs.T.contiguous().T,
        clean_lse=torch.stack((a.clean_lse, a.clean_lse), 1)[:, 0],
        mean=True,
    )
    for x, y in zip(run(a), run(strided), strict=True):
        assert torch.equal(x, y)


def test_results_do_not_depend_on_threads_or_on_the_other_pairs(tier):
    case = inputs(S=12, T=70, V=700, r=16, P=30)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(run(case))
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    order = torch.arange(29, -1, -3)
    some = run(case._replace(pairs=case.pairs[order]))
    assert all(torch.equal(x, y[order]) for x, y in zip(some[:2], outcomes[0][:2], strict=True))


def test_slices_of_the_vocabulary_merge():
    a = inputs(V=1000)
    whole, merged = partial(a), None
    for part in (slice(0, 130), slice(130, 131), slice(131, 1000)):
        cut = partial(a._replace(base=a.base[:, part], basis=a.basis[..., part], tokens=a.tokens - part.start))
        merged = cut if merged is None else merged.merged(cut)
    assert_effects_within(merged, a)
    torch.testing.assert_close(merged.picked, whole.picked, rtol=0, atol=0)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_public_form(cap):
    a = inputs(dtype=torch.float32)
    targets = a.tokens[:, 0]
    call = (a.base, a.delta, a.basis, targets, a.pairs.int())
    nll = fc.ops.joint_nll(*call, group=a.group, cap=cap)
    assert nll.dtype == torch.float32
    again, kl = fc.ops.joint_nll(*call, group=a.group, cap=cap, kl=True)
    assert torch.equal(nll, again)
    singles = a.delta.double() @ a.basis.double()[a.group]
    logits = a.base.double() + singles[a.pairs].sum(1)
    p, q = ((x if cap is None else cap * (x / cap).tanh()).log_softmax(-1) for x in (a.base.double(), logits))
    expected = -q.gather(-1, targets[:, None].expand(9, -1, -1))[..., 0]
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    named = fc.ops.joint_nll(*call, group=a.group, cap=cap, backend="reference")
    torch.testing.assert_close(named, nll, rtol=1e-5, atol=1e-5)
    assert (
        fc.ops.joint_nll(a.base.bfloat16(), a.delta[..., :0].bfloat16(), a.basis[:1, :0].bfloat16(), *call[3:]).dtype
        == torch.float32
    )


BAD = {
    "pairs": ({"pairs": torch.zeros(4).long()}, ValueError, r"pairs has shape \[4\], expected \[P, 2\]"),
    "triples": ({"pairs": torch.zeros(4, 3).long()}, ValueError, r"pairs has shape \[4, 3\], expected \[4, 2\]"),
    "pairs type": ({"pairs": torch.zeros(4, 2)}, TypeError, "pairs has dtype torch.float32, expected integers"),
    "pairs value": ({"pairs": torch.tensor([[0, 1], [1, 2]])}, IndexError, r"pairs\[1, 1\] is 2, expected 0 to 1"),
    "pairs device": ({"pairs": torch.zeros(4, 2, device="meta").long()}, ValueError, "pairs is on meta, but base is"),
    "base": ({"base": torch.ones(3)}, ValueError, r"base has shape \[3\], expected \[T, V\]"),
    "delta": ({"delta": torch.ones(2, 4, 5)}, ValueError, r"delta has shape \[2, 4, 5\], expected \[2, 3, 5\]"),
    "target": ({"targets": torch.tensor([0, 9, 1])}, IndexError, r"targets\[1\] is 9, expected 0 to 8"),
    "group": ({"group": torch.tensor([0, 2])}, IndexError, r"group\[1\] is 2, expected 0 to 1"),
    "cap": ({"cap": -1.0}, ValueError, "cap is -1.0, expected a positive number"),
    "precision": ({"precision": "fp8"}, ValueError, "precision is 'fp8', expected one of ieee"),
    "tf32": ({"precision": "tf32"}, RuntimeError, "precision is 'tf32', expected 'ieee' or"),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of auto"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    good = {
        "base": torch.ones(3, 9),
        "delta": torch.ones(2, 3, 5),
        "basis": torch.ones(2, 5, 9),
        "targets": torch.zeros(3).long(),
        "pairs": torch.zeros(4, 2).long(),
        "group": torch.zeros(2).long(),
    }
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.ops.joint_nll(**(good | change))


def test_errors_of_the_bare_op(monkeypatch):
    a = inputs()
    for change, message in (
        ({"pairs": a.pairs[:, :1]}, r"pairs has shape \[9, 1\], expected \[9, 2\]"),
        ({"pairs": a.pairs.int()}, "pairs has dtype torch.int32, expected torch.int64"),
        ({"pairs": a.pairs - 9}, r"pairs\[0, 0\] is -\d, expected 0 to 4"),
        ({"group": a.group + 3}, r"group\[0\] is \d, expected 0 to 2"),
        ({"tokens": a.tokens[1:]}, r"tokens has shape \[12, 2\], expected \[13, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(a._replace(**change))
    tier = fc.build_info()["cpu_tiers"][0]
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", tier)
    with pytest.raises(RuntimeError, match=rf"precision='bf16' needs .* the tier in force is {tier}"):
        run(a, "bf16")


def test_no_cuda_kernel_is_said():
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of joint_nll; take backend='triton'"):
        partial(inputs(), backend="cuda")


@pytest.mark.processes
def test_opcheck_and_compile():
    a = inputs(2, 3, 60, 4, 2, 1, 3, mean=True)
    torch.library.opcheck(torch.ops.pyfastcircuits.joint_nll.default, (*a, "ieee"))
    torch.library.opcheck(torch.ops.pyfastcircuits.joint_nll.default, (*a[:-1], False, "ieee", 2.0))

    def both(base):
        return fc.ops.joint_nll(base * 2, a.delta, a.basis, a.tokens[:, 0], a.pairs, group=a.group, kl=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(a.base), both(a.base), strict=True))
