"""The tokens of a run, checked: which of them are real, and the positions at which they stand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastcircuits.arguments import as_integers
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import check_range


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a model runs on.

    Attributes:
        tokens: [B, T] of int64.
        mask: [B, T] of bool, None if every token is real.
        positions: [T] or [B, T] of int64.
        placed: whether the positions are others than a model counts by itself in a row without padding.
        chosen: whether they were given, as position_ids.
    """

    tokens: Tensor
    mask: Tensor | None
    positions: Tensor
    placed: bool
    chosen: bool

    @staticmethod
    def of(weights: CircuitWeights, tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> "Tokens":
        """The arguments of `trace`, checked; errors as there."""
        tokens = checked_tokens(weights, tokens)
        mask = checked_mask(tokens, mask)
        counted = torch.arange(tokens.shape[1], device=tokens.device)
        if position_ids is not None:
            positions = _checked_positions(tokens, position_ids)
        elif mask is not None and not mask[:, 0].all():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
        else:
            positions = counted
        if weights.n_ctx is not None:
            if position_ids is None and int(positions.max()) >= weights.n_ctx:
                raise ValueError(f"tokens has {tokens.shape[1]} positions, but W_pos has only {weights.n_ctx}")
            check_range("position_ids", positions, weights.n_ctx)
        placed = not torch.equal(positions.expand_as(tokens), counted.expand_as(tokens))
        return Tokens(tokens, mask, positions, placed, placed and position_ids is not None)


def _checked_positions(tokens: Tensor, position_ids: Tensor) -> Tensor:
    given = as_integers("position_ids", position_ids, tokens.device)
    if given.shape not in (tokens.shape, tokens.shape[1:]):
        expected = f"[{tokens.shape[1]}] or {list(tokens.shape)}"
        raise ValueError(f"position_ids has shape {list(given.shape)}, expected {expected}")
    if position_ids.device != tokens.device:
        raise ValueError(f"position_ids is on {position_ids.device}, but tokens is on {tokens.device}")
    if int(given.min()) < 0:
        raise IndexError(f"position_ids holds {int(given.min())}, expected at least 0")
    return given.long()


def checked_positions(given: Tokens) -> list[int]:
    """The position whose logits are compared, the last that is real in a sequence.

    One row takes W_U as long as it takes to read it; three take three times as long.
    """
    return [given.tokens.shape[1] - 1 if given.mask is None else int(given.mask.any(0).nonzero()[-1])]


def checked_tokens(weights: CircuitWeights, tokens: Tensor) -> Tensor:
    """Tokens as [B, T] of int64; errors as `trace`."""
    if not isinstance(tokens, Tensor) or not _whole(tokens) or tokens.dtype == torch.bool:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens is {kind}, expected a tensor of integers")
    if tokens.dim() not in (1, 2):
        raise ValueError(f"tokens has shape {list(tokens.shape)}, expected [T] or [B, T]")
    if tokens.device != weights.device:
        raise ValueError(f"tokens is on {tokens.device}, but the weights are on {weights.device}")
    if tokens.shape[-1] < 2 or tokens.shape[0] == 0:
        raise ValueError(f"tokens has shape {list(tokens.shape)}: a loss needs sequences of at least 2 tokens")
    check_range("tokens", tokens, weights.d_vocab)
    return tokens.long() if tokens.dim() == 2 else tokens.long()[None]


def checked_mask(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as [B, T] of bool, None if every token is real; errors as `trace`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not _whole(mask):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}, expected a tensor of bools or integers")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, but tokens has {list(tokens.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"mask is on {mask.device}, but tokens is on {tokens.device}")
    real = mask.bool() if mask.dim() == 2 else mask.bool()[None]
    if not (real[:, :-1] & real[:, 1:]).any():
        raise ValueError("mask leaves nothing to predict: no real token follows a real one")
    return None if real.all() else real


def _whole(tensor: Tensor) -> bool:
    """Whether it holds integers or bools."""
    return not tensor.is_floating_point() and not tensor.is_complex()
