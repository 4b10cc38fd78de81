"""Heads whose queries, keys and values each read a residual stream of their own.

A model makes the inputs of all heads of a layer from one stream. Where its weights make the same queries, keys and
values as the model does, a head's are one narrow product, and so is the way back of a gradient. Elsewhere (norms that
the weights do not hold, norms over all heads at once, positions of the caller's own) the model makes those of all heads
from each head's stream, and one of them is taken.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.model.norms import centered, head_norm_scale, normalized
from pyfastcircuits.model.queries import finished
from pyfastcircuits.run.nodes import KINDS, Kind
from pyfastcircuits.run.trace import FrozenTrace

Made = tuple[Tensor, Tensor, Tensor]  # queries [N, B, H, T, r], keys and values [N, B, Hkv, T, r]


class SplitInputs:
    """The inputs of a layer's heads, in a part of a run.

    Attributes:
        by_weights: whether the weights make what the model makes.
    """

    def __init__(self, part: FrozenTrace, layer: int, stream: Tensor, made: Made) -> None:
        """`made` is what the layer's heads make of `stream` [B, T, d]."""
        self.part, self.layer, self.weights = part, layer, part.weights
        self.positions = _positions(part)
        self.group = self.weights.n_heads // self.weights.W_K.shape[1]
        self._biases: dict[Kind, Tensor | None] = {}
        self.by_weights = self._agrees(stream, made)

    def _agrees(self, stream: Tensor, made: Made) -> bool:
        if self.weights.qk_norm in ("of a run", "rmsnorm of all heads") or self.part.value_scales is not None:
            return False
        tolerance = min(4096 * torch.finfo(getattr(self.part.forward, "dtype", stream.dtype)).eps, 0.05)
        for kind, theirs in zip(KINDS, made, strict=True):
            weight = self.weights.layer(_WEIGHT[kind], self.layer)
            ours = self._finished(kind, self._read(kind, stream).unsqueeze(-3) @ weight).transpose(1, 2)
            theirs = theirs[0].transpose(1, 2)
            if self.part.mask is not None:
                ours, theirs = ours[self.part.mask], theirs[self.part.mask]
            if float((ours - theirs).abs().max()) > tolerance * float(theirs.abs().max()):
                return False
        return True

    def _read(self, kind: Kind, stream: Tensor) -> Tensor:
        """What the weights of queries, keys or values multiply of a stream [..., B, T, d]."""
        read, weights = normalized(stream, self.weights), self.weights
        if kind == "V" or weights.positional != "shortformer" or weights.W_pos is None:
            return read
        return read + weights.W_pos[self.positions].to(read.dtype)

    def _finished(self, kind: Kind, made: Tensor) -> Tensor:
        """Queries, keys or values [..., n, T, r] of all heads, from what their weight alone makes."""
        if kind not in self._biases:
            self._biases[kind] = self.weights.bias(kind, self.layer)
        bias = self._biases[kind]
        made = made if bias is None else made + bias[:, None]
        return made if kind == "V" else finished(made, self.weights, kind, self.layer, self.positions, biased=False)

    def read(self, kind: Kind, heads: Sequence[int], streams: Tensor) -> Tensor:
        """Queries, keys or values [n, B, T, r] of n heads that read a stream [n, B, T, d] each."""
        own = [self._own(kind, head) for head in heads]
        if not self.by_weights:
            made = self._made(kind, streams)
            return torch.stack([made[i, :, head] for i, head in enumerate(own)])
        read, weight = self._read(kind, streams), self.weights.layer(_WEIGHT[kind], self.layer)
        members = 1 if kind == "Q" else self.group  # heads that share keys and values have a place of their own each
        made = read.new_zeros(members, *read.shape[1:-2], len(weight), read.shape[-2], weight.shape[-1])
        places = [head % members for head in heads]
        for i, (place, head) in enumerate(zip(places, own, strict=True)):
            made[place, :, head] = read[i] @ weight[head]
        return self._finished(kind, made)[places, :, own]

    def _own(self, kind: Kind, head: int) -> int:
        return head if kind == "Q" else head // self.group

    def _made(self, kind: Kind, streams: Tensor) -> Tensor:
        made: Tensor = self.part.forward.qkv(self.layer, normalized(streams, self.weights))["QKV".index(kind)]
        return made

    def pull_back(self, kind: Kind, stream: Tensor, gradient: Tensor) -> Callable[[slice], Tensor]:
        """The gradient by each head's own stream, from that by its queries, keys or values: by positions.

        Args:
            kind: which of them.
            stream: [B, T, d], what all heads read.
            gradient: [B, H, T, r].

        Returns:
            A function of positions, t of the T, that makes their gradients, [H, B, t, d].
        """
        if not self.by_weights:
            whole = self._pulled_back_by_model(kind, stream, gradient)
            return lambda places: whole[:, :, places]
        weights, scales = self.weights, head_norm_scale(stream, self.weights)[..., None]
        weight = weights.layer(_WEIGHT[kind], self.layer)
        by_made, group = self._by_made(kind, stream, weight, gradient), 1 if kind == "Q" else self.group
        into_stream = centered(weight.mT, weights)  # [H or Hkv, r, d]

        def pulled_back(places: slice) -> Tensor:
            here, scale = by_made[:, :, places].transpose(0, 1), scales[:, places]
            by_group = (here * scale).unflatten(0, (-1, group)).flatten(1, -2)
            out: Tensor = (by_group @ into_stream).view(*here.shape[:-1], -1)
            if weights.norm is not None and weights.norm_before_heads:  # the scale falls where the stream grows
                normed = centered(stream[:, places], weights) * scale
                made = (normed[:, None] @ weight).repeat_interleave(group, 1)
                along = torch.einsum("hbtr,bhtr->hbt", here, made) / weights.d_model
                out.addcmul_((normed * scale).expand_as(out), along[..., None], value=-1)
            return out

        return pulled_back

    def _by_made(self, kind: Kind, stream: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, H, T, r] by what the weight alone makes."""
        if kind == "V" or (self.weights.qk_norm is None and self.weights.positional != "rotary"):
            return gradient
        members = 1 if kind == "Q" else self.group
        by_group = gradient.unflatten(1, (-1, members)).movedim(2, 0)  # heads that share keys, one after another
        with torch.enable_grad():
            made = (self._read(kind, stream)[:, None] @ weight).detach().expand(by_group.shape).requires_grad_()
            (back,) = torch.autograd.grad(self._finished(kind, made), made, by_group)
        return back.movedim(0, 2).flatten(1, 2)

    def _pulled_back_by_model(self, kind: Kind, stream: Tensor, gradient: Tensor) -> Tensor:
        heads = range(self.weights.n_heads)
        with torch.enable_grad():
            streams = stream.expand(len(heads), *stream.shape).detach().requires_grad_()
            made = self._made(kind, streams)
            own = torch.stack([made[head, :, self._own(kind, head)] for head in heads], 1)
            (back,) = torch.autograd.grad(own, streams, gradient)
        return back


_WEIGHT: dict[Kind, Literal["W_Q", "W_K", "W_V"]] = {"Q": "W_Q", "K": "W_K", "V": "W_V"}


def _positions(part: FrozenTrace) -> Tensor:
    """Positions as `trace` counts them where none are given: [T] or [B, T]."""
    if part.mask is None or bool(part.mask[:, 0].all()):
        return torch.arange(part.tokens.shape[1], device=part.tokens.device)
    return (part.mask.cumsum(1) - 1).clamp_min(0)


def mixed_by_head(part: FrozenTrace, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """z [B, H, T, r] of heads that each have queries, keys and values [B, H, T, r] of their own; differentiable."""
    made = [_mixed_by_members(part, layer, q, k, v, member) for member in range(_members(part))]
    return torch.stack(made, 2).flatten(1, 2)


def mixed_gradients(part: FrozenTrace, layer: int, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The gradients by the three inputs of `mixed_by_head` [B, H, T, r] from that by its z.

    Heads that share keys and values are run one after another, so that the patterns of a layer are held once.
    """
    out = [torch.empty_like(x) for x in inputs]
    for member in range(_members(part)):
        own = slice(member, None, _members(part))
        with torch.enable_grad():
            q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
            z = _mixed_by_members(part, layer, q, k, v, member)
            for whole, some in zip(out, torch.autograd.grad(z, leaves, gradient[:, own]), strict=True):
                whole[:, own] = some[:, own]
    return out


def _members(part: FrozenTrace) -> int:
    """How many heads share keys and values."""
    return part.weights.n_heads // part.weights.W_K.shape[1]


def _mixed_by_members(part: FrozenTrace, layer: int, q: Tensor, k: Tensor, v: Tensor, member: int) -> Tensor:
    """z [B, Hkv, T, r] of one head of each group that shares keys and values: the model is run with that head's own."""
    own = slice(member, None, _members(part))
    z: Tensor = part.forward.apply(layer, q[None], k[None, :, own], v[None, :, own])
    return z[0][:, own]
