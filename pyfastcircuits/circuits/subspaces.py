"""The directions through which two heads talk: the singular directions of the virtual weights between them."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.virtual import virtual_weights
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.norms import centered
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Result
from pyfastcircuits.run.nodes import Head, Kind, parse_head
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace


@dataclass(frozen=True, eq=False, repr=False)
class Subspaces(Result):
    """The singular values of OV1 @ M2 for a pair of heads, with the directions they belong to.

    OV1 @ M2 = sum_i s_i a_i c_i.T: where the source reads a_i, it writes w_i = a_i @ OV1, and the destination makes
    s_i c_i of it.

    Attributes:
        values: [rank], s_i, largest first, of "direction 0", "direction 1", ...
        share: [rank], s_i^2 as a share of the sum over all directions (in `extra`).
        energy: [rank], for a run: the share of direction i in the energy that the destination received there. That is
            the sum of (x_i s_i)^2 over all real positions, x_i being what the source had read along a_i, mixed by its
            pattern (without its value bias), under the run's norm scales (in `extra`).
        read: [rank, d], a_i, orthonormal.
        written: [rank, d], w_i, in the residual stream between the two heads; neither orthogonal nor of unit length.
        received: [rank, d], c_i, orthonormal.
    """

    _: KW_ONLY
    read: Tensor
    written: Tensor
    received: Tensor


@public
@torch.no_grad()
def subspaces(
    model: CircuitWeights | FrozenTrace,
    source: Sequence[int],
    destination: Sequence[int],
    kind: Kind = "V",
    *,
    rank: int | None = None,
) -> Subspaces:
    """The singular directions through which a head writes what a later head reads.

    They are those of OV1 @ M2, as in composition_scores: OV1 = W_V @ W_O of the source; M2 of the destination is QK, QK
    transposed, or OV, by `kind`. Unlike those of W_O1 @ W_2 alone, they do not change with the bases of the heads' own
    dimensions; and the composition score is sqrt(sum s_i^2) over the norms of OV1 and M2. The gains of norms are in the
    weights; with a layernorm, the weights are taken as `center` leaves them.

    Args:
        model: weights; or a run, which adds the energy that passed through each direction in it.
        source, destination: (layer, head); the source's layer must come first.
        kind: the destination reads by its queries, "Q", its keys, "K", or its values, "V".
        rank: only the first directions, at most d_head, which is the default.

    Raises:
        ValueError: the source is not in an earlier layer; the kind is unknown; the rank is out of range.
        IndexError: the model has no such head.

    Source: "Virtual Weights and the Residual Stream as a Communication Channel", Elhage et al. 2021; Merullo et al.
    2024, "Talking Heads".
    """
    weights = model.weights if isinstance(model, FrozenTrace) else model
    most = min(weights.d_head, weights.d_model)
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}, expected 1 to {most}")
    first, second = parse_head(weights, source, "source"), parse_head(weights, destination, "destination")
    between = virtual_weights(weights, first, second, kind)
    wrote, W_V = centered(between.A, weights), weights.head("W_V", *first)
    if kind == "V":
        out = centered(weights.head("W_O", *second), weights)
    else:
        out = weights.head("W_K" if kind == "Q" else "W_Q", *second).mT
    read, sizes, received = FactoredMatrix(W_V, (wrote @ between.B) @ out).svd()
    extra = {"share": sizes.square()[:rank] / sizes.square().sum()}
    if isinstance(model, FrozenTrace):
        energy = _energy(model, first, second.layer, read * sizes)
        extra["energy"] = energy[:rank] / energy.sum()
    return Subspaces(
        labels=[f"direction {i}" for i in range(rank)],
        values=sizes[:rank],
        baseline=torch.zeros_like(sizes[0]),
        metric="singular_value",
        extra=extra,
        setup={"source": "{}.{}".format(*first), "destination": "{}.{}".format(*second), "kind": kind},
        harm="size",
        read=read.mT[:rank],
        written=read.mT[:rank] @ W_V @ wrote,
        received=received.mT[:rank],
    )


def _energy(trace: FrozenTrace, source: Head, reader: int, directions: Tensor) -> Tensor:
    """The energy of the source's mixture along directions [d, k], as layer `reader`'s norm scales it: [k]."""
    read = trace.normed(trace.streams[source.layer], source.layer) @ directions
    mixture = apply_pattern(head_pattern(trace.patterns[source.layer], source.head), read[None, :, None])[0, :, 0]
    arrived = trace.apply_post_norm(mixture, source.layer) * trace.scales[reader][..., None]
    return (arrived if trace.mask is None else arrived[trace.mask]).square().flatten(0, -2).sum(0)
