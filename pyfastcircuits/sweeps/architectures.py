"""The sizes of models, which are all that the cost of a sweep depends on; those of published models by name."""

from dataclasses import dataclass

from pyfastcircuits.model.weights import CircuitWeights


@dataclass(frozen=True)
class Architecture:
    """The sizes of a transformer.

    Attributes:
        name: of the model.
        layers, heads, kv_heads: L, H, Hkv.
        d_model, d_head, vocabulary: d, r, V.
        d_mlp: the width of each layer's MLP; 0 in attention-only models.
        context: the number of positions.
        gated: whether an MLP has a third matrix, as Llama's.
        biased: whether attention and MLP have biases.
        positions: the number of learned positions.
        tied: whether W_U is W_E.
        normed: whether there are norms; `norm_biased`, and whether they have biases.
    """

    name: str
    layers: int
    heads: int
    d_model: int
    d_head: int
    vocabulary: int
    context: int
    kv_heads: int
    d_mlp: int = 0
    gated: bool = False
    biased: bool = False
    positions: int = 0
    tied: bool = False
    normed: bool = True
    norm_biased: bool = False

    @staticmethod
    def of(weights: CircuitWeights, name: str) -> "Architecture":
        """The sizes of weights; an MLP, which they do not hold, is taken to be four times as wide as the model."""
        return Architecture(
            name, weights.n_layers, weights.n_heads, weights.d_model, weights.d_value, weights.d_vocab_out,
            context=weights.n_ctx or 0, kv_heads=weights.W_V.shape[1], positions=weights.n_ctx or 0,
            d_mlp=0 if weights.attention_only else 4 * weights.d_model, biased=weights.b_O is not None,
            tied=weights.tied, normed=weights.norm is not None, norm_biased=weights.norm == "layernorm",
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        """The number of weights."""
        d, queries, keys = self.d_model, self.heads * self.d_head, self.kv_heads * self.d_head
        attention = 2 * d * queries + 2 * d * keys + self.biased * (queries + 2 * keys + d)
        mlp = (2 + self.gated) * d * self.d_mlp + self.biased * (self.d_mlp + d) * (self.d_mlp > 0)
        norms = self.normed * (1 + self.norm_biased) * d
        layer = attention + mlp + (2 if self.d_mlp else 1) * norms
        return (2 - self.tied) * self.vocabulary * d + self.positions * d + self.layers * layer + norms


def _gpt2(name: str, layers: int, heads: int) -> Architecture:
    return Architecture(
        name, layers, heads, 64 * heads, 64, 50257, 1024, kv_heads=heads, d_mlp=256 * heads,
        biased=True, positions=1024, tied=True, norm_biased=True,
    )  # fmt: skip


def _pythia(name: str, layers: int, heads: int, d: int, vocabulary: int = 50304) -> Architecture:
    return Architecture(
        name, layers, heads, d, d // heads, vocabulary, 2048, kv_heads=heads, d_mlp=4 * d,
        biased=True, norm_biased=True,
    )  # fmt: skip


ARCHITECTURES = {
    model.name: model
    for model in (
        _gpt2("gpt2", 12, 12),
        _gpt2("gpt2-medium", 24, 16),
        _gpt2("gpt2-large", 36, 20),
        _gpt2("gpt2-xl", 48, 25),
        _pythia("pythia-70m", 6, 8, 512),
        _pythia("pythia-160m", 12, 12, 768),
        _pythia("pythia-410m", 24, 16, 1024),
        _pythia("pythia-1b", 16, 8, 2048),
        _pythia("pythia-1.4b", 24, 16, 2048),
        _pythia("pythia-2.8b", 32, 32, 2560),
        _pythia("pythia-6.9b", 32, 32, 4096, 50432),
        _pythia("pythia-12b", 36, 40, 5120, 50688),
        Architecture("llama-3-8b", 32, 32, 4096, 128, 128256, 8192, kv_heads=8, d_mlp=14336, gated=True),
        Architecture("llama-3-70b", 80, 64, 8192, 128, 128256, 8192, kv_heads=8, d_mlp=28672, gated=True),
    )
}
