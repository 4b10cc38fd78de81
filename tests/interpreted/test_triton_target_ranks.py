"""The Triton kernel on the CPU, by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of its process", allow_module_level=True)

from support.sweep_cases import Sweep, make, not_finite, whole_numbers

from pyfastcircuits import ops
from pyfastcircuits.kernels.target_ranks import target_ranks_triton
from pyfastcircuits.ops import reference

# numpy stands in for the GPU, and warns where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def arguments(s: Sweep, thresholds: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (s.base, s.delta, s.basis, s.tokens[:, 0], s.group, thresholds)


def public(s: Sweep, backend: str = "triton", precision: str = "ieee") -> torch.Tensor:
    call = (s.base, s.delta, s.basis, s.tokens[:, 0])
    return ops.target_ranks(*call, group=s.group, backend=backend, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "V", "r", "G"), [(1, 1, 1, 0, 1), (11, 5, 65, 5, 4), (2, 40, 300, 70, 2)])
def test_shapes_and_ties(P: int, T: int, V: int, r: int, G: int, dtype: torch.dtype) -> None:
    s = whole_numbers(P, T, V, r, G, dtype)
    ours = public(s)
    assert ours.dtype == torch.long
    assert torch.equal(ours, public(s, "reference"))
    assert torch.equal(ours, public(s, precision="bf16") if dtype != torch.float64 else ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_compared_exactly(dtype: torch.dtype) -> None:
    s = make(1, 2, 70, 0, dtype=dtype)
    s.base.fill_(1.0)
    s.tokens.fill_(-1)
    eps = torch.finfo(dtype).eps
    for threshold, count in {1.0: 0, 1 + eps: 0, 1 - eps / 2: 70, 1e300: 0, -1e300: 70, -torch.inf: 70}.items():
        given = torch.full((1, 2), threshold, dtype=torch.float64)
        assert (target_ranks_triton(*arguments(s, given), "ieee") == count).all(), threshold
    between = torch.full((1, 2), 1 - eps / 8, dtype=torch.float64)
    if dtype == torch.float32:
        assert (target_ranks_triton(*arguments(s, between), "ieee") == 70).all()


def test_normal_numbers_and_what_is_not_finite() -> None:
    for s in (make(5, 9, 130, 21, 2), not_finite()):
        generator = torch.Generator().manual_seed(0)
        thresholds = torch.randn(len(s.delta), len(s.base), dtype=torch.float64, generator=generator)
        ours = target_ranks_triton(*arguments(s, thresholds), "ieee")
        assert torch.equal(ours, reference.target_ranks(*arguments(s, thresholds)))


@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 0, 9), (2, 4, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    s = make(*shape, r=3)
    thresholds = torch.zeros(shape[:2], dtype=torch.float64)
    assert torch.equal(target_ranks_triton(*arguments(s, thresholds), "ieee"), torch.zeros(shape[:2]).long())


def test_not_contiguous_and_slices() -> None:
    s = whole_numbers(3, 7, 90, 5, 2)
    strided = s._replace(
        base=s.base.T.contiguous().T, delta=s.delta.mT.contiguous().mT, basis=s.basis.mT.contiguous().mT
    )
    assert torch.equal(public(strided), public(s))
    thresholds = torch.zeros(7, 3, dtype=torch.float64).T
    total = torch.zeros(3, 7).long()
    for part in (slice(0, 33), slice(33, 90)):
        cut = s._replace(base=s.base[:, part], basis=s.basis[..., part], tokens=s.tokens - part.start)
        total += target_ranks_triton(*arguments(cut, thresholds), "ieee")
    assert torch.equal(total, reference.target_ranks(*arguments(s, thresholds)))


def test_a_group_that_is_not_there_gives_minus_one() -> None:
    s = make(4, 3, 40, 2, 2)
    s.group[:] = torch.tensor([1, 2**32, 0, -1])
    ours = target_ranks_triton(*arguments(s, torch.zeros(4, 3, dtype=torch.float64)), "ieee")
    assert (ours[[1, 3]] == -1).all()
    assert (ours[[0, 2]] >= 0).all()


def test_errors() -> None:
    s = make(2, 5, 50, 3)
    with pytest.raises(ValueError, match=r"thresholds has shape \[2, 4\], expected \[2, 5\]"):
        target_ranks_triton(*arguments(s, torch.zeros(2, 4, dtype=torch.float64)), "ieee")


def test_opcheck_and_compiles() -> None:
    s = make(2, 5, 50, 3)
    torch.library.opcheck(target_ranks_triton, (*arguments(s, torch.zeros(2, 5, dtype=torch.float64)), "ieee"))
    compiled = torch.compile(lambda base: public(s._replace(base=base)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s.base), public(s) * 2)
