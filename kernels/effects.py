"""How changes of logits change the distribution of the next token: what sweep_nll and joint_nll share.

With p the clean run's probabilities and x the change of a logit, gain is the sum of p * (exp(x) - 1) and total that of
p * exp(x). A bound on |x|, known before anything is multiplied, chooses the form. Small: exp(x) - 1 is a polynomial,
and total is what p sums to and gain. Direct: exp(x) is a power of 2 from the hardware, right to two units in its last
place, and near zero, where that is not enough for exp(x) - 1, the polynomial is taken. By the counts of pipes, which
are predicted and not measured, this takes fewer issue slots than to split x for the polynomial alone, and those bind
before the 16 exponentials a clock do. Full: see `exact`. There is no running maximum, for the clean run's logsumexp is
known. `exact` also sums the tokens that are so probable that the rounding of one product would be seen: their
probabilities are zero here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastcircuits.kernels.exp_sums import LOG2E, capped
from pyfastcircuits.kernels.tile import work_type

SMALL = tl.constexpr(0.3466)  # the largest |x| of which the polynomial makes exp(x) - 1
DIRECT = 40.0  # past this |x| a probability below fp32's range could matter
LOWEST = tl.constexpr(-87.0)  # of the logarithms of probabilities that are not 0
PROBABLE = tl.constexpr(1 / 16)  # from where on a token is summed in fp64
ROUNDED_UP = {"bf16": 1 + 2**-7, "tf32": 1 + 2**-9}  # how much rounding lengthens two factors, at most
RAISED = 4.0  # times as large as the clean run expects, a change that the changed one expects has roundings that show
MEAN_ELEMENTS = 1 << 22  # of a slice's fp64 copies
CLEAN_OPTIONS = {"BLOCK_V": 1024, "num_warps": 4}


@triton.jit
def less_1(x):
    """(exp(x) - 1) / x for |x| <= SMALL: relative error 4.6e-7 in fp32, 5e-17 in fp64; minimax."""
    if x.dtype == tl.float64:
        p = (x * 1.7703367639214006e-9 + 2.514162345854208e-8) * x + 2.7575195988535498e-7
        p = ((p * x + 2.7557138021523431e-6) * x + 2.4801551008358365e-5) * x + 1.9841270001657426e-4
        p = ((p * x + 1.3888888921040301e-3) * x + 8.3333333332754187e-3) * x + 4.1666666666550597e-2
        return ((p * x + 0.16666666666666725) * x + 0.50000000000000117) * x + 1.0
    else:  # a branch that is not compiled
        p = (x * 0.00833834 + 0.041872803) * x + 0.16666828
        return (p * x + 0.499994) * x + 1.0


@triton.jit
def lanes(x, LANES: tl.constexpr):
    """Partial sums [M, LANES] of rows [M, N]."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.sum(tl.reshape(x, (M, N // LANES, LANES)), 1)


@triton.jit
def sums_of(
    p,  # [M, N]
    x,  # [M, N]
    FAR: tl.constexpr,
    LANES: tl.constexpr,
):
    """What a tile adds to the lanes of gain; in the direct form also of total, and of |x| by p * exp(x) and by p."""
    if FAR:
        grown = tl.exp2(x * LOG2E)
        gain = lanes(p * tl.where(tl.abs(x) <= SMALL, x * less_1(x), grown - 1), LANES)
        size = p * tl.abs(x)
        return gain, lanes(p * grown, LANES), lanes(size * grown, LANES), lanes(size, LANES)
    else:  # a branch that is not compiled
        gain = lanes(p * x * less_1(x), LANES)
        return gain, gain, gain, gain


@triton.jit
def log_probability(
    clean,  # [M, N] logits without the cap
    lse,  # [M], fp64
    CAP: tl.constexpr,
):
    """Logarithms of the clean run's probabilities. The logsumexp has two parts, for one would be rounded."""
    high = lse.to(clean.dtype)
    low = (lse - high.to(tl.float64)).to(clean.dtype)
    return (capped(clean, CAP) - high[:, None]) - low[:, None]


@triton.jit
def probability(
    log_p,  # [M, N]
    clean,  # [M, N]
    bar,  # [M]: the least of the logits that are summed in fp64
):
    """Probabilities, those aside that are summed in fp64."""
    return tl.where((log_p > LOWEST) & (clean < bar.to(clean.dtype)[:, None]), tl.exp2(log_p * LOG2E), 0.0)


@triton.jit
def stretchable(
    log_p,  # [M, N]
    clean,  # [M, N]
    CAP: tl.constexpr,
):
    """What a scale multiplies beside the product: log-probabilities, or logits that have a cap."""
    if CAP is None:
        return tl.where(log_p > LOWEST, log_p, 0.0)
    else:  # a branch that is not compiled
        return tl.where(tl.abs(clean) < float("inf"), clean, 0.0)


@triton.jit
def saturation(clean, CAP: tl.constexpr):
    """tanh(x / CAP) of clean logits x, and 1 less its square, which is computed by itself: it may be tiny."""
    x = clean / CAP
    fall = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    return capped(x, 1.0), 4 * fall / ((1 + fall) * (1 + fall))


@triton.jit
def under_cap(
    moved,  # [M, N] change of a logit without the cap, at most CAP / 2
    bent,  # [M, N] from `saturation`
    slope,
    CAP: tl.constexpr,
):
    """The change of a capped logit."""
    part = capped(moved / CAP, 1.0)
    return CAP * part * slope / (bent * part + 1)


def limit(cap: float | None) -> float:
    """The bound on changes of logits up to which nothing need be made in fp64."""
    return DIRECT if cap is None else min(DIRECT, cap / 2)


def bounds_of(delta: Tensor, basis: Tensor, group: Tensor, work: torch.dtype, kind: str = "fp64") -> Tensor:
    """Bounds [S, T] on the entries of delta[s, t] @ basis[group[s]], of factors rounded for `kind` too.

    They are the products of the factors' norms.
    """
    longest = torch.linalg.vector_norm(basis, dim=1, dtype=work).amax(-1) * ROUNDED_UP.get(kind, 1.0)
    return torch.linalg.vector_norm(delta, dim=-1, dtype=work) * longest[group.clamp(0, len(basis) - 1), None]


def stretched(bounds: Tensor, scale: Tensor, base: Tensor, clean_lse: Tensor, cap: float | None) -> Tensor:
    """The bounds [P, T] with a scale of the logits."""
    low, high = torch.aminmax(base, dim=1)
    reach = (clean_lse - low).clamp(max=-LOWEST.value) if cap is None else torch.maximum(-low, high)
    return scale.abs() * bounds + (scale - 1).abs() * reach


@triton.jit
def clean_kernel(
    base,  # [T, V]
    clean_lse,  # [T], fp64
    tokens,  # [T, COUNT], zeros
    probabilities,  # [T, COUNT], zeros
    bar,  # [T]
    mass,  # [T]
    vocabulary,
    CAP: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What `clean_run` returns, of one position; lanes of a tile stay apart until the end."""
    t = tl.program_id(0).to(tl.int64)
    lse = tl.load(clean_lse + t)
    count = tl.zeros([BLOCK_V], tl.int32)
    least = tl.full([BLOCK_V], float("inf"), work_type(base.dtype.element_ty))
    total = tl.zeros([BLOCK_V], tl.float64)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        clean = tl.load(base + t * vocabulary + columns, columns < vocabulary, float("-inf"))
        clean = clean.to(least.dtype)
        p = tl.exp(capped(clean.to(tl.float64), CAP) - lse)
        here = p >= PROBABLE
        place = count + tl.cumsum(here.to(tl.int32), 0) - 1
        stored = here & (place < COUNT)
        tl.store(tokens + t * COUNT + place, columns.to(tl.int64), stored)
        tl.store(probabilities + t * COUNT + place, p, stored)
        count += tl.sum(here.to(tl.int32))
        least = tl.minimum(least, tl.where(here, clean, float("inf")))
        total += p
    tl.store(bar + t, tl.min(least))
    tl.store(mass + t, tl.sum(total))


def clean_run(base: Tensor, clean_lse: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens that are summed in fp64 [T, N], their probabilities (0: of no token), the least of their logits [T],
    and the sum [T] of the probabilities of this slice of the vocabulary."""
    count = round(1 / PROBABLE.value)
    tokens = torch.zeros(len(base), count, dtype=torch.long, device=base.device)
    p = torch.zeros(tokens.shape, dtype=torch.float64, device=base.device)
    bar, mass = base.new_empty(len(base)), clean_lse.new_empty(len(base))
    clean_kernel[(len(base),)](
        base, clean_lse, tokens, p, bar, mass, base.shape[1], CAP=cap, COUNT=count, **CLEAN_OPTIONS
    )
    return tokens, p, bar, mass


def clean_means(base: Tensor, basis: Tensor, clean_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of p * log p [T], and of p and every row of the basis [G, r, T], over this slice of the vocabulary.

    They are summed in fp64, so that no setting of torch's matrix products matters, and by slices of the vocabulary, so
    that the fp64 copies stay small.
    """
    (groups, rank, _), (positions, vocabulary) = basis.shape, base.shape
    mean_base = torch.where(clean_lse.isfinite(), 0.0, torch.nan).double()
    mean_basis = mean_base.repeat(groups * rank, 1)
    width = max(1, MEAN_ELEMENTS // (groups * rank + positions))
    for first in range(0, vocabulary, width):
        here = slice(first, min(first + width, vocabulary))
        log_p = base[:, here].double() - clean_lse[:, None]
        p = log_p.exp()
        mean_base += torch.where(p > 0, p * log_p, 0.0).sum(-1)
        mean_basis += basis[..., here].flatten(0, 1).double() @ p.T
    return mean_base, mean_basis.view(groups, rank, positions)
