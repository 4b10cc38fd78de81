"""The weights of a transformer as the article writes them, checked once, for every part of the library to read."""

import json
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import check_fields, describe, public
from pyfastcircuits.model.layers import Layers, LayerStack, stacked
from pyfastcircuits.shapes import DTYPES, check_positive

Positional = Literal["none", "standard", "shortformer", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
Weight = Literal["W_Q", "W_K", "W_V", "W_O"]
METADATA = "pyfastcircuits"  # under which a safetensors file keeps the options


@dataclass(frozen=True, eq=False)
class CircuitWeights:
    """The weights of a transformer's attention heads, embedding and unembedding, in TransformerLens' shapes.

    Vectors are rows (`x @ W`). L is the number of layers, H of heads, Hkv of key/value heads (query head h uses
    key/value head h // (H // Hkv)); d is d_model, r d_head, V the size of the vocabulary. The tensors are kept as views
    and never copied: the gains of norms (`ln_w`, `ln_post_w`, `ln_final_w`) join the weights as they are read. All
    share one device and one dtype (float32, float64 or bfloat16, which is computed in float32). W_Q, W_K, W_V and W_O
    may be LayerStacks, for models that keep their layers apart.

    Args:
        W_E: [V, d].
        W_Q: [L, H, d, r].
        W_K: [L, Hkv, d, r].
        W_V: [L, Hkv, d, r].
        W_O: [L, H, r, d].
        W_U: [d, V].
        W_pos: [n_ctx, d], for positional "standard" and "shortformer".
        positional: "none"; "standard" (W_pos added to the residual stream); "shortformer" (W_pos added to the inputs
            of W_Q and W_K only, after the norm); "rotary" (queries and keys rotated).
        attention_scale: attention scores are divided by it; sqrt(r) if None.
        norm: None, "layernorm" or "rmsnorm", before every layer's heads and before W_U.
        eps: of the norm.
        b_Q: [L, H, r]; b_K, b_V: [L, Hkv, r]; b_O: [L, d]; b_U: [V]: optional biases.
        ln_w, ln_b: [L, d], gain and bias of the norm before each layer's heads; None where they are folded.
        ln_final_w, ln_final_b: [d], gain and bias of the norm before W_U.
        ln_post_w: [L, d], gain of a second RMS norm, which the sum of a layer's heads goes through (Gemma 2).
        embed_scale: embeddings are multiplied by it.
        logit_cap: logits x become cap * tanh(x / cap), after everything that is linear.
        attention_only: whether these weights are the whole model. A model with MLPs, or with patterns that these
            weights do not make, is not: `trace` needs the model itself.
        rotary_dim: how many of the r dimensions rotate (first half against second half); r if None.
        rotary_base: the base of the rotary angles.

    Raises:
        ValueError: a shape does not fit (the message names it, with both values), a weight is not finite, an option is
            unknown.
        TypeError: a dtype is not supported, or differs from that of W_E.
    """

    W_E: Tensor
    W_Q: Layers
    W_K: Layers
    W_V: Layers
    W_O: Layers
    W_U: Tensor
    W_pos: Tensor | None = None
    _: KW_ONLY
    positional: Positional = "none"
    attention_scale: float | None = None
    norm: Norm | None = None
    eps: float = 1e-5
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    b_V: Tensor | None = None
    b_O: Tensor | None = None
    b_U: Tensor | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10_000.0
    ln_w: Tensor | None = None
    ln_b: Tensor | None = None
    ln_final_w: Tensor | None = None
    ln_final_b: Tensor | None = None
    ln_post_w: Tensor | None = None
    embed_scale: float = 1.0
    logit_cap: float | None = None
    attention_only: bool = True

    def __post_init__(self) -> None:
        """Check options, shapes and values."""
        check_fields(self)
        self._check_options()
        self._check_shapes()
        for name, weight in self.tensors():
            if isinstance(weight, Tensor):
                _check_values(name, weight, self.W_E)
            else:
                for layer, tensor in enumerate(weight):
                    _check_values(f"{name}[{layer}]", tensor, self.W_E)

    @classmethod
    def from_model(cls, model: Any) -> "CircuitWeights":
        """The circuits of another library's model, as views of its weights; `pyfastcircuits.adapters` lists the models.

        float16 weights are converted to float32, exactly.

        Raises:
            TypeError: the argument is not a model.
            ValueError: a part of the model is not supported; the message says which.
        """
        from pyfastcircuits.adapters.tracing import weights_of

        return weights_of(model)

    def tensors(self) -> Iterator[tuple[str, Layers]]:
        """Name and tensor of every weight there is."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, LayerStack)):
                yield field.name, value

    @property
    def n_layers(self) -> int:
        """L."""
        return self.W_Q.shape[0]

    @property
    def n_heads(self) -> int:
        """H."""
        return self.W_Q.shape[1]

    @property
    def d_model(self) -> int:
        """d."""
        return self.W_E.shape[1]

    @property
    def d_head(self) -> int:
        """r."""
        return self.W_Q.shape[3]

    @property
    def d_vocab(self) -> int:
        """V."""
        return self.W_E.shape[0]

    @property
    def n_ctx(self) -> int | None:
        """The number of positions in W_pos; None without one."""
        return None if self.W_pos is None else self.W_pos.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_E.device

    @property
    def learns(self) -> bool:
        """Whether some of the weights require gradients."""
        stacks = ([weight] if isinstance(weight, Tensor) else weight for _, weight in self.tensors())
        return any(tensor.requires_grad for stack in stacks for tensor in stack)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of results: float32 for bfloat16 weights, else the weights' own."""
        return torch.float32 if self.W_E.dtype == torch.bfloat16 else self.W_E.dtype

    @public
    def layer(self, name: Weight, layer: int) -> Tensor:
        """One layer's weight with the gain of its norm, in the computing dtype, by heads as stored: [H or Hkv, ...]."""
        self.check_layer(layer)
        return self._with_gain(getattr(self, name)[layer], name, layer)

    @public
    def heads(self, name: Weight, layer: int) -> Tensor:
        """One layer's weight for every query head, as `layer`: [H, d, r], or [H, r, d] for W_O."""
        return self._repeated(self.layer(name, layer))

    @public
    def head(self, name: Weight, layer: int, head: int) -> Tensor:
        """The weight of one query head, as `layer`: [d, r], or [r, d] for W_O."""
        self.check_layer(layer)
        if not 0 <= head < self.n_heads:
            raise IndexError(f"head is {head}, expected 0 to {self.n_heads - 1}")
        stored: Layers = getattr(self, name)
        return self._with_gain(stored[layer, head // (self.n_heads // stored.shape[1])], name, layer)

    @public
    def bias(self, name: Literal["Q", "K", "V"], layer: int) -> Tensor | None:
        """The whole bias of a layer's queries, keys or values, [H or Hkv, r]: b_Q, b_K or b_V, and ln_b @ W."""
        self.check_layer(layer)
        own: Tensor | None = getattr(self, f"b_{name}")
        total = None if own is None else own[layer].to(self.compute_dtype)
        if self.ln_b is not None:
            weight: Tensor = getattr(self, f"W_{name}")[layer].to(self.compute_dtype)
            moved = torch.einsum("d,hdr->hr", self.ln_b[layer].to(self.compute_dtype), weight)
            total = moved if total is None else total + moved
        return total

    @public
    def written_bias(self, layer: int) -> Tensor:
        """A layer's constant write to every position, b_O plus every head's value bias @ W_O, [d].

        Rows of an attention pattern sum to 1, so a value bias reaches the residual stream whole, whatever the heads
        attend to (before the scale of a norm after the heads).
        """
        total = self.head_biases(layer).sum(0)
        return total if self.b_O is None else total + self._with_gain(self.b_O[layer], "W_O", layer)

    @public
    def head_biases(self, layer: int) -> Tensor:
        """Every head's value bias @ W_O, [H, d]; zeros without one."""
        bias = self.bias("V", layer)
        if bias is None:
            return torch.zeros(self.n_heads, self.d_model, dtype=self.compute_dtype, device=self.device)
        return torch.einsum("hr,hrd->hd", self._repeated(bias), self.heads("W_O", layer))

    @public
    def whole_unembed_bias(self) -> Tensor | None:
        """The whole bias of the logits, [V]: b_U plus ln_final_b @ W_U; None without either."""
        total = None if self.b_U is None else self.b_U.to(self.compute_dtype)
        if self.ln_final_b is not None:
            bias = self.ln_final_b.to(self.compute_dtype)
            moved = torch.cat([bias @ part.to(self.compute_dtype) for part in self.W_U.split(8192, 1)])
            total = moved if total is None else total + moved
        return total

    def _repeated(self, stored: Tensor) -> Tensor:
        """A tensor of heads or key/value heads [H or Hkv, ...], repeated for every query head [H, ...]."""
        return stored if len(stored) == self.n_heads else stored.repeat_interleave(self.n_heads // len(stored), 0)

    def _with_gain(self, weight: Tensor, name: Weight, layer: int) -> Tensor:
        """A part of a layer's weight, or what is added to its product, in the computing dtype and with the gain."""
        gain = self._gain(name, layer)
        return weight.to(self.compute_dtype) if gain is None else weight.to(self.compute_dtype) * gain

    @public
    def check_layer(self, layer: int) -> None:
        """Raise IndexError unless there is such a layer."""
        if not self.n_layers:
            raise IndexError(f"layer is {layer}, but the model has no layers")
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer is {layer}, expected 0 to {self.n_layers - 1}")

    @public
    def gain(self, name: str, layer: int) -> Tensor | None:
        """The gain of a norm on the residual side of a weight: [d, 1] of a reader, [d] of a writer."""
        self.check_layer(layer)
        return self._gain(name, layer)

    def _gain(self, name: str, layer: int) -> Tensor | None:
        gains = self.ln_post_w if name == "W_O" else self.ln_w
        if gains is None:
            return None
        gain = gains[layer].to(self.compute_dtype)
        return gain if name == "W_O" else gain[:, None]

    @public
    def to(self, target: torch.device | torch.dtype | str) -> "CircuitWeights":
        """The same weights on another device or in another dtype.

        Raises:
            ValueError: no such device.
        """
        try:
            moved: dict[str, Any] = {name: tensor.to(target) for name, tensor in self.tensors()}
        except RuntimeError as error:
            raise ValueError(f"target is {describe(target)}: {error}") from error
        return replace(self, **moved)

    @public
    def save(self, path: str | Path) -> None:
        """Write a safetensors file that load_weights reads."""
        try:
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError("save needs the safetensors package: pip install safetensors") from error

        options = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith(("W_", "b_", "ln_"))}
        tensors = {name: stacked(weight).contiguous() for name, weight in self.tensors()}
        try:
            save_file(tensors, path, metadata={METADATA: json.dumps(options)})
        except (SafetensorError, OSError, ValueError) as error:
            raise OSError(f"path is {describe(str(path))}, which cannot be written: {error}") from error

    def _check_options(self) -> None:
        if (self.W_pos is not None) != (self.positional in ("standard", "shortformer")):
            state = "missing" if self.W_pos is None else "given"
            raise ValueError(f"W_pos is {state}, but positional is {self.positional!r}")
        check_positive("attention_scale", self.attention_scale)
        if not self.eps >= 0:
            raise ValueError(f"eps is {self.eps}, expected a number of at least 0")
        check_positive("logit_cap", self.logit_cap)
        check_positive("rotary_base", self.rotary_base)
        given = [name for name, _ in self.tensors() if name.startswith("ln_")]
        if given and self.norm is None:
            raise ValueError(f"{given[0]} is given, but norm is None")
        held = self.ln_w is not None or self.ln_b is not None
        if held and self.positional == "shortformer" and self.attention_only:
            name = "ln_b" if self.ln_w is None else "ln_w"
            raise ValueError(f"{name} is given, but positional is 'shortformer': W_pos, added after the norm, has none")
        if self.ln_post_w is not None and (self.norm != "rmsnorm" or self.attention_only):
            raise ValueError(
                f"ln_post_w is given, but norm is {self.norm!r} and attention_only {self.attention_only}: "
                "a norm after the heads is an RMS norm, and its scale comes from a run of the model"
            )

    def _check_shapes(self) -> None:
        for name, rank in (("W_E", 2), ("W_Q", 4), ("W_K", 4)):
            tensor = getattr(self, name)
            if tensor.dim() != rank:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {rank} dimensions")
        vocabulary, d = self.W_E.shape
        layers, heads, _, r = self.W_Q.shape
        kv = self.W_K.shape[1]
        if vocabulary == 0 or d == 0 or heads == 0 or r == 0 or kv == 0 or heads % kv:
            raise ValueError(
                f"W_E is {list(self.W_E.shape)}, W_Q {list(self.W_Q.shape)} and W_K {list(self.W_K.shape)}: sizes must "
                "not be zero, and W_Q's heads a multiple of W_K's"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "W_Q": (layers, heads, d, r), "W_K": (layers, kv, d, r), "W_V": (layers, kv, d, r),
            "W_O": (layers, heads, r, d), "W_U": (d, vocabulary),
            "b_Q": (layers, heads, r), "b_K": (layers, kv, r), "b_V": (layers, kv, r),
            "b_O": (layers, d), "b_U": (vocabulary,),
            "ln_w": (layers, d), "ln_b": (layers, d), "ln_final_w": (d,), "ln_final_b": (d,), "ln_post_w": (layers, d),
        }  # fmt: skip
        if self.W_pos is not None:
            shapes["W_pos"] = (len(self.W_pos), d)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected {list(shape)} "
                    f"(W_E is {list(self.W_E.shape)}, W_Q {list(self.W_Q.shape)}, W_K {list(self.W_K.shape)})"
                )
        if self.rotary_dim is not None and not (0 < self.rotary_dim <= r and self.rotary_dim % 2 == 0):
            raise ValueError(f"rotary_dim is {self.rotary_dim}, expected an even number of at most d_head = {r}")
        if self.positional == "rotary" and self.rotary_dim is None and r % 2:
            raise ValueError(f"W_Q has d_head {r}; rotary positions need an even one, or rotary_dim")


def _check_values(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, but W_E has {like.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but W_E is on {like.device}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, expected a device that holds values")
    in_memory = tensor.detach().permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # 15 times faster
    if tensor.numel() and not all(bound.isfinite() for bound in in_memory.aminmax()):
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {tensor[tuple(place)].item()}: weights must be finite")
