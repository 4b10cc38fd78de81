"""Effects of many ablations, each of which changes the clean logits by a low-rank term, on the loss."""

from collections.abc import Mapping
from functools import partial, reduce
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from pyfastcircuits import shapes
from pyfastcircuits.arguments import public
from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.ops import reference
from pyfastcircuits.ops.backend import Backend, Precision, kernel_of, resolve_backend, room
from pyfastcircuits.ops.logits_lse import clean_logsumexp

shapes.register_outputs("sweep_nll", shapes.sweep_nll_outputs)
register_no_gradient("pyfastcircuits::sweep_nll", "sweep_nll")

FUSED_GROUPS = 8  # a task of the CPU kernel makes the bases of whole groups: with fewer, threads would go idle
SCRATCH = 22 << 20  # bytes of bases that are multiplied out at a time, and of the copies a product makes of factors
SAMPLE = 16  # columns of a basis that tell whether they may share most of themselves
BLOCK = 1 << 20  # entries of a basis whose columns are measured at a time
COLUMNS = 384  # of the vocabulary, at least, and in multiples: whole tiles of every kernel
SURE_GAINS = -0.5, 1e15  # between which log1p(gain) is the better of two forms


class SweepPartial(NamedTuple):
    """The sums over one slice of the vocabulary, in fp64; `merged` joins slices.

    p is the clean run's probability of a token over the whole vocabulary, and change what is added to its logit.
    """

    gain: Tensor  # [P, T] the sum of p * (exp(change) - 1)
    log_total: Tensor  # [P, T] the logarithm of the sum of p * exp(change)
    picked: Tensor  # [P, T, K] changes of the logits of the tokens, 0 for those outside the slice
    mean: Tensor  # [P, T] the sum of p * change; [0, T] if not asked for

    def merged(self, other: "SweepPartial") -> "SweepPartial":
        """The sums over both slices together."""
        log_total = torch.logaddexp(self.log_total, other.log_total)
        return SweepPartial(self.gain + other.gain, log_total, self.picked + other.picked, self.mean + other.mean)

    @property
    def rise(self) -> Tensor:
        """The rise of the logits' logsumexp over the clean run's, [P, T], of sums over the whole vocabulary."""
        least, most = SURE_GAINS
        return torch.where((self.gain >= least) & (self.gain <= most), self.gain.log1p(), self.log_total)

    @property
    def nll(self) -> Tensor:
        """The rise of the loss of the first of the tokens, [P, T]."""
        return self.rise - self.picked[..., 0]

    @property
    def divergence(self) -> Tensor:
        """KL(clean || changed), [P, T]."""
        return self.rise - self.mean


@public
def sweep_partial(
    base: Tensor,  # [T, V]
    delta: Tensor,  # [P, T, r]
    basis: Tensor,  # [G, r, V]
    tokens: Tensor,  # [T, K]
    clean_lse: Tensor,  # [T]
    *,
    group: Tensor,  # [P]
    scale: Tensor | None = None,  # [P, T]
    cap: float | None = None,
    outer: Tensor | None = None,  # [G, r, d] where basis is [1, d, V]
    mean: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> SweepPartial:
    """The sums of a sweep over one slice of the vocabulary: the raw op, whose results can be merged.

    The logits of ablation p are `scale[p, t] * (base[t] + delta[p, t] @ basis[group[p]])`, and where there is a `cap`
    they become cap * tanh(. / cap), the clean ones too. `clean_lse` is the logsumexp of the clean logits over the whole
    vocabulary. Changes of the logits are given up to a number that all tokens of a position share, which no loss sees:
    a scale without a cap multiplies log-probabilities, base - clean_lse. `mean`: whether their mean is asked for.

    With `outer` the bases are the products outer @ basis[0]: of heads, W_O[head] @ W_U. From FUSED_GROUPS groups on the
    CPU kernel makes them a stripe of the vocabulary at a time and stores none; else they are multiplied out in slices
    of the vocabulary, SCRATCH bytes at a time (more on a GPU). Shapes alone decide, so that no result depends on
    threads.
    """
    chosen = resolve_backend(backend, base.device)
    shapes.check_positive("cap", cap)
    if outer is not None and not (chosen == "cpu" and len(outer) >= FUSED_GROUPS):
        bytes_a_column = base.element_size() * (outer[..., 0].numel() + 2 * len(basis[0]))
        width = max(COLUMNS, room(base.device, SCRATCH) // max(bytes_a_column, 1) // COLUMNS * COLUMNS)
        slices = (slice(first, first + width) for first in range(0, max(base.shape[1], 1), width))
        of_slice = partial(
            sweep_partial,
            clean_lse=clean_lse, group=group, scale=scale, cap=cap, mean=mean, precision=precision, backend=backend,
        )  # fmt: skip
        rows = outer.flatten(0, 1)
        parts = (
            of_slice(base[:, c], delta, (rows @ basis[0][:, c]).unflatten(0, outer.shape[:2]), tokens - c.start)
            for c in slices
        )
        return reduce(SweepPartial.merged, parts)
    if chosen == "reference":
        return SweepPartial(*reference.sweep_nll(base, delta, basis, tokens, group, scale, clean_lse, mean, cap))
    arguments = base, delta, basis, tokens, group, scale, clean_lse, mean, precision, cap
    return SweepPartial(*kernel_of("sweep_nll", chosen)(*arguments, *([] if outer is None else [outer])))


@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: Literal[False] = False,
    logit_difference: None = None,
    effect: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    effect: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]: ...
@public
def sweep_nll(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    targets: Tensor,
    *,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    cap: float | None = None,
    kl: bool = False,
    logit_difference: tuple[Tensor, Tensor] | None = None,
    effect: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Next-token losses of P ablations that each change the clean logits by a low-rank term; no logit is stored.

    The logits of ablation p at position t are `base[t] + delta[p, t] @ basis[group[p]]` (an ablation passes minus what
    its path writes), times `scale[p, t]` if given (a recomputed final norm). What is measured is the change of the
    loss, not the difference of two losses: its error is in proportion to the change of the logits (at most 2e-6 of
    E_clean|change| + |change of the target|, in fp32), so that effects of 1e-9 nats have digits too. With p the clean
    run's probabilities, the loss rises by log1p(E_p[expm1(change)]) - change of the target. Deterministic: results do
    not depend on threads or on how the work is cut. Not differentiable.

    Args:
        base: [T, V] clean logits; float32, float64 or bfloat16, as are delta and basis.
        delta: [P, T, r], r >= 0.
        basis: [G, r, V].
        targets: [T] integer tokens.
        group: [P] integers below G, which basis each ablation writes through; None where G is 1.
        scale: [P, T], positive.
        cap: logits x, scaled ones too, become cap * tanh(x / cap) (a soft cap); `base` is given without it.
        kl: also return KL(clean || ablated) [P, T] in nats.
        logit_difference: two [T] tensors of tokens; also return logit(first) - logit(second) [P, T].
        effect: return what the ablations change, the rise of the loss and of the logit difference over the clean
            run's, instead of the losses and differences themselves, which round it away.
        precision: "ieee", "tf32x3", "tf32" or "bf16", which rounds products' factors to 2^-8 relative; see the module.
            The error is then at most 1% of the same, unless the changed run expects changes several times as large.
        backend: see the module; no "cuda".

    Returns:
        nll [P, T] in nats, in base's dtype (fp32 for bfloat16); with `kl` or `logit_difference`, a tuple of nll and
        what was asked for, in that order.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with both values; a cap that is not
            positive.
        IndexError: a token outside [0, V) or a group outside [0, G). CUDA tensors are not read to check this.
        RuntimeError: a backend or precision that is not there.

    Source: the loss of "term importance" ablations in "A Mathematical Framework for Transformer Circuits"
    (Elhage et al. 2021), section "Two-Layer Attention-Only Transformers", computed from the path's rank-r term.
    """
    resolve_backend(backend, base.device)  # an error names this op, not the one that it calls first
    chosen = {"targets": targets}
    chosen |= {f"logit_difference[{i}]": tokens for i, tokens in enumerate(logit_difference or ())}
    group, tokens = checked_sweep(base, delta, basis, group, chosen, scale)
    clean_lse = clean_logsumexp(base, cap=cap, backend=backend)
    sums = sweep_partial(
        base, delta, centered(basis, cap), tokens, clean_lse,
        group=group, scale=scale, cap=cap, mean=kl, precision=precision, backend=backend,
    )  # fmt: skip
    clean = clean_logits(base, tokens, cap)
    nll, difference = sums.nll, None
    if logit_difference is not None:
        difference = sums.picked[..., 1] - sums.picked[..., 2]
    if not effect:
        nll = clean_lse - clean[:, 0] + nll
        difference = None if difference is None else clean[:, 1] - clean[:, 2] + difference
    wanted = (nll, sums.divergence if kl else None, difference)
    results = tuple(x.to(shapes.work_dtype(base)) for x in wanted if x is not None)
    return results[0] if len(results) == 1 else results


def clean_logits(base: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
    """The clean logits of tokens [T, K], fp64; 0 of tokens outside this slice of the vocabulary."""
    here = tokens.clamp(0, base.shape[1] - 1)
    picked = base.gather(1, here).double()
    return (picked if cap is None else cap * (picked / cap).tanh()).masked_fill(here != tokens, 0.0)


def centered(basis: Tensor, cap: float | None) -> Tensor:
    """The basis [G, r, V] less the mean of its columns, where that takes most of every column away.

    What is taken away moves all logits of a position alike, which no loss sees unless there is a cap.
    """
    if cap is not None or torch.compiler.is_compiling() or basis.numel() == 0:
        return basis
    few = basis[..., :: max(1, basis.shape[-1] // SAMPLE)]
    shared, every = torch.stack([torch.linalg.vector_norm(x) for x in (few.mean(-1), few)]).tolist()
    if 2 * few.shape[-1] * shared**2 < every**2:  # the mean is far from most, of most columns
        return basis
    mean = basis.mean(-1, keepdim=True)
    blocks = basis.split(max(1, BLOCK // basis[..., 0].numel()), -1)
    most, rest = (max(longest(block - less) for block in blocks) for less in (torch.zeros_like(mean), mean))
    return basis - mean if 2 * rest <= most else basis


def longest(columns: Tensor) -> float:
    """The largest norm of the columns [..., r, V]."""
    return float(torch.linalg.vector_norm(columns, dim=-2, dtype=shapes.work_dtype(columns)).max())


def checked_sweep(
    base: Tensor,
    delta: Tensor,
    basis: Tensor,
    group: Tensor | None,
    targets: Mapping[str, Tensor],  # [T] each
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The basis that each ablation writes through [P], and the tokens [T, K], int64; wrong inputs of a sweep raise."""
    tokens_of: dict[str, shapes.Argument] = {name: (tokens, "T", int) for name, tokens in targets.items()}
    shapes.check_sweep(base, delta, basis, group, scale=(scale, "P T", float), **tokens_of)
    shapes.check_positive_entries("scale", scale)
    if base.shape[1] == 0:
        raise ValueError(f"base has shape {list(base.shape)}: an empty vocabulary")
    tokens = list(targets.values())
    if base.device.type == "cpu":
        tokens = [shapes.in_range(name, t, base.shape[1]) for name, t in zip(targets, tokens, strict=True)]
        group = None if group is None else shapes.in_range("group", group, len(basis))
    if group is None:
        if len(basis) != 1:
            raise ValueError(f"basis holds {len(basis)} groups, but group is None; say which each ablation uses")
        group = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    return group.long(), torch.stack([t.long() for t in tokens], -1)
