"""logits_lse on the CPU: every tier against fp64, no worse than torch at the same dtype."""

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.sweep_cases import make, not_finite

import pyfastcircuits as fc
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.logits_lse import clean_logsumexp

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = pytest.mark.sanitize


def inputs(P=5, T=13, V=1001, r=37, G=3, **options):
    case = make(P, T, V, r, G, **options)
    return case.base, case.delta, case.basis, case.group


def check(case, cap=None):
    found = torch.ops.pyfastcircuits.logits_lse(*case, "ieee", cap)
    wide = torch.promote_types(case[0].dtype, torch.float32)
    theirs, truth = (reference.logits_lse(*case, cap, dtype=dtype) for dtype in (wide, torch.float64))
    assert_as_accurate(found, theirs, truth, 1e-13 if wide == torch.float64 else 1e-6, rows=[1])


@pytest.mark.matrix(dtype=DTYPES, rank=[0, 1, 37, 129], cap=[None, 3.0])
def test_against_fp64(tier, dtype, rank, cap):
    check(inputs(r=rank, dtype=dtype), cap)


@pytest.mark.parametrize("V", [1, 23, 24, 25, 96, 97, 500])
def test_padding_counts_nothing(tier, V):
    base, delta, basis, group = inputs(V=V)
    check((base - 50, delta, basis, group))


def test_what_is_not_finite(tier):
    case = not_finite()
    check((case.base, case.delta, case.basis, case.group))


def test_results_do_not_depend_on_threads_or_strides(tier):
    base, delta, basis, group = inputs(P=40, T=70, V=700, r=16)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(torch.ops.pyfastcircuits.logits_lse(base, delta, basis, group, "ieee"))
    strided = base.T.contiguous().T, delta, basis.mT.contiguous().mT, group
    outcomes.append(torch.ops.pyfastcircuits.logits_lse(*strided, "ieee"))
    assert all(torch.equal(x, outcomes[0]) for x in outcomes[1:])


def test_public_form():
    base, delta, basis, group = inputs()
    found = fc.ops.logits_lse(base, delta, basis, group=group, cap=5.0)
    logits = base.double() + delta.double() @ basis.double()[group]
    torch.testing.assert_close(found, (5 * (logits / 5).tanh()).logsumexp(-1), rtol=1e-6, atol=1e-6)
    named = fc.ops.logits_lse(base, delta, basis, group=group, cap=5.0, backend="reference")
    torch.testing.assert_close(named, found, rtol=1e-6, atol=1e-6)
    clean = clean_logsumexp(base)
    torch.testing.assert_close(clean, base.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"cap is 0\.0, expected a positive number"):
        fc.ops.logits_lse(base, delta, basis, group=group, cap=0.0)
    with pytest.raises(RuntimeError, match=r"backend='cuda': there is no CUDA C\+\+ kernel of logits_lse"):
        fc.ops.logits_lse(base, delta, basis, group=group, backend="cuda")


@pytest.mark.processes
def test_opcheck():
    torch.library.opcheck(torch.ops.pyfastcircuits.logits_lse.default, (*inputs(2, 3, 60, 4, 2), "ieee", 2.0))
