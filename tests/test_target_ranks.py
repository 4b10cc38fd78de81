"""target_ranks on the CPU: every tier against fp64; what ties to within rounding may count or not, nothing else."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweep_cases import Sweep, make, not_finite, partial, whole_numbers
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits.ops import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def inputs(P=7, T=13, V=1001, r=37, G=3, **options) -> Sweep:
    return make(P, T, V, r, G, 1, **options)


def public(s: Sweep, **options) -> Tensor:
    return fc.ops.target_ranks(s.base, s.delta, s.basis, s.tokens[:, 0], group=s.group, **options)


def raw(s: Sweep, thresholds: Tensor, precision="ieee") -> Tensor:
    return torch.ops.pyfastcircuits.target_ranks(
        s.base, s.delta, s.basis, s.tokens[:, 0], s.group, thresholds, precision
    )


def naive(s: Sweep, margin: float = 0.0) -> Tensor:
    """Tokens greater than the target by more than `margin`, from all logits in fp64."""
    logits = s.base.double() + s.delta.double() @ s.basis.double()[s.group]
    target = logits.gather(-1, s.tokens.expand(len(s.delta), -1, -1))
    others = torch.arange(s.base.shape[1]) != s.tokens
    return ((logits > target + margin) & others).sum(-1)


def rounding(s: Sweep) -> float:
    """Four times the worst error of torch's own logits."""
    work = torch.promote_types(s.base.dtype, torch.float32)
    theirs, exact = (s.base.to(t) + s.delta.to(t) @ s.basis.to(t)[s.group] for t in (work, torch.float64))
    return 4 * (theirs - exact).abs().max().item() + 1e-13


def check(s: Sweep, ours: Tensor) -> None:
    assert ours.dtype == torch.int64
    assert ours.shape == s.delta.shape[:2]
    if ours.numel():
        assert (ours >= naive(s, rounding(s))).all()
        assert (ours <= naive(s, -rounding(s))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 37, 64, 129])
def test_against_fp64(tier, dtype, rank):
    s = inputs(r=rank, dtype=dtype)
    check(s, public(s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_where_sums_are_exact(tier, dtype):
    """Full of logits equal to the target's, none of which counts."""
    s = whole_numbers(P=7, T=13, V=1001, r=5, G=3, dtype=dtype)
    ours = public(s)
    assert torch.equal(ours, naive(s))
    assert torch.equal(ours, public(s, backend="reference"))
    assert ours.min() < 50 < ours.max()


@pytest.mark.bf16_dots
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_dot_products_round_the_factors_and_nothing_else(dtype):
    s = inputs(dtype=dtype)
    ours = public(s, precision="bf16")
    check(s._replace(delta=s.delta.bfloat16().to(s.delta), basis=s.basis.bfloat16().to(s.basis)), ours)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(P=st.integers(0, 9), T=st.integers(0, 40), V=st.integers(1, 800), r=st.integers(0, 20), G=st.integers(1, 4))
def test_any_shape(P, T, V, r, G):
    s = whole_numbers(P, T, V, r, G)
    assert torch.equal(public(s), naive(s))


def test_shapes_larger_than_one_task(tier):
    for shape in ((70, 150, 401, 8, 5), (3000, 1, 97, 3, 2), (2, 5, 20_000, 512, 1)):
        s = whole_numbers(*shape)
        assert torch.equal(public(s), naive(s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", [1, 11, 48, 1001])
def test_thresholds_are_compared_exactly(tier, dtype, V):
    """A threshold between two neighbours of the dtype separates them, and so do the ends of what fp64 holds."""
    s = inputs(P=1, T=2, V=V, r=0, G=1, dtype=dtype)
    s.base.fill_(1.0)
    s.tokens.fill_(-1)  # of another slice
    up = torch.nextafter(torch.ones((), dtype=dtype), torch.full((), 2.0, dtype=dtype)).item()
    down = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)).item()
    all_of_them = {1.0: 0, up: 0, (1 + up) / 2: 0, down: V, 1e300: 0, -1e300: V, torch.inf: 0, -torch.inf: V}
    if dtype == torch.float32:
        all_of_them[(1 + down) / 2] = V
    for threshold, count in all_of_them.items():
        assert raw(s, torch.full((1, 2), threshold, dtype=torch.float64)).tolist() == [[count, count]], threshold
    s.base.fill_(-torch.inf)
    assert raw(s, torch.full((1, 2), -1e300, dtype=torch.float64)).tolist() == [[0, 0]]


def test_a_token_never_counts_against_itself(tier):
    s = inputs(P=2, r=0, G=1)
    for token in (0, 11, 47, 48, 700, 1000):
        s.tokens.fill_(token)
        assert torch.equal(raw(s, torch.full((2, 13), -1e9, dtype=torch.float64)), torch.full((2, 13), 1000))
    for token in (-1, 1001, -(2**40)):
        s.tokens.fill_(token)
        assert torch.equal(raw(s, torch.full((2, 13), -1e9, dtype=torch.float64)), torch.full((2, 13), 1001))


@pytest.mark.parametrize("edge", ["huge", "mostly -inf", "all -inf", "+inf", "the target is -inf", "the lowest"])
def test_edge_values(tier, edge):
    s = inputs()
    if edge == "huge":
        s.base.mul_(1e4)
    elif edge == "mostly -inf":
        s.base[:, 1:] = -torch.inf
    elif edge == "all -inf":
        s.base[4] = -torch.inf
    elif edge == "+inf":
        s.base[2, 500:502] = torch.inf
    elif edge == "the target is -inf":
        s.base[torch.arange(13), s.tokens[:, 0]] = -torch.inf
    else:
        s.base[:, 10:] = torch.finfo(torch.float32).min
    check_ours = public(s)
    finite = s._replace(base=s.base.clamp(-1e30, 1e30))  # in the same order, so that rounding can be told
    margin = rounding(finite)
    target = (finite.base.double() + finite.delta.double() @ finite.basis.double()[s.group]).gather(
        -1, s.tokens.expand(7, -1, -1)
    )
    assert target.isfinite().all()
    assert (check_ours <= naive(s, -margin)).all()
    assert (check_ours >= naive(s, margin)).all()


def test_nan_is_greater_than_nothing_and_nothing_than_nan(tier):
    s = not_finite()
    s.tokens[:, 0] = torch.tensor([5, 9, 10, 8, 2, 0])  # row 3 and 4: the target itself is NaN
    ours = public(s)
    assert torch.equal(ours[:, 3:5], torch.zeros(3, 2).long())
    assert ours[1, 5] == 0
    s.tokens[3, 0] = 0
    others = s.base[3].isfinite() & (torch.arange(200) != 0)
    logits = s.base[3].double() + s.delta[:, 3].double() @ s.basis[0].double()
    assert torch.equal(public(s)[:, 3], (logits[:, others] > logits[:, :1]).sum(1))


def test_strided_inputs(tier):
    s = whole_numbers(P=7, T=13, V=401, r=5, G=3)
    strided = s._replace(
        base=s.base.T.contiguous().T,
        delta=s.delta.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        basis=s.basis.mT.contiguous().mT,
        tokens=s.tokens.repeat(1, 2)[:, :1],
        group=torch.stack((s.group, s.group), 1)[:, 0],
    )
    assert torch.equal(public(s), public(strided))
    thresholds = torch.zeros(13, 7, dtype=torch.float64).T
    assert torch.equal(raw(s, thresholds), raw(strided, thresholds.contiguous()))


def test_results_do_not_depend_on_threads(tier):
    s = inputs(P=40, T=70, V=700, r=16)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(public(s))
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_slices_of_the_vocabulary_add_up():
    s = inputs(V=1000)
    thresholds = partial(s).picked[..., 0] + s.base.double().gather(1, s.tokens[:, :1])[:, 0]
    whole = fc.ops.rank_partial(s.base, s.delta, s.basis, s.tokens[:, 0], thresholds, group=s.group)
    total = torch.zeros(7, 13, dtype=torch.int64)
    for part in (slice(0, 130), slice(130, 131), slice(131, 1000)):
        cut = s._replace(base=s.base[:, part], basis=s.basis[..., part], tokens=s.tokens - part.start)
        total += fc.ops.rank_partial(cut.base, cut.delta, cut.basis, cut.tokens[:, 0], thresholds, group=s.group)
    assert torch.equal(total, whole)
    check(s, whole)
    empty = (s.base[:, :0], s.delta, s.basis[..., :0], s.tokens[:, 0], thresholds)
    assert not fc.ops.rank_partial(*empty, group=s.group).any()


def test_neither_scale_nor_cap_moves_a_rank():
    s = inputs(dtype=torch.float64)
    ours = public(s)
    logits = s.base + s.delta @ s.basis[s.group]
    for same in (3.7 * logits, 20 * (logits / 20).tanh()):
        assert torch.equal(ours, (same > same.gather(-1, s.tokens.expand(7, -1, -1))).sum(-1))


def test_many_thresholds_are_gathered_in_parts(monkeypatch):
    s = inputs()
    whole = public(s)
    monkeypatch.setattr(sys.modules["pyfastcircuits.ops.target_ranks"], "THRESHOLD_ELEMENTS", 1000)
    assert torch.equal(public(s), whole)


BAD = {
    "base": ({"base": torch.ones(3)}, ValueError, r"base has shape \[3\], expected \[T, V\]"),
    "delta": ({"delta": torch.ones(2, 4, 5)}, ValueError, r"delta has shape \[2, 4, 5\], expected \[2, 3, 5\]"),
    "basis": ({"basis": torch.ones(2, 4, 9)}, ValueError, r"basis has shape \[2, 4, 9\], expected \[2, 5, 9\]"),
    "targets": ({"targets": torch.zeros(2).long()}, ValueError, r"targets has shape \[2\], expected \[3\]"),
    "target": ({"targets": torch.tensor([0, 9, 1])}, IndexError, r"targets\[1\] is 9, expected 0 to 8"),
    "target type": ({"targets": torch.zeros(3)}, TypeError, "targets has dtype torch.float32, expected integers"),
    "group": ({"group": torch.tensor([0, 2])}, IndexError, r"group\[1\] is 2, expected 0 to 1"),
    "no group": ({"group": None}, ValueError, "basis holds 2 groups, but group is None"),
    "dtype": ({"delta": torch.ones(2, 3, 5).double()}, TypeError, "delta has dtype torch.float64, but base has"),
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
        "group": torch.zeros(2).long(),
    }
    change, error, message = BAD[what]
    with pytest.raises(error, match=message):
        fc.ops.target_ranks(**(good | change))


def test_errors_of_the_bare_op(monkeypatch):
    s = inputs(P=2, T=3, V=9, r=5, G=1)
    good = [s.base, s.delta, s.basis, s.tokens[:, 0], s.group, torch.zeros(2, 3, dtype=torch.float64), "ieee"]
    for place, value, message in (
        (3, s.tokens, r"tokens has shape \[3, 1\], expected \[3\]"),
        (4, s.group + 1, r"group\[0\] is 1, expected 0 to 0"),
        (5, good[5][:1], r"thresholds has shape \[1, 3\], expected \[2, 3\]"),
        (5, good[5].float(), "thresholds has dtype torch.float32, expected torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyfastcircuits.target_ranks(*good[:place], value, *good[place + 1 :])
    tier = fc.build_info()["cpu_tiers"][0]
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", tier)
    with pytest.raises(RuntimeError, match=rf"precision='bf16' needs .* the tier in force is {tier}"):
        torch.ops.pyfastcircuits.target_ranks(*good[:-1], "bf16")


def test_no_cuda_kernel_is_said():
    with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel of target_ranks; take backend='triton'"):
        public(inputs(), backend="cuda")


@pytest.mark.processes
def test_opcheck_and_compile():
    s = make(2, 3, 60, 4, 2)
    thresholds = torch.zeros(2, 3, dtype=torch.float64)
    arguments = (s.base, s.delta, s.basis, s.tokens[:, 0], s.group, thresholds, "ieee")
    torch.library.opcheck(torch.ops.pyfastcircuits.target_ranks.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(base):
        return public(s._replace(base=base * 2)) + 1

    assert torch.equal(compiled(s.base), public(s._replace(base=s.base * 2)) + 1)
    assert torch.equal(reference.target_ranks(*arguments[:-1]), raw(s, thresholds))
