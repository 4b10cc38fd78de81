"""The weights of a transformer as the article writes them, checked once, for every part of the library to read."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import check_fields, describe, is_sharded, public, refuse_sharded
from pyfastcircuits.model.layers import Layers, LayerStack, stacked
from pyfastcircuits.model.weight_checks import check_weights
from pyfastcircuits.processes import ALONE, Processes

Positional = Literal["none", "standard", "shortformer", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
QKNorm = Literal["layernorm", "rmsnorm", "rmsnorm of all heads", "of a run"]
Weight = Literal["W_Q", "W_K", "W_V", "W_O"]
METADATA = "pyfastcircuits"  # under which a safetensors file keeps the options


@dataclass(frozen=True, eq=False)
class CircuitWeights:
    """The weights of a transformer's attention heads, embedding and unembedding, in TransformerLens' shapes.

    Vectors are rows (`x @ W`). L is the number of layers, H of heads, Hkv of key/value heads (query head h uses
    key/value head h // (H // Hkv)); d is d_model, r the size of queries and keys (d_head), s of values (d_value, nearly
    always r), V the size of the vocabulary and V' of the output's (d_vocab_out, nearly always V). The tensors are kept
    as views and never copied: the gains of norms (`ln_w`, `ln_post_w`, `ln_final_w`) join the weights as they are read.
    All share one device; all are float64, or each is float32 or bfloat16 and computed in float32. W_Q, W_K, W_V and W_O
    may be LayerStacks, for models that keep their layers apart. W_U may be sharded by its columns over processes, each
    of which then holds its own alone: distribute_tensor(W_U, mesh, [Shard(1)]) of torch, on a DeviceMesh of one
    dimension. `trace`, `sweep`, `order_losses`, `layer_marginals` and the ablations of paths, pairs, heads and layers
    take such weights, without gradients and called by all processes; so do `plan` and `composition_scores`.

    Args:
        W_E: [V, d].
        W_Q: [L, H, d, r].
        W_K: [L, Hkv, d, r].
        W_V: [L, Hkv, d, s].
        W_O: [L, H, s, d].
        W_U: [d, V'].
        W_pos: [n_ctx, d], for positional "standard" and "shortformer".
        positional: "none"; "standard" (W_pos added to the residual stream); "shortformer" (W_pos added to the inputs
            of W_Q and W_K only, after the norm); "rotary" (queries and keys rotated).
        attention_scale: attention scores are divided by it, or by each layer's own of L; sqrt(r) if None.
        norm: None, "layernorm" or "rmsnorm", before every layer's heads and before W_U.
        norm_before_heads: False where heads read the residual stream as it is, and the norm is that before W_U alone.
        eps: of the norm.
        b_Q: [L, H, r]; b_K: [L, Hkv, r]; b_V: [L, Hkv, s]; b_O: [L, d]; b_U: [V']: optional biases.
        ln_w, ln_b: [L, d], gain and bias of the norm before each layer's heads; None where they are folded.
        ln_final_w, ln_final_b: [d], gain and bias of the norm before W_U.
        ln_post_w: [L, d], gain of a second RMS norm, which the sum of a layer's heads goes through (Gemma 2).
        qk_norm: the norm that queries and keys go through before they rotate: "layernorm" or "rmsnorm" of each head, or
            "rmsnorm of all heads" together (OLMo 2). "of a run": queries and keys come through something that
            these weights do not hold (DeepSeek's norms of latents), and there are no tables of them.
        qk_eps: of that norm.
        ln_q_w, ln_q_b: [L, 1 or H, r], its gain and bias for queries; ln_k_w, ln_k_b: [L, 1 or Hkv, r], for keys.
        sinks: [L, H], a score that takes its share of each row of a pattern and that no source has (GPT-OSS): rows then
            sum to less than 1.
        embed_scale: embeddings are multiplied by it.
        write_scale: what a layer's heads write to the residual stream, with its bias, is multiplied by it (Granite).
        logit_cap: logits x become cap * tanh(x / cap), after everything that is linear.
        attention_only: whether these weights are the whole model. A model with MLPs, or with patterns that these
            weights do not make, is not: `trace` needs the model itself.
        rotary_dim: how many of the r dimensions rotate; r if None.
        rotary_base: the base of the rotary angles: pair i turns rotary_base ** (-2 i / rotary_dim) radians a position.
        rotary_frequencies: [n] or [L, n] in float32 or float64, the radians a position of each of n = rotary_dim / 2
            pairs, in place of rotary_base; zero where a layer does not rotate.
        rotary_scale: rotated queries and rotated keys are multiplied by it (YaRN's attention factor).
        rotary_pairs: which dimensions turn together: "halves", i with n + i, or "adjacent", 2 i with 2 i + 1.
        rotary_length: the longest sequence that turns so, where the model turns longer ones otherwise.

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
    attention_scale: float | Sequence[float] | None = None
    norm: Norm | None = None
    norm_before_heads: bool = True
    eps: float = 1e-5
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    b_V: Tensor | None = None
    b_O: Tensor | None = None
    b_U: Tensor | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10_000.0
    rotary_frequencies: Tensor | None = None
    rotary_scale: float = 1.0
    rotary_pairs: Literal["halves", "adjacent"] = "halves"
    rotary_length: int | None = None
    ln_w: Tensor | None = None
    ln_b: Tensor | None = None
    ln_final_w: Tensor | None = None
    ln_final_b: Tensor | None = None
    ln_post_w: Tensor | None = None
    qk_norm: QKNorm | None = None
    qk_eps: float = 1e-6
    ln_q_w: Tensor | None = None
    ln_q_b: Tensor | None = None
    ln_k_w: Tensor | None = None
    ln_k_b: Tensor | None = None
    sinks: Tensor | None = None
    embed_scale: float = 1.0
    write_scale: float = 1.0
    logit_cap: float | None = None
    attention_only: bool = True

    def __post_init__(self) -> None:
        """Check options, shapes and values."""
        check_fields(self, sharded="W_U")
        check_weights(self)

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
    def d_value(self) -> int:
        """s."""
        return self.W_V.shape[3]

    @property
    def d_vocab(self) -> int:
        """V."""
        return self.W_E.shape[0]

    @property
    def d_vocab_out(self) -> int:
        """V', the size of the vocabulary that is predicted."""
        return self.W_U.shape[1]

    @property
    def sharded(self) -> bool:
        """Whether W_U is sharded over processes."""
        return is_sharded(self.W_U)

    @property
    def tied(self) -> bool:
        """Whether W_U is a view of W_E."""
        return not self.sharded and self.W_U.data_ptr() == self.W_E.data_ptr()

    @property
    def holders(self) -> Processes:
        """The processes that hold columns of W_U each; this one alone where it is whole."""
        return Processes.of(self.W_U.device_mesh) if self.sharded else ALONE  # type: ignore[attr-defined]

    @property
    def own_W_U(self) -> Tensor:
        """The columns of W_U that this process holds: all of them, unless it is sharded."""
        return self.W_U.to_local() if self.sharded else self.W_U  # type: ignore[attr-defined]

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
        stacks = ([weight] if isinstance(weight, Tensor) else weight.held for _, weight in self.tensors())
        return any(tensor.requires_grad for stack in stacks for tensor in stack)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of results: float64 for float64 weights, else float32."""
        return torch.float64 if self.W_E.dtype == torch.float64 else torch.float32

    @public
    def score_scale(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        self.check_layer(layer)
        own = self.attention_scale
        return 1 / (self.d_head**0.5 if own is None else own if isinstance(own, float) else own[layer])

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

        Rows of an attention pattern sum to 1 (without sinks), so a value bias reaches the residual stream whole,
        whatever the heads attend to (before the scale of a norm after the heads).
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
        """The whole bias of the logits, [V']: b_U plus ln_final_b @ W_U; None without either."""
        total = None if self.b_U is None else self.b_U.to(self.compute_dtype)
        if self.ln_final_b is not None:
            bias = self.ln_final_b.to(self.compute_dtype)
            own = torch.cat([bias @ part.to(self.compute_dtype) for part in self.own_W_U.split(8192, 1)])
            moved = self.holders.joined(own, self.d_vocab_out)
            total = moved if total is None else total + moved
        return total

    def unembed_bias(self, tokens: Tensor) -> Tensor | None:
        """The entries of `whole_unembed_bias` for some tokens [n], [n]."""
        if self.sharded:
            whole: Tensor | None = self.whole_unembed_bias()
            return None if whole is None else whole[tokens]
        total = None if self.b_U is None else self.b_U[tokens].to(self.compute_dtype)
        if self.ln_final_b is not None:
            moved = self.ln_final_b.to(self.compute_dtype) @ self.W_U.mT[tokens].mT.to(self.compute_dtype)
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
    def check_one_vocabulary(self, why: str) -> None:
        """Raise ValueError, which says why, unless the tokens that are predicted are those that are read."""
        if self.d_vocab_out != self.d_vocab:
            raise ValueError(f"d_vocab_out is {self.d_vocab_out}, but d_vocab is {self.d_vocab}: {why}")

    @public
    def gain(self, name: str, layer: int) -> Tensor | None:
        """The gain of a norm on the residual side of a weight: [d, 1] of a reader, [d] of a writer."""
        self.check_layer(layer)
        return self._gain(name, layer)

    def _gain(self, name: str, layer: int) -> Tensor | None:
        gains = self.ln_post_w if name == "W_O" else self.ln_w
        if name == "W_O" and self.write_scale != 1:
            everywhere = self.W_E.new_full((self.d_model,), self.write_scale, dtype=self.compute_dtype)
            return everywhere if gains is None else gains[layer] * everywhere
        if gains is None:
            return None
        gain = gains[layer].to(self.compute_dtype)
        return gain if name == "W_O" else gain[:, None]

    @public
    def to(self, target: torch.device | torch.dtype | str) -> "CircuitWeights":
        """The same weights on another device or in another dtype.

        Raises:
            ValueError: no such device; a device, where W_U is sharded.
        """
        of_dtype = isinstance(target, torch.dtype)
        if self.sharded and not of_dtype:
            raise ValueError(f"target is {describe(target)}, but W_U is sharded: weights move before they are sharded")
        try:
            moved: dict[str, Any] = {
                name: tensor.to(target)
                for name, tensor in self.tensors()
                if not (of_dtype and name == "rotary_frequencies")
            }
        except RuntimeError as error:
            raise ValueError(f"target is {describe(target)}: {error}") from error
        return replace(self, **moved)

    @public
    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a safetensors file that load_weights reads; `half`: in float16, which load_weights makes float32 of."""
        try:
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError("save needs the safetensors package: pip install safetensors") from error

        if self.sharded:
            refuse_sharded("self", CircuitWeights.save)
        tensors = {name: stacked(weight).contiguous() for name, weight in self.tensors()}
        tensors = {name: tensor.half() for name, tensor in tensors.items()} if half else tensors
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        options = {name: value for name, value in others.items() if not name.startswith(("W_", "b_", "ln_"))}
        try:
            save_file(tensors, path, metadata={METADATA: json.dumps(options)})
        except (SafetensorError, OSError, ValueError) as error:
            raise OSError(f"path is {describe(str(path))}, which cannot be written: {error}") from error
