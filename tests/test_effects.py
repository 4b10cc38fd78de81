"""The form that measures changes themselves: every effect is right in proportion to what an ablation changes."""

import pytest
import torch
from support.effects import assert_effects_within, assert_ranked_as
from support.sweep_cases import Sweep, joint, make, partial
from torch import Tensor

import pyfastcircuits as fc

pytestmark = pytest.mark.sanitize
SEAMS = [0.3465, 0.3467, 39.9, 40.1]


def check(sweep: Sweep, cap: float | None = None) -> None:
    """The sweep, and pairs of its ablations."""
    assert_effects_within(partial(sweep, cap=cap), sweep, cap)
    if sweep.scale is None:
        pairs = joint(sweep, 5)
        assert_effects_within(partial(pairs, cap=cap), pairs, cap)


def steps(size: float, base: Tensor, V: int = 500) -> Sweep:
    """Ablations that move every logit up or down by `size`, or not at all: bounds that are met exactly."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randint(-1, 2, (2, 1, V), generator=generator).float()
    tokens = torch.randint(0, V, (len(base), 2), generator=generator)
    delta = torch.full((4, len(base), 1), size)
    return Sweep(base, delta, basis, tokens, torch.tensor([0, 1, 1, 0]), None, base.double().logsumexp(-1), True)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.1, *SEAMS, 1.0, 5.0, 10.0, 20.0, 90.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
def test_every_size_of_change(tier, size, spread):
    base = spread * torch.randn(9, 500, generator=torch.Generator().manual_seed(1))
    check(steps(size, base))


@pytest.mark.parametrize("size", [10.0**-k for k in range(10)] + [3.0, 10.0])
def test_random_ablations(tier, size):
    sweep = make(P=5, T=30, V=1003, r=64, G=2, K=2, mean=True)
    check(sweep._replace(delta=sweep.delta * size))


@pytest.mark.bf16_dots
@pytest.mark.parametrize("size", [10.0**-k for k in range(10)])
def test_random_ablations_by_bf16_products(size):
    """Factors rounded to bfloat16 leave each effect right to a hundredth of its size.

    Not so where tokens are raised so far that the changed run expects changes many times as large as the clean one.
    """
    sweep = make(P=5, T=30, V=1003, r=64, G=2, K=2, mean=True)
    sweep = sweep._replace(delta=sweep.delta * size)
    pairs = joint(sweep, 5)
    for case in (sweep, pairs):
        assert_effects_within(partial(case, precision="bf16"), case, relative=0.01)


@pytest.mark.parametrize("limit", [0.3466, 40.0])
@pytest.mark.parametrize("beside", [0.999, 1.001])
def test_seams_of_random_ablations(tier, limit, beside):
    """The longest column by the row's length is just below a limit, or just above it."""
    sweep = make(P=4, T=11, V=700, r=16, G=1, K=2, mean=True)
    reach = sweep.delta.norm(dim=-1, keepdim=True) * sweep.basis.norm(dim=1).max()
    check(sweep._replace(delta=sweep.delta * (limit * beside / reach)))


@pytest.mark.parametrize("fall", [0.3, 5.0, 30.0, 90.0])
def test_a_token_that_has_all_probability_and_loses_it(tier, fall):
    base = torch.randn(7, 400, generator=torch.Generator().manual_seed(2))
    base[:, 17] += 25
    basis = torch.zeros(1, 1, 400)
    basis[0, 0, 17] = 1
    basis[0, 0, :5] = 1e-3
    tokens = torch.tensor([[17, 3]]).expand(7, -1)
    delta = -fall * torch.tensor([1.0, 0.5]).view(2, 1, 1).expand(-1, 7, -1)
    lse = base.double().logsumexp(-1)
    check(Sweep(base, delta, basis, tokens, torch.zeros(2).long(), None, lse, True))


@pytest.mark.parametrize("depth", [1, 3, 6, 12, 20, 30, 39, 41, 90])
def test_a_token_that_is_raised_to_the_top(tier, depth):
    """Of probability e^-depth: what it gains is e^depth times what its probability says of its weight."""
    base = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    base[:, 40] = base.logsumexp(-1) - depth
    basis = torch.zeros(1, 2, 300)
    basis[0, 0, 40], basis[0, 1, 41] = 1, 1
    delta = torch.tensor([[depth + 1.0, 0.0], [depth - 2.0, 1e-3], [depth / 2, -1.0]])[:, None].expand(-1, 6, -1)
    tokens = torch.tensor([[40, 7]]).expand(6, -1)
    lse = base.double().logsumexp(-1)
    check(Sweep(base, delta, basis, tokens, torch.zeros(3).long(), None, lse, True))


def test_masked_logits(tier):
    sweep = make(P=4, T=9, V=300, r=8, G=2, K=2, mean=True)
    sweep.base[:, ::3] = -torch.inf
    sweep.tokens[:] = torch.tensor([1, 2])
    check(sweep._replace(clean_lse=sweep.base.double().logsumexp(-1)))


def test_equal_rows_are_equal(tier):
    sweep = make(P=9, T=8, V=700, r=20, G=1, K=1, mean=True)
    base, delta = sweep.base[:1].expand(8, -1), sweep.delta[:1, :1].expand(9, 8, -1)
    same = sweep._replace(
        base=base, delta=delta, tokens=sweep.tokens[:1].expand(8, -1), clean_lse=sweep.clean_lse[:1].expand(8)
    )
    for found in partial(same):
        assert (found == found[:1, :1]).all()


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_what_all_logits_share_costs_no_digits(size):
    """Changes of which a shift is nearly all are measured as well as what is left without it."""
    sweep = make(P=4, T=9, V=600, r=8, G=2, K=1)
    small = sweep._replace(delta=sweep.delta * size)
    basis = sweep.basis + 40 * torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(4))
    left = basis.double() - basis.double().mean(-1, keepdim=True)
    effect = fc.ops.sweep_nll(
        small.base, small.delta, basis, small.tokens[:, 0], group=small.group, effect=True, kl=True
    )[0]
    changes = small.delta.double() @ left[small.group]
    exact = (small.base.double() + changes).log_softmax(-1), small.base.double().log_softmax(-1)
    target = small.tokens[:, 0].expand(4, -1)[..., None]
    right = (exact[1] - exact[0]).gather(-1, target)[..., 0]
    among = (exact[1].exp() * changes.abs()).sum(-1) + changes.gather(-1, target)[..., 0].abs()
    assert ((effect - right).abs() <= 2e-5 * among + 1e-10).all()


def test_the_public_form_gives_losses_or_their_rises():
    sweep = make(P=3, T=9, V=200, r=8, G=1, K=3)
    call = (sweep.base, sweep.delta, sweep.basis, sweep.tokens[:, 0])
    others = (sweep.tokens[:, 1], sweep.tokens[:, 2])
    nll, kl, difference = fc.ops.sweep_nll(*call, kl=True, logit_difference=others)
    rise, again, moved = fc.ops.sweep_nll(*call, kl=True, logit_difference=others, effect=True)
    clean = -sweep.base.log_softmax(-1).gather(1, sweep.tokens)
    assert torch.equal(kl, again)
    torch.testing.assert_close(nll, clean[:, 0] + rise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(difference, clean[:, 2] - clean[:, 1] + moved, rtol=1e-5, atol=1e-5)
    pairs = torch.tensor([[0, 1], [1, 2]])
    losses, rises = (fc.ops.joint_nll(*call, pairs, effect=effect) for effect in (False, True))
    torch.testing.assert_close(losses, clean[:, 0] + rises, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("final_norm", ["frozen", "recomputed"])
def test_pairs_are_ranked_as_in_fp64(final_norm):
    """Of a trained model, wherever two effects differ by more than 1e-4 of the larger."""
    weights = fc.load_weights("induction-2l")
    unit = torch.randint(0, weights.d_vocab, (4, 30), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat((torch.zeros(4, 1, dtype=torch.long), unit, unit), 1)
    found, exact = (
        fc.pair_ablation(fc.trace(w, tokens), final_norm=final_norm).delta.double()
        for w in (weights, weights.to(torch.float64))
    )
    assert_ranked_as(found, exact)
