"""Through which directions two heads talk: the virtual weights between them, singular direction by direction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyfastcircuits.circuits.composition import KINDS, Head, Kind, checked_head
from pyfastcircuits.circuits.vocabulary import virtual_weights
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.norms import centered
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Result
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

__all__ = ["subspaces"]


@torch.no_grad()
def subspaces(
    model: CircuitWeights | FrozenTrace,
    source: Sequence[int],
    destination: Sequence[int],
    input: Kind = "V",
    *,
    rank: int | None = None,
) -> Result:
    """The singular directions through which a head writes what a later head reads.

    With OV1 = W_V @ W_O of the source and M2 of the destination, as in composition_scores (QK, its transpose, or OV,
    by `input`), OV1 @ M2 = sum_i s_i a_i c_i.T: where the source reads a_i, it writes w_i = a_i @ OV1, of which the
    destination makes s_i c_i. Unlike W_O1 @ W_2 taken alone, this does not change with the bases of heads' own
    dimensions; and the composition score is sqrt(sum s_i^2) over the norms of OV1 and M2. Gains of norms are in the
    weights; with a layernorm, weights are taken as `center` leaves them.

    Args:
        model: weights; or a run, which adds what passed through each direction in it.
        source, destination: (layer, head); the source's layer must come first.
        input: what of the destination reads: "Q", "K" or "V".
        rank: only the first directions, at most d_head, which is the default.

    Returns:
        Values [rank]: singular values s_i of "direction 0", ..., largest first. In `also`: "share" [rank], s_i^2 of the
        sum of them all; "read" [rank, d], a_i, orthonormal; "written" [rank, d], w_i, in the residual stream between
        the two, neither orthogonal nor of unit length; "received" [rank, d], c_i, orthonormal. For a run, "energy"
        [rank]: the same share of what the source wrote then (without its value bias), as the destination received it at
        all real positions, under the run's norm scales. That is of (x_i s_i)^2, x_i being what the source had read
        along a_i.

    Raises:
        ValueError: a source that is not in an earlier layer; an unknown input; a rank out of range.
        IndexError: no such head.

    Source: "Virtual Weights and the Residual Stream as a Communication Channel", Elhage et al. 2021; Merullo et al.
    2024, "Talking Heads".
    """
    weights = model.weights if isinstance(model, FrozenTrace) else model
    if input not in KINDS:
        raise ValueError(f"input is {input!r}, expected one of {', '.join(KINDS)}")
    most = min(weights.d_head, weights.d_model)
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, expected 1 to {most}")
    first, second = checked_head(weights, source, "source"), checked_head(weights, destination, "destination")
    between = virtual_weights(weights, first, second, input)
    wrote, W_V = centered(between.A, weights), weights.head("W_V", *first)
    if input == "V":
        out = centered(weights.head("W_O", *second), weights)
    else:
        out = weights.head("W_K" if input == "Q" else "W_Q", *second).mT
    read, sizes, received = FactoredMatrix(W_V, (wrote @ between.B) @ out).svd()
    also = {
        "share": sizes.square()[:rank] / sizes.square().sum(),
        "read": read.mT[:rank],
        "written": read.mT[:rank] @ W_V @ wrote,
        "received": received.mT[:rank],
    }
    if isinstance(model, FrozenTrace):
        energy = _energy(model, first, second[0], read * sizes)
        also["energy"] = energy[:rank] / energy.sum()
    names = {name: f"{layer}.{head}" for name, (layer, head) in (("source", first), ("destination", second))}
    what = [f"direction {i}" for i in range(rank)]
    zero = torch.zeros_like(sizes[0])
    return Result(what, sizes[:rank], zero, "singular_value", also, {**names, "input": input}, "size")


def _energy(trace: FrozenTrace, source: Head, reader: int, directions: Tensor) -> Tensor:
    """Of what the source mixed along directions [d, k], as a later layer's norm scales it, at real positions: [k]."""
    layer, head = source
    read = trace.normed(trace.streams[layer], layer) @ directions
    arrived = trace.apply_post_norm(
        apply_pattern(head_pattern(trace.patterns[layer], head), read[None, :, None])[0, :, 0], layer
    )
    arrived = arrived * trace.scales[reader][..., None]
    return (arrived if trace.mask is None else arrived[trace.mask]).square().flatten(0, -2).sum(0)
