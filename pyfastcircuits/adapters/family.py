"""The description of a family of Hugging Face models: the names of its modules, and what is particular about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pyfastcircuits.adapters.checkpoint import Checkpoint
from pyfastcircuits.model.weights import Norm, QKNorm

Kind = Literal["Q", "K", "V"]
Interface = Literal["transformers", "sdpa", "products"]
Split = Callable[[Tensor, Kind, int, int], Tensor]


def biases_if(c: Checkpoint, option: str, default: bool, which: str = "QKVO") -> str:
    """These biases, see Family, if an option is on."""
    return which if c.option(option, default) else ""


@dataclass(frozen=True)
class Family:
    """What is particular about a family, as differences from Llama. To add one, see CONTRIBUTING.md.

    Attributes:
        body: the module below the one with the output embedding; tensor names start with its name.
        embedding, positions, final_norm: in the body. Position 0 is row `first_position` of the positions.
        embedding_norm: the layernorm that embeddings go through.
        layers: the list of layers in the body.
        norm: the norm before a layer's heads, or several names of it; None where they read the residual stream as is.
        post_norm: the norm in a layer through which the attention's write goes, if there is one.
        attention: the attention in a layer, which returns (its write to the residual stream, its pattern).
        queries, keys, values, out: its projections, each a Linear; or, if `joint` is given, that of all three.
        split: the rows of a projection [out, ...] that make queries, keys or values, by heads: [n, r, ...].
        transposed: whether projections are kept as [in, out].
        query_norm, key_norm: the norms of queries and of keys in the attention, where a model has them.
        qk_norms: whether a model on disk has them.
        latent_norms: RMS norms within the way to queries, keys and values; the last one is that of values (DeepSeek).
        read_heads: reads W_Q, W_K, W_V and their biases, where they are no projections of their own.
        norm_kind, qk_norm_kind: layernorms or RMS norms.
        norm_parts: the parameters of the norms of the residual stream.
        gain: what is added to the gains of norms.
        heads: the option that holds the number of heads.
        key_heads: the number of key/value heads.
        rotary: whether queries and keys rotate.
        rotary_pairs: see CircuitWeights.
        rotary_share, rotary_base: the share of a head's dimensions that rotate, and the base of their angles, if the
            configuration does not say.
        scaled_rotary: whether layers rotate otherwise than one base says even where the configuration leaves that out.
        rotates: whether a layer's do.
        head: the output embedding.
        logit_scale: what the logits are multiplied by.
        scales_queries: whether queries are scaled before they are multiplied by keys.
        interface: the function through which attention goes: that of "transformers" (its attention interface), torch's
            "sdpa"; or none, and two "products", with patterns among what the attention returns.
        adds_residual: whether the attention adds the residual stream to what it writes.
        check: raises ValueError for options that are not supported.
        options: more arguments of CircuitWeights, from what is read and what has been found.
        eps, default_eps: the options that may hold the eps of norms, and its default.
        biases: which of queries, keys and values ("QKV"), of what heads write ("O") and of logits ("U") have biases in
            a model on disk; one in memory says so itself.
        tied: whether a model on disk has one matrix for both embeddings, if its configuration does not say.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    first_position: int = 0
    embedding_norm: str | None = None
    layers: str = "layers"
    norm: str | tuple[str, ...] | None = "input_layernorm"
    post_norm: str | None = None
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    out: str = "o_proj"
    joint: str | None = None
    split: Split = lambda rows, kind, heads, kv: rows.unflatten(0, (heads if kind == "Q" else kv, -1))
    transposed: bool = False
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    qk_norms: Callable[[Checkpoint], bool] = lambda c: False
    latent_norms: tuple[str, ...] = ()
    read_heads: "Callable[[Family, Checkpoint], dict[str, Any]] | None" = None
    norm_kind: Norm = "rmsnorm"
    qk_norm_kind: QKNorm = "rmsnorm"
    norm_parts: tuple[str, ...] = ("weight",)
    gain: float = 0.0
    final_norm: str = "norm"
    heads: str = "num_attention_heads"
    key_heads: Callable[[Checkpoint, int], int] = lambda c, heads: int(c.option("num_key_value_heads", heads))
    rotary: Callable[[Checkpoint], bool] = lambda c: True
    rotary_pairs: Literal["halves", "adjacent"] = "halves"
    rotary_share: float = 1.0
    rotary_base: float = 10_000.0
    scaled_rotary: bool = False
    rotates: Callable[[Checkpoint, int], bool] = lambda c, layer: True
    head: str = "lm_head"
    logit_scale: Callable[[Checkpoint], float] = lambda c: 1.0
    scales_queries: bool = False
    interface: Interface = "transformers"
    adds_residual: bool = False
    check: Callable[[Checkpoint], None] = lambda c: None
    options: Callable[[Checkpoint, dict[str, Any]], dict[str, Any]] = lambda c, found: {}
    eps: tuple[str, ...] = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    default_eps: float = 1e-6
    biases: Callable[[Checkpoint], str] = lambda c: biases_if(c, "attention_bias", False)
    tied: bool = False

    def layer(self, part: str) -> str:
        """The name of a part of a layer, with `{}` for the number of the layer."""
        return f"{self.body}.{self.layers}.{{}}.{part}"

    def in_attention(self, part: str) -> str:
        """The name of a part of a layer's attention, likewise."""
        return self.layer(f"{self.attention}.{part}")

    def counts(self, c: Checkpoint) -> tuple[int, int]:
        """The numbers of heads and of key/value heads."""
        heads = int(c.first_option(self.heads, "num_attention_heads", "n_head"))
        return heads, self.key_heads(c, heads)
