"""Losses of ablations as differentiable functions of the weights.

The backward pass removes each few experiments once more and makes their logits a block of rows at a time. So memory
grows with the trace, and not with the number of experiments nor with the vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.metrics import Asked
from pyfastcircuits.experiments.options import Measurement
from pyfastcircuits.model.norms import final_norm_gain, norm_scale
from pyfastcircuits.modes import in_plain_modes
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import row_losses, slices
from pyfastcircuits.run.trace import FrozenTrace


def learned_losses(
    trace: FrozenTrace, interventions: Sequence[Intervention], how: Measurement, count: int
) -> tuple[Tensor, Tensor]:
    """The losses of `count` experiments and of the clean run: means, or each position's or sequence's."""
    places = torch.tensor([place for each in interventions for place in each.places], dtype=torch.long)
    order = torch.cat((places.argsort(), torch.tensor([count]))).to(trace.tokens.device)
    found = []
    for sequences in slices(len(trace.tokens), max(1, memory.ROWS // trace.tokens.shape[1])):
        asked = how.asked[sequences]
        if asked.count or how.apart:
            losses = torch.cat(list(_losses_of_part(trace[sequences], asked, how, interventions)))[order]
            share = asked.count / how.asked.count
            found.append(how.placed(asked, losses) if how.apart else losses.mean(-1, dtype=torch.float64) * share)
    total = torch.cat(found, 1) if how.apart else torch.stack(found).sum(0)
    total = total.to(trace.weights.compute_dtype)
    return total[:count], total[count]


def _losses_of_part(
    part: FrozenTrace, asked: Asked, how: Measurement, interventions: Sequence[Intervention]
) -> Iterator[Tensor]:
    """[P, N] of some of the sequences: every intervention's experiments a few at a time, and last the clean run."""
    at_once = max(1, memory.block_bytes(part.final.device) // (8 * part.final.itemsize * part.final.numel()))
    for intervention in interventions:
        for some in slices(len(intervention.places), at_once):
            members = range(len(intervention.places))[some]
            yield _made_again(_changed_losses, part, asked, how, intervention, members)
            if how.progress is not None:
                how.progress(len(members) * asked.count / how.asked.count)
    yield _made_again(asked_losses, part, asked, how, asked.rows(_final(part))[None])


def _made_again(function: Any, *args: Any) -> Tensor:
    """The function's value, of which the backward pass keeps nothing: it calls the function again."""
    value: Tensor = checkpoint(in_plain_modes(function), *args, use_reentrant=False, preserve_rng_state=False)
    return value


def _changed_losses(
    part: FrozenTrace, asked: Asked, how: Measurement, intervention: Intervention, members: Sequence[int]
) -> Tensor:
    removal, W_O = intervention.removal(part, members, asked.where), intervention.W_O(part.weights, members)
    left = asked.rows(_final(part)) - (removal if W_O is None else removal @ W_O)
    scale = norm_scale(left, part.weights) if how.final_norm == "recomputed" else None
    return asked_losses(part, asked, how, left, scale, not intervention.removes_unembed_bias)


def asked_losses(
    part: FrozenTrace, asked: Asked, how: Measurement, rows: Tensor, scale: Tensor | None = None, biased: bool = True
) -> Tensor:
    """[P, N] of rows [P, N, d] of the final residual stream, by the clean run's norm scale or another."""
    scale = asked.rows(part.scales[-1][..., None]) if scale is None else scale[..., None]
    normed, targets = final_norm_gain(rows, part.weights) * scale, asked.tokens()[:, 0].repeat(len(rows))
    if part.final_shift is not None:
        normed = normed + asked.rows(part.final_shift)
    return row_losses(normed.flatten(0, 1), targets, part.weights, how.backend, biased=biased).view(len(rows), -1)


def _final(part: FrozenTrace) -> Tensor:
    """The final residual stream as a function of the weights, also where the run was made without gradients."""
    if not part.weights.n_layers:
        return part.final
    last = part.weights.n_layers - 1
    return part.streams[last] + part.attend(part.streams[last], last) + part.non_head_writes[last]
