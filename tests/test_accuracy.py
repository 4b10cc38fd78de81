"""The rule of accuracy, whose every row must stand for itself."""

import pytest
import torch
from support.accuracy import assert_as_accurate


def results(*shape):
    """Of size 1 in fp64, and rounded to fp32 as torch's would be."""
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return exact.float(), exact


def test_what_torch_finds_passes():
    theirs, exact = results(5, 7)
    assert_as_accurate(theirs, theirs, exact, tiny=0)
    assert_as_accurate(exact, theirs, exact, tiny=0)


@pytest.mark.parametrize(("rows", "huge", "wrong"), [(None, (2,), (0, 3)), ([1], (slice(None), 2), (0, 3))])
def test_a_huge_row_excuses_no_other(rows, huge, wrong):
    """Torch errs by 1 in a row of 1e7; an error of 1e-3 in a row of numbers near 1 is still one."""
    theirs, exact = results(5, 7)
    exact[huge] *= 1e7
    theirs = exact.float()
    theirs[huge] += 1
    ours = theirs.clone()
    assert_as_accurate(ours, theirs, exact, rows=rows)
    ours[wrong] += 1e-3
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()  # by the largest of all it would pass
    with pytest.raises(AssertionError, match=r"error 0.001, allowed .* element \d of row \d is"):
        assert_as_accurate(ours, theirs, exact, rows=rows)


def test_a_huge_row_may_be_as_wrong_as_torch_is_there():
    theirs, exact = results(5, 7)
    exact[2] *= 1e7
    theirs = exact.float()
    theirs[2] += 1
    ours = theirs.clone()
    ours[2] += 0.9
    assert_as_accurate(ours, theirs, exact)
    ours[2] += 20
    with pytest.raises(AssertionError, match="of row 2 is"):
        assert_as_accurate(ours, theirs, exact)


def test_one_row_of_ablations_counts_for_its_position():
    """[P, T]: what torch errs by in one ablation of a position is allowed in the others of it, and nowhere else."""
    theirs, exact = results(3, 4)
    theirs[1, 2] += 0.1
    ours = exact.clone()
    ours[0, 2] += 0.15
    assert_as_accurate(ours, theirs, exact, rows=[1])
    ours[0, 1] += 0.15
    with pytest.raises(AssertionError, match="element 0 of row 1 is"):
        assert_as_accurate(ours, theirs, exact, rows=[1])


def test_tiny_is_two_roundings_of_a_row_where_they_are_more():
    exact = torch.tensor([[1.0, 1.0], [1.0, 1e6], [1e8, 1e8]], dtype=torch.float64)
    theirs = exact.float()
    assert_as_accurate(exact + 2e-7, theirs, exact, tiny=3e-7)
    wrong = torch.zeros(3, 2, dtype=torch.float64)
    wrong[1, 1] = 0.2
    with pytest.raises(AssertionError, match="allowed 3e-07"):  # torch is right to the last bit everywhere
        assert_as_accurate(exact + wrong, theirs, exact, tiny=3e-7)
    theirs[2] += 8
    assert_as_accurate(exact + wrong, theirs, exact, tiny=3e-7)
    assert_as_accurate(exact + 0.2, theirs, exact, tiny=3e-7, through=1e6 * torch.ones(3, 1))
    for error in ([[4e-7, 0], [0, 0], [0, 0]], [[0, 0.2], [0, 0], [0, 0]], [[0, 0], [0, 0.3], [0, 0]]):
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(exact + torch.tensor(error, dtype=torch.float64), theirs, exact, tiny=3e-7)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_met_exactly(value):
    theirs, exact = results(5, 7)
    exact[1, 2] = value
    ours = exact.clone()
    assert_as_accurate(ours, theirs, exact)
    ours[1, 2] = 3.0
    with pytest.raises(AssertionError, match="not the same: element 2 of row 1 is 3, "):
        assert_as_accurate(ours, theirs, exact)
    ours = exact.clone()
    ours[3, 3] = value
    with pytest.raises(AssertionError, match="element 3 of row 3"):
        assert_as_accurate(ours, theirs, exact)


def test_where_torch_fails_nothing_is_allowed():
    theirs, exact = results(5, 7)
    theirs[1, 2] = torch.nan
    assert_as_accurate(exact, theirs, exact)
    with pytest.raises(AssertionError, match="of row 1"):
        assert_as_accurate(exact + 1e-3 * (torch.arange(5) == 1)[:, None], theirs, exact)


@pytest.mark.parametrize("shape", [(), (4,), (0, 3), (3, 0), (2, 3, 4)])
def test_shapes(shape):
    theirs, exact = results(*shape)
    assert_as_accurate(exact, theirs, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(exact[None], theirs, exact)
