"""Latent attention (DeepSeek): queries, keys and values are made of small latents, each behind an RMS norm of its own.

The scale of the values' latent norm is frozen like that of any norm. W_V is the product of both projections, a layer at
a time: it reads the residual stream with the latent norm's gain in it. W_Q and W_K likewise; their norms' scales are
known of a run alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.adapters.family import Family
from pyfastcircuits.model.layers import Deferred, LayerStack


def heads(family: Family, c: Checkpoint) -> dict[str, Any]:
    """W_Q, W_K and W_V [L, H, d, r or s], rotating dimensions first."""
    d, H, _ = c.option("hidden_size"), *family.counts(c)
    still, turning, s = (int(c.option(name)) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if c.config.get("attention_bias"):
        raise ValueError(f"{c.where}: attention_bias is True, and biases in front of a norm of latents are unsupported")
    make = _Layer(family, c, H, still, turning)
    like = c.tensor(family.in_attention("kv_a_proj_with_mqa.weight").format(0))
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    sizes = {"Q": still + turning, "K": still + turning, "V": s}
    return {
        f"W_{kind}": LayerStack(
            [
                Deferred(partial(getattr(make, kind), layer), torch.Size((H, d, size)), dtype, like.device)
                for layer in range(c.n_layers)
            ]
        )
        for kind, size in sizes.items()
    }


class _Layer:
    """The products of one layer's projections."""

    def __init__(self, family: Family, c: Checkpoint, H: int, still: int, turning: int) -> None:
        self.family, self.c, self.H, self.still, self.turning = family, c, H, still, turning

    def _tensor(self, part: str, layer: int) -> Tensor:
        return self.c.tensor(self.family.in_attention(part).format(layer))

    def Q(self, layer: int) -> Tensor:
        """[H, d, r]."""
        if self.c.has(self.family.in_attention("q_proj.weight").format(layer)):
            rows = self._tensor("q_proj.weight", layer)
        else:
            second, gain = self._tensor("q_b_proj.weight", layer), self._tensor("q_a_layernorm.weight", layer)
            rows = (second * gain) @ self._tensor("q_a_proj.weight", layer)
        by_head = rows.unflatten(0, (self.H, -1)).mT
        return torch.cat((by_head[..., self.still :], by_head[..., : self.still]), -1)

    def K(self, layer: int) -> Tensor:
        """[H, d, r]: all heads share what turns."""
        latent, turning = self._first(layer)
        return torch.cat((turning.mT.expand(self.H, -1, -1), (self._second(layer)[:, : self.still] @ latent).mT), -1)

    def V(self, layer: int) -> Tensor:
        """[H, d, s]."""
        return (self._second(layer)[:, self.still :] @ self._first(layer)[0]).mT

    def _first(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of latents, and of the keys that turn: [l, d], [turning, d]."""
        joint = self._tensor("kv_a_proj_with_mqa.weight", layer)
        return joint[: -self.turning], joint[-self.turning :]

    def _second(self, layer: int) -> Tensor:
        """From latents to keys that stand still and values, with the gain of the norm: [H, still + s, l]."""
        rows, gain = self._tensor("kv_b_proj.weight", layer), self._tensor("kv_a_layernorm.weight", layer)
        by_head: Tensor = (rows * gain).unflatten(0, (self.H, -1))
        return by_head
