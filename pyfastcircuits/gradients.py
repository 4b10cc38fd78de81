"""Backward formulas of ops, below the typed ops and the Triton kernels: each registers them for its own kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.modes import in_plain_modes


def register_no_gradient(op: Any, name: str) -> None:
    """Make backward() raise where it would go through an op that has no derivative, rather than leave gradients out."""

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{name} has no derivative: detach its arguments, or do not call backward() through it")

    torch.library.register_autograd(op, backward)


def register_pair_norms(op: Any) -> None:
    """Make pair_norms, by the name of the op or the op itself, differentiable."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2], output)

    @in_plain_modes
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, norms = ctx.saved_tensors
        return *pair_norms_gradients(left, right, norms, gradient), None, None

    torch.library.register_autograd(op, backward, setup_context=save)


def pair_norms_gradients(left: Tensor, right: Tensor, norms: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """d||X|| = <X, dX> / ||X|| for each product X, 0 where X is 0; X is made again, one left factor at a time."""
    share = torch.where(norms > 0, gradient / norms, 0)
    wide = right.to(norms.dtype)
    rows, columns = [], torch.zeros_like(wide)
    for i, factor in enumerate(left.to(norms.dtype)):
        product = (factor @ wide) * share[i, :, None, None]
        rows.append((product @ wide.mT).sum(0))
        columns = columns + factor.mT @ product
    return torch.stack(rows).to(left.dtype), columns.to(right.dtype)


def register_frozen_attention(op: Any, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Make frozen_attention differentiable in its values: the op is linear, and its transpose is `kernel` itself."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, values, lse, pre, post, mask, *options = inputs
        ctx.save_for_backward(q, k, output[1] if lse is None else lse, pre, post, mask)
        ctx.options, ctx.dtype = options, values.dtype
        ctx.mark_non_differentiable(output[1])

    @in_plain_modes
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, pre, post, mask = ctx.saved_tensors
        scale, window, softcap, transposed, precision = ctx.options
        q, k = (x.to(gradient.dtype) for x in (q, k))
        out = kernel(q, k, gradient, lse, pre, post, mask, scale, window, softcap, not transposed, precision)[0]
        return None, None, out.to(ctx.dtype), *[None] * 9

    torch.library.register_autograd(op, backward, setup_context=save)
