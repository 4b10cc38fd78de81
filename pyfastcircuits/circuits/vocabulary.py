"""What weights alone say of a head or of a pair: circuits over the vocabulary, their spectra, and virtual weights.

Row-vector convention. Over the vocabulary V the circuits are rank r and kept factored: nothing [V, V] is formed
("A Mathematical Framework for Transformer Circuits", Elhage et al. 2021). Weights are read as they are: with a
layernorm, `center` them first, so that its subtraction of the mean is in them. What norms multiply by is in them.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.circuits.composition import KINDS, Head, Kind, checked_head
from pyfastcircuits.model.factored import FactoredMatrix, computable
from pyfastcircuits.model.weights import CircuitWeights, Weight
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.run.forward import centered, norm_scale, rotate
from pyfastcircuits.run.paths import checked_path
from pyfastcircuits.run.trace import FrozenTrace

__all__ = [
    "DiagonalStatistics",
    "VirtualHead",
    "bigrams",
    "circuit_eigenvalues",
    "composed_eigenvalues",
    "composed_qk_circuit",
    "copying_scores",
    "diagonal_statistics",
    "effective_rank",
    "ov_circuit",
    "positivity",
    "qk_circuit",
    "qk_positivity",
    "trace_ratios",
    "virtual_head",
    "virtual_weights",
]

Component = Sequence[int] | Literal["embed", "unembed"]


def _embedded(weights: CircuitWeights, W: Tensor) -> Tensor:
    """The embedded tokens through a reading weight [d, r]: [V, r]."""
    read = weights.W_E.to(weights.compute_dtype) @ W
    return read if weights.embed_scale == 1 else read * weights.embed_scale


def _unembedded(weights: CircuitWeights, W: Tensor) -> Tensor:
    """A writing weight [r, d] to the logits: [r, V]."""
    return _to_logits(weights, W) @ weights.W_U.to(weights.compute_dtype)


def _to_logits(weights: CircuitWeights, written: Tensor) -> Tensor:
    """What is written, [..., d], times what the final norm multiplies by."""
    return written if weights.ln_final_w is None else written * weights.ln_final_w.to(written.dtype)


def read_embeddings(weights: CircuitWeights, normed: bool) -> Tensor:
    """The embedded tokens [V, d] in the computing dtype, each through the norm (without its parameters) if `normed`."""
    tokens = weights.W_E.to(weights.compute_dtype)
    tokens = tokens if weights.embed_scale == 1 else tokens * weights.embed_scale
    return centered(tokens, weights) * norm_scale(tokens, weights)[:, None] if normed else tokens


def queries_and_keys(
    weights: CircuitWeights, head: Head, stream: Tensor, *, scaled: bool, biased: bool, offset: int
) -> tuple[Tensor, Tensor]:
    """A head's queries [N, r], `offset` positions later than its keys [N, r], of the rows of a stream [N, d].

    Raises:
        ValueError: an offset below 0, or one above 0 where positions are not rotary.
    """
    if offset < 0 or (offset > 0 and weights.positional != "rotary"):
        least = "at least 0" if weights.positional == "rotary" else f"0: positional is {weights.positional!r}"
        raise ValueError(f"offset is {offset}, expected {least}")
    layer, index = head
    queries, keys = stream @ weights.head("W_Q", *head), stream @ weights.head("W_K", *head)
    if biased and (bias := weights.bias("Q", layer)) is not None:
        queries = queries + bias[index]
    if biased and (bias := weights.bias("K", layer)) is not None:
        keys = keys + bias[index // (weights.n_heads // len(bias))]
    if offset:
        queries = rotate(queries, weights, torch.tensor([offset], device=weights.device))
    return queries / ((weights.attention_scale or weights.d_head**0.5) if scaled else 1.0), keys


def bigrams(weights: CircuitWeights, *, normed: bool = False) -> FactoredMatrix:
    """The direct path W_E @ W_U [V, V]: row = present token, column = next token, in logits.

    `normed`: each embedding goes through the norm first. These are then, b_U apart, the logits of a model of no layers.
    """
    return FactoredMatrix(_to_logits(weights, read_embeddings(weights, normed)), weights.W_U.to(weights.compute_dtype))


def ov_circuit(weights: CircuitWeights, head: Sequence[int], *, normed: bool = False) -> FactoredMatrix:
    """W_E @ OV @ W_U [V, V]: what attending to a source token (row) adds to the logits of an output token (column).

    `normed`: each embedding goes through the norm first, as a first layer reads it (where positions are added to the
    residual stream, without them). The value bias and the final norm are not in it.

    Raises:
        ValueError, IndexError: no such head.
    """
    head = checked_head(weights, head)
    values = read_embeddings(weights, normed) @ weights.head("W_V", *head)
    return FactoredMatrix(values, _unembedded(weights, weights.head("W_O", *head)))


def qk_circuit(
    weights: CircuitWeights, head: Sequence[int], *, scaled: bool = False, normed: bool = False, offset: int = 0
) -> FactoredMatrix:
    """W_E @ QK @ W_E.T [V, V]: how much a destination token (row) attends to a source token (column).

    Biases and positions are not in it: `qk_tables` keeps those beside it. `scaled` divides by the attention scale,
    sqrt(r) by default; `normed` as in ov_circuit. With rotary positions the destination stands `offset` positions after
    the source.

    Raises:
        ValueError, IndexError: no such head.
        ValueError: an offset below 0, or one above 0 where positions are not rotary.
    """
    stream = read_embeddings(weights, normed)
    head = checked_head(weights, head)
    queries, keys = queries_and_keys(weights, head, stream, scaled=scaled, biased=False, offset=offset)
    return FactoredMatrix(queries, keys.mT)


def composed_qk_circuit(
    weights: CircuitWeights, source: Sequence[int], destination: Sequence[int], *, scaled: bool = False
) -> FactoredMatrix:
    """The K-composed QK circuit W_E @ QK2 @ OV1.T @ W_E.T [V, V] of two heads.

    Row: the token that destination's query is at. Column: the token that `source` had attended to where the key is;
    for an induction head after a previous-token head, the token before the key.

    Raises:
        ValueError: a source that is not in an earlier layer.
        IndexError: no such head.
    """
    first, second = checked_path(weights, (source, destination))
    scale = (weights.attention_scale or weights.d_head**0.5) if scaled else 1.0
    through = weights.head("W_O", *first) @ weights.head("W_K", *second)  # [r, r]
    keys = _embedded(weights, weights.head("W_V", *first)) @ through
    return FactoredMatrix(_embedded(weights, weights.head("W_Q", *second)) / scale, keys.mT)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Of [..., r, r]; LAPACK takes one matrix at a time, so threads take shares."""
    flat = matrices.flatten(0, -3)
    threads = min(torch.get_num_threads(), len(flat))
    if flat.device.type != "cpu" or threads < 2:
        return torch.linalg.eigvals(matrices)  # type: ignore[no-any-return]
    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(torch.linalg.eigvals, flat.chunk(threads)))).view(matrices.shape[:-1])


@torch.no_grad()
def circuit_eigenvalues(weights: CircuitWeights, circuit: Literal["OV", "QK"]) -> Tensor:
    """The nonzero eigenvalues of every head's full circuit over the vocabulary, complex [L, H, r], in no order.

    Those of W_E @ OV @ W_U ("OV") are those of the r x r matrix W_O @ (W_U @ W_E) @ W_V, with W_U @ W_E [d, d] made
    once; those of W_E @ QK @ W_E.T ("QK") are those of W_K.T @ (W_E.T @ W_E) @ W_Q.

    Raises:
        ValueError: another circuit.

    Source: "Summarizing OV/QK Matrices", Elhage et al. 2021.
    """
    if circuit not in ("OV", "QK"):
        raise ValueError(f"circuit is {circuit!r}, expected 'OV' or 'QK'")
    middle = _unembed_embed(weights) if circuit == "OV" else _embed_embed(weights)
    names: tuple[Literal["W_O", "W_K"], Literal["W_V", "W_Q"]]
    names = ("W_O", "W_V") if circuit == "OV" else ("W_K", "W_Q")
    small = []
    for layer in range(weights.n_layers):
        left, right = (weights.heads(name, layer) for name in names)
        small.append((left if circuit == "OV" else left.mT) @ (middle @ right))
    empty = middle.new_empty(0, weights.n_heads, weights.d_head, weights.d_head)
    return _eigenvalues(torch.stack(small) if small else empty)


def _unembed_embed(weights: CircuitWeights) -> Tensor:
    """W_U @ W_E, [d, d]."""
    with OneDnnMatmul():
        product = weights.W_U.to(weights.compute_dtype) @ weights.W_E.to(weights.compute_dtype)
    return _to_logits(weights, product.mT).mT * weights.embed_scale


def _embed_embed(weights: CircuitWeights) -> Tensor:
    """W_E.T @ W_E, [d, d]."""
    W_E = weights.W_E.to(weights.compute_dtype)
    return W_E.mT @ W_E * weights.embed_scale**2


@torch.no_grad()
def composed_eigenvalues(weights: CircuitWeights, pairs: Iterable[Sequence[Sequence[int]]]) -> Tensor:
    """The nonzero eigenvalues of the K-composed QK circuits of P pairs (source, destination), complex [P, r].

    For a previous-token head and an induction head they are positive: the circuit matches a token with itself.

    Raises:
        ValueError, IndexError: as composed_qk_circuit.
    """
    middle = _embed_embed(weights)
    small = []
    for pair in pairs:
        first, second = checked_path(weights, pair)
        through = (weights.head("W_O", *first) @ weights.head("W_K", *second)).mT
        small.append(through @ (weights.head("W_V", *first).mT @ (middle @ weights.head("W_Q", *second))))
    if not small:
        return torch.empty(0, weights.d_head, dtype=weights.compute_dtype.to_complex(), device=weights.device)
    return _eigenvalues(torch.stack(small))


def positivity(eigenvalues: Tensor) -> Tensor:
    """sum(real part) / sum(magnitude) over the last dimension: 1 if all are positive, -1 if all are negative."""
    total = eigenvalues.abs().sum(-1)
    return torch.where(total > 0, eigenvalues.real.sum(-1) / total, 0)


def copying_scores(weights: CircuitWeights) -> Tensor:
    """Eigenvalue copying score of every head, [L, H] in [-1, 1]: `positivity` of the full OV circuit."""
    return positivity(circuit_eigenvalues(weights, "OV"))


def qk_positivity(weights: CircuitWeights) -> Tensor:
    """How far every head's queries prefer keys of the same token, [L, H] in [-1, 1]: of the full QK circuit."""
    return positivity(circuit_eigenvalues(weights, "QK"))


@torch.no_grad()
def trace_ratios(weights: CircuitWeights) -> Tensor:
    """tr(OV) / ||OV|| of every head, [L, H], in [-sqrt(r), sqrt(r)]; it sees neither W_E nor W_U."""
    out = []
    for layer in range(weights.n_layers):
        W_V, W_O = weights.heads("W_V", layer), weights.heads("W_O", layer)
        norm = FactoredMatrix(W_V, W_O).norm()
        out.append(torch.where(norm > 0, (W_V * W_O.mT).sum((-2, -1)) / norm, 0))
    return torch.stack(out)


class DiagonalStatistics(NamedTuple):
    """The diagonal of a square matrix against all its entries; a copying head's diagonal stands out."""

    diagonal_mean: Tensor
    diagonal_std: Tensor
    positive: Tensor  # share of the diagonal above zero
    mean: Tensor
    std: Tensor


@torch.no_grad()
def diagonal_statistics(matrix: FactoredMatrix) -> DiagonalStatistics:
    """Mean and (population) standard deviation of the diagonal and of all entries, without forming the product.

    Raises:
        ValueError: a matrix that is not square.
    """
    if matrix.ldim != matrix.rdim:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected a square one")
    A, B = computable(matrix.A), computable(matrix.B)
    diagonal = (A * B.mT).sum(-1)
    count = matrix.ldim
    mean = (A.mean(-2, keepdim=True) @ B.mean(-1, keepdim=True))[..., 0, 0]
    square = matrix.norm().square() / count**2
    return DiagonalStatistics(
        diagonal.mean(-1),
        diagonal.std(-1, correction=0),
        (diagonal > 0).to(A.dtype).mean(-1),
        mean,
        (square - mean.square()).clamp_min(0).sqrt(),
    )


def effective_rank(matrix: FactoredMatrix) -> Tensor:
    """exp of the entropy of the normalised singular values [...], from 1 to the rank (Roy and Vetterli 2007)."""
    share = matrix.S / matrix.S.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


@torch.no_grad()
def virtual_weights(
    weights: CircuitWeights,
    source: Component,
    destination: Component,
    kind: Kind = "V",
    *,
    hops: Literal["direct", "all"] = "direct",
) -> FactoredMatrix:
    """The virtual weights between two components: what one writes, through the residual stream, as another reads it.

    Args:
        weights: the model.
        source: "embed" (rows: W_E, [V, d]) or a head (rows: W_O, [r, d]).
        destination: a head (columns: W_Q, W_K or W_V by `kind`, [d, r]) or "unembed" (columns: W_U, [d, V]).
        kind: what of the destination head reads.
        hops: "direct": W_out @ W_in, the connection that skips every layer between. "all": the exact product
            W_out @ prod(I + sum_h OV_h) @ W_in over the layers strictly between, as if every head between passed on
            its own position's value.

    Returns:
        The product, factored: [r or V, r or V] of inner dimension d.

    Raises:
        ValueError: an unknown component, kind or hops; a source that does not come before the destination.
        IndexError: no such head.

    Source: "Virtual Weights and the Residual Stream as a Communication Channel", Elhage et al. 2021.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if hops not in ("direct", "all"):
        raise ValueError(f"hops is {hops!r}, expected 'direct' or 'all'")
    if isinstance(source, str) and source != "embed":
        raise ValueError(f"source is {source!r}, expected 'embed' or (layer, head)")
    if isinstance(destination, str) and destination != "unembed":
        raise ValueError(f"destination is {destination!r}, expected (layer, head) or 'unembed'")
    first, last = -1, weights.n_layers
    if not isinstance(source, str):
        head = checked_head(weights, source, "source")
        first, out = head[0], weights.head("W_O", *head)
    else:
        out = weights.W_E.to(weights.compute_dtype)
        out = out if weights.embed_scale == 1 else out * weights.embed_scale
    if not isinstance(destination, str):
        head = checked_head(weights, destination, "destination")
        name: Weight = {"Q": "W_Q", "K": "W_K", "V": "W_V"}[kind]  # type: ignore[assignment]
        last, into = head[0], weights.head(name, *head)
    else:
        into = weights.W_U.to(weights.compute_dtype)
    if first >= last:
        raise ValueError(f"source {source} is not in a layer before destination {destination}")
    for layer in range(first + 1, last if hops == "all" else first + 1):
        values = torch.einsum("nd,hdr->hnr", out, weights.heads("W_V", layer))
        out = out + torch.einsum("hnr,hrd->nd", values, weights.heads("W_O", layer))
    return FactoredMatrix(_to_logits(weights, out) if destination == "unembed" else out, into)


class VirtualHead(NamedTuple):
    """What two heads in a row do together: a pattern and an OV circuit of their own."""

    pattern: Tensor  # [B, T, T]: rows are destinations, and sum to 1
    OV: FactoredMatrix  # [d, d]


@torch.no_grad()
def virtual_head(trace: FrozenTrace, source: Sequence[int], destination: Sequence[int]) -> VirtualHead:
    """The virtual attention head of two heads: A2 @ A1 and OV1 @ OV2, norms left out.

    Without norms, `pattern @ x @ OV` of the embedded tokens x is what the path writes to the residual stream.

    Raises:
        ValueError: a source that is not in an earlier layer.
        IndexError: no such head.

    Source: "Virtual Attention Heads", Elhage et al. 2021.
    """
    weights = trace.weights
    first, second = checked_path(weights, (source, destination))
    pattern = trace.pattern(second[0])[:, second[1]] @ trace.pattern(first[0])[:, first[1]]
    through = weights.head("W_O", *first) @ weights.head("W_V", *second)
    OV = FactoredMatrix(weights.head("W_V", *first), through @ weights.head("W_O", *second))
    return VirtualHead(pattern, OV)
