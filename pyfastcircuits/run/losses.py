"""Losses of rows of the residual stream: logits a slice of the vocabulary at a time, their logsumexps merged.

A row is one position of the normed final residual stream, [d]; N rows have logits [N, V] that are never stored whole
unless they are asked for. What an experiment does to the logits is a low-rank change of them, delta @ basis. Scratch
beyond the clean logits stays within run.memory's bounds, whatever the number of rows and experiments. Processes that
share the vocabulary (see processes) have slices of it each.
"""

from collections.abc import Iterator
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastcircuits.model.norms import final_norm_gain
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.modes import in_plain_modes
from pyfastcircuits.ops import Backend, Precision, SweepPartial, joint_partial, sweep_partial
from pyfastcircuits.ops.library import stripe_columns
from pyfastcircuits.ops.logits_lse import clean_logsumexp
from pyfastcircuits.ops.sweep_nll import clean_logits, longest
from pyfastcircuits.processes import vocabulary_shared
from pyfastcircuits.run import memory

Columns = slice | Tensor  # of the vocabulary
FEW = 1024  # columns whose lengths mostly show that the mean is not most of every one


def slices(size: int, width: int) -> Iterator[slice]:
    """0..size in slices of at most `width`."""
    return (slice(first, min(first + width, size)) for first in range(0, size, width))


class Unembedding:
    """W_U and the bias of the logits, read by columns in the computing dtype.

    `own`: the columns that this process multiplies, all of them unless processes share the vocabulary or hold parts.
    """

    def __init__(self, weights: CircuitWeights, *, biased: bool = True) -> None:
        self.processes = weights.holders if weights.sharded else vocabulary_shared()
        self.own = self.processes.columns(weights.d_vocab_out)
        self.weights, self.dtype, self.cap = weights, weights.compute_dtype, weights.logit_cap
        with torch.no_grad():
            self.bias = weights.whole_unembed_bias() if biased else None

    def columns(self, columns: Columns) -> Tensor:
        """W_U[:, columns], [d, columns]; of a sharded one a slice of the own, or any tokens in one collective."""
        if not self.weights.sharded:
            return self.weights.W_U[:, columns].to(self.dtype)
        held, first = self.weights.own_W_U, self.own.start
        if isinstance(columns, slice):
            return held[:, columns.start - first : columns.stop - first].to(self.dtype)
        here = (columns >= first) & (columns < self.own.stop)
        found = held.new_zeros(len(held), len(columns), dtype=self.dtype)
        found[:, here] = held[:, columns[here] - first].to(self.dtype)
        return self.processes.summed(found)

    @cached_property
    def center(self) -> Tensor | None:
        """The mean of W_U's columns [d, 1], where it is most of every one of them; no change of a loss depends on it.

        What it adds to all logits alike would cost digits of what tokens differ by. With a cap it counts.
        """
        if self.cap is not None:
            return None
        blocks = self.slices(4 * self.weights.d_model, multiplied=False)
        total = sum(self.columns(some).sum(-1, keepdim=True) for some in blocks)
        assert isinstance(total, Tensor)
        center = self.processes.summed(total) / self.weights.d_vocab_out
        few = longest(self.columns(slice(self.own.start, min(self.own.start + FEW, self.own.stop))))
        if 2 * float(center.norm()) < max(float(x) for (x,) in self.processes.gathered(total.new_tensor(few))):
            return None  # nor would it halve the longest, which is at least as long
        lengths = [
            max(longest(self.columns(some) - less) for some in blocks) for less in (torch.zeros_like(center), center)
        ]
        everywhere = [x for (x,) in self.processes.gathered(total.new_tensor(lengths))]
        most, rest = torch.stack(everywhere).amax(0).tolist()
        return center if 2 * rest <= most else None

    def centered(self, columns: Columns) -> Tensor:
        """The same less the center, if there is one."""
        return self.columns(columns) if self.center is None else self.columns(columns) - self.center

    def slices(self, depth: int, multiplied: bool) -> list[slice]:
        """Slices of the own columns in whole stripes of the kernels: [depth, columns] takes at most two blocks.

        `multiplied`: a product with W_U's slice is made, for which up to two copies of the slice are.
        """
        copies = 2 * multiplied + (self.weights.W_U.dtype != self.dtype)
        block = memory.block_bytes(self.weights.device)
        width = 2 * block // (self.dtype.itemsize * max(depth + copies * self.weights.d_model, 1))
        stripe = 2 * stripe_columns()
        parts = slices(self.own.stop - self.own.start, max(stripe, width // stripe * stripe))
        return [slice(self.own.start + part.start, self.own.start + part.stop) for part in parts]


class CleanLogits:
    """The clean logits of rows [N, d], uncapped: held, or made again for each slice of the vocabulary."""

    def __init__(self, rows: Tensor, unembedding: Unembedding, *, held: bool) -> None:
        self.rows, self.unembedding = rows, unembedding
        self.held: Tensor | None = None
        own = unembedding.own
        if held and unembedding.weights.W_U.dtype == unembedding.dtype:
            self.held = rows @ unembedding.columns(own)
        elif held:
            self.held = rows.new_empty(len(rows), own.stop - own.start)
            for columns in unembedding.slices(1, multiplied=True):
                self._held(columns).copy_(rows @ unembedding.columns(columns))
        if self.held is not None and unembedding.bias is not None:
            self.held += unembedding.bias[own]

    def _held(self, columns: slice) -> Tensor:
        assert self.held is not None
        first = self.unembedding.own.start
        return self.held[:, columns.start - first : columns.stop - first]

    def __call__(self, columns: slice) -> Tensor:
        """[N, columns]."""
        if self.held is not None:
            return self._held(columns)
        return self._made(columns, None)

    def _made(self, columns: slice, into: Tensor | None) -> Tensor:
        """The logits of some columns, in memory that is there already if it is given."""
        width, bias = columns.stop - columns.start, self.unembedding.bias
        out = None if into is None else into[: len(self.rows) * width].view(len(self.rows), width)
        logits = torch.mm(self.rows, self.unembedding.columns(columns), out=out)
        return logits if bias is None else logits.add_(bias[columns])

    def sums(self, tokens: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """The logsumexp [N] of the rows' logits, capped if they are, and the logits of tokens [N, K]; fp64."""
        lse = torch.full((len(self.rows),), -torch.inf, dtype=torch.float64, device=self.rows.device)
        picked = torch.zeros(tokens.shape, dtype=torch.float64, device=self.rows.device)
        parts = self.unembedding.slices(0 if self.held is not None else len(self.rows), multiplied=self.held is None)
        # One piece of memory for the logits of all slices: pieces freed and taken anew leave gaps that nothing fits.
        widest = max((part.stop - part.start for part in parts), default=0)
        into = self.rows.new_empty(len(self.rows) * widest) if self.held is None else None
        for part in parts:
            base, cap = self(part) if into is None else self._made(part, into), self.unembedding.cap
            lse = torch.logaddexp(lse, clean_logsumexp(base, cap=cap, backend=backend))
            picked += clean_logits(base, tokens - part.start, cap)
        every, everywhere = zip(*self.unembedding.processes.gathered(lse, picked), strict=True)
        return reduce(torch.logaddexp, every), torch.stack(everywhere).sum(0)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """The logit of one token [N] of each row, fp64 [N]."""
        columns, bias = self.unembedding.columns(tokens).double(), self.unembedding.bias
        logits = torch.einsum("nd,dn->n", self.rows.double(), columns)
        return logits if bias is None else logits + bias[tokens].double()


class LogitBasis:
    """The matrix that a low-rank change of the logits goes through: W_U, or W_O @ W_U of one or several heads.

    Args:
        unembedding: W_U.
        W_O: [1 or P, r, d], of one head for all experiments or of each experiment's own; None: changes are of size d.
        width: of the changes. 0: nothing changes. One more than W_O's r (or than d): the last entry of a change
            multiplies the bias of the logits.
    """

    def __init__(self, unembedding: Unembedding, W_O: Tensor | None = None, width: int = 0) -> None:
        weights = unembedding.weights
        self.unembedding, self.width = unembedding, width
        self.outer = None if W_O is None else final_norm_gain(W_O, weights)
        self.rank = min(width, weights.d_model if W_O is None else W_O.shape[1])
        self.kept: Tensor | None = None

    @property
    def left_to_the_kernel(self) -> bool:
        """Whether the kernel multiplies W_O and W_U: each experiment has its own W_O, and nothing joins the product."""
        return self.outer is not None and len(self.outer) > 1 and self.width == self.rank

    def __call__(self, columns: Columns) -> Tensor:
        """[1 or P, width, columns]."""
        if self.kept is not None:
            return self.kept
        block = self.unembedding.centered(columns)
        if self.outer is None:
            block = block[None, : self.rank]
        else:  # all heads in one product
            block = (self.outer.flatten(0, 1) @ block).unflatten(0, self.outer.shape[:2])
        bias = self.unembedding.bias
        if self.width > self.rank and bias is not None:
            block = torch.cat((block, bias[columns].expand(len(block), 1, -1)), 1)
        return block

    def keep(self, columns: slice) -> None:
        """Store the basis, which is one slice wide, for all experiments that go through it."""
        self.kept = self(columns)


def basis_group(delta: Tensor, bases: Tensor) -> Tensor:
    """The basis [P] that each change goes through: the one there is, or its own."""
    return torch.arange(len(delta), device=delta.device) % len(bases)


def changed_partial(
    clean: CleanLogits,
    clean_lse: Tensor,  # [N]
    delta: Tensor,  # [P, N, width], or [S, N, width] with pairs
    basis: LogitBasis,
    columns: list[slice],
    tokens: Tensor,  # [N, K]
    *,
    scale: Tensor | None = None,  # [P, N]
    pairs: Tensor | None = None,  # [P, 2]
    mean: bool = False,
    precision: Precision = "ieee",
    backend: Backend = "auto",
) -> SweepPartial:
    """The sums of sweep_nll (joint_nll with `pairs`) over the whole vocabulary: base + delta @ basis, never stored."""
    total: SweepPartial | None = None
    options: dict[str, Any] = {
        "cap": clean.unembedding.cap, "mean": mean, "precision": precision, "backend": backend,
    }  # fmt: skip
    for part in columns:
        base, here = clean(part), tokens - part.start
        outer = basis.outer if basis.left_to_the_kernel else None
        bases = basis(part) if outer is None else basis.unembedding.centered(part)[None]
        group = basis_group(delta, bases if outer is None else outer)
        if pairs is None:
            partial = sweep_partial(
                base, delta, bases, here, clean_lse, group=group, scale=scale, outer=outer, **options
            )
        else:
            partial = joint_partial(base, delta, bases, here, pairs, clean_lse, group=group, **options)
        total = partial if total is None else total.merged(partial)
    assert total is not None
    parts = clean.unembedding.processes.gathered(*total)
    return reduce(SweepPartial.merged, (SweepPartial(*part) for part in parts))


def row_losses(
    rows: Tensor, targets: Tensor, weights: CircuitWeights, backend: Backend = "auto", *, biased: bool = True
) -> Tensor:
    """NLL [N] of targets [N] for rows [N, d] of the normed final residual stream; differentiable, in memory O(N d).

    `biased`: whether the bias of the logits is added.

    Raises:
        ValueError: gradients are asked for, and W_U is sharded.
    """
    if weights.sharded and torch.is_grad_enabled() and (rows.requires_grad or weights.learns):
        raise ValueError("weights require gradients, but W_U is sharded: ask under torch.no_grad()")
    bias = weights.whole_unembed_bias() if biased else None
    losses: Tensor = _RowLosses.apply(rows, weights.W_U, bias, targets, weights, backend)
    return losses


class _RowLosses(torch.autograd.Function):
    """The backward pass forms the logits of a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        W_U: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: CircuitWeights,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(rows, W_U, bias, targets)
        ctx.cap = weights.logit_cap
        unembedding = Unembedding(weights, biased=bias is not None)
        out = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        for part in slices(len(rows), memory.ROWS):
            clean = CleanLogits(rows[part], unembedding, held=False)
            lse, picked = clean.sums(targets[part, None], backend)
            out[part] = (lse - picked[:, 0]).to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    @in_plain_modes
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, W_U, bias, targets = ctx.saved_tensors
        wide = W_U.to(rows.dtype)
        into_rows, into_W_U = torch.empty_like(rows), torch.zeros_like(wide)
        into_bias = None if bias is None else torch.zeros_like(bias)
        for part in slices(len(rows), max(1, 4 * memory.block_bytes(rows.device) // wide[0].nbytes)):
            logits = rows[part] @ wide
            if bias is not None:
                logits += bias
            capped = logits if ctx.cap is None else ctx.cap * (logits / ctx.cap).tanh()
            changes = capped.softmax(-1)
            changes[torch.arange(len(changes), device=rows.device), targets[part]] -= 1
            changes *= gradient[part, None]
            if ctx.cap is not None:
                changes *= 1 - (capped / ctx.cap).square()
            into_rows[part] = changes @ wide.mT
            into_W_U += rows[part].mT @ changes
            if into_bias is not None:
                into_bias += changes.sum(0)
        return into_rows, into_W_U.to(W_U.dtype), into_bias, None, None, None
