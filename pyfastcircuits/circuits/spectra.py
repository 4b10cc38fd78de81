"""Spectra of circuits: the eigenvalues of V x V matrices from r x r ones, and the statistics made of them.

The nonzero eigenvalues of a product A @ B are those of B @ A, so a head's full circuit over the vocabulary has the
spectrum of an r x r matrix. Positive eigenvalues of the OV circuit mean copying: attending to a token raises that very
token ("Summarizing OV/QK Matrices", Elhage et al. 2021). As in `vocabulary`, the weights are taken as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.vocabulary import through_final_gain
from pyfastcircuits.model.factored import FactoredMatrix, computable
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.run.nodes import parse_path

_AT_ONCE = 64  # pairs whose eigenvalues are made in one go


@public
@torch.no_grad()
def circuit_eigenvalues(weights: CircuitWeights, circuit: Literal["OV", "QK"]) -> Tensor:
    """The nonzero eigenvalues of every head's full circuit over the vocabulary, complex [L, H, r], in no order.

    The eigenvalues of W_E @ OV @ W_U ("OV") are those of the r x r matrix W_O @ (W_U @ W_E) @ W_V, with W_U @ W_E
    [d, d] made once; those of W_E @ QK @ W_E.T ("QK") are those of W_K.T @ (W_E.T @ W_E) @ W_Q.

    Raises:
        ValueError: the circuit is neither "OV" nor "QK"; "OV", where the model predicts other tokens than it reads.

    Source: "Summarizing OV/QK Matrices", Elhage et al. 2021.
    """
    middle = _unembed_embed(weights) if circuit == "OV" else _embed_embed(weights)
    rank = weights.d_value if circuit == "OV" else weights.d_head
    small = middle.new_empty(weights.n_layers, weights.n_heads, rank, rank)
    for layer in range(weights.n_layers):
        if circuit == "OV":
            left, right = weights.heads("W_O", layer), weights.heads("W_V", layer)
        else:
            left, right = weights.heads("W_K", layer).mT, weights.heads("W_Q", layer)
        small[layer] = left @ (middle @ right)
    return _eigenvalues(small)


@public
@torch.no_grad()
def composed_eigenvalues(
    weights: CircuitWeights,
    pairs: Iterable[Sequence[Sequence[int]]],
    *,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The nonzero eigenvalues of the K-composed QK circuits of P pairs (source, destination), complex [P, r].

    They are positive for a previous-token head and an induction head: the circuit matches a token with itself.

    `progress` is called with the number of pairs finished since the last call.

    Raises:
        ValueError, IndexError: as composed_qk_circuit.
    """
    middle = _embed_embed(weights)
    small = [middle.new_empty(0, weights.d_head, weights.d_head)]
    for pair in pairs:
        first, second = parse_path(weights, pair, "pair")
        through = (weights.head("W_O", *first) @ weights.head("W_K", *second)).mT
        product = through @ (weights.head("W_V", *first).mT @ (middle @ weights.head("W_Q", *second)))
        small.append(product[None])
    values = []
    for part in torch.cat(small).split(_AT_ONCE):
        values.append(_eigenvalues(part))
        if progress is not None:
            progress(len(part))
    return torch.cat(values)


@public
def positivity(eigenvalues: Tensor) -> Tensor:
    """sum(real part) / sum(magnitude) over the last dimension: 1 if all are positive, -1 if all are negative.

    Raises:
        TypeError: eigenvalues that are neither complex nor floating point.
    """
    kind = eigenvalues.dtype
    if not (kind.is_complex or (kind.is_floating_point and kind.itemsize > 1)):
        raise TypeError(f"eigenvalues has dtype {kind}, expected complex numbers or floating point")
    total = eigenvalues.abs().sum(-1)
    return torch.where(total == 0, 0, eigenvalues.real.sum(-1) / total)


@public
def copying_scores(weights: CircuitWeights) -> Tensor:
    """How far every head copies, [L, H] in [-1, 1]: `positivity` of the eigenvalues of its full OV circuit.

    Raises:
        ValueError: the model predicts other tokens than it reads, so that nothing is copied.
    """
    return positivity(circuit_eigenvalues(weights, "OV"))


@public
def qk_positivity(weights: CircuitWeights) -> Tensor:
    """How far every head's queries prefer keys of the same token, [L, H] in [-1, 1]: `positivity` of its QK circuit."""
    return positivity(circuit_eigenvalues(weights, "QK"))


@public
@torch.no_grad()
def trace_ratios(weights: CircuitWeights) -> Tensor:
    """tr(OV) / ||OV|| of every head, [L, H], in [-sqrt(r), sqrt(r)]; this copying measure ignores W_E and W_U."""
    out = torch.empty(weights.n_layers, weights.n_heads, dtype=weights.compute_dtype, device=weights.device)
    for layer in range(weights.n_layers):
        W_V, W_O = weights.heads("W_V", layer), weights.heads("W_O", layer)
        norm = FactoredMatrix(W_V, W_O).norm()
        out[layer] = torch.where(norm > 0, (W_V * W_O.mT).sum((-2, -1)) / norm, 0)
    return out


class DiagonalStatistics(NamedTuple):
    """The diagonal of a square matrix against all its entries; the diagonal of a copying head stands out."""

    diagonal_mean: Tensor
    diagonal_std: Tensor
    positive: Tensor  # share of the diagonal above zero
    mean: Tensor
    std: Tensor


@public
@torch.no_grad()
def diagonal_statistics(matrix: FactoredMatrix) -> DiagonalStatistics:
    """Mean and (population) standard deviation of the diagonal and of all entries, without forming the product.

    Args:
        matrix: [..., N, N]; each statistic is [...].

    Raises:
        ValueError: the matrix is not square.
    """
    if matrix.ldim != matrix.rdim:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected a square one")
    A, B = computable(matrix.A), computable(matrix.B)
    diagonal = (A * B.mT).sum(-1)
    mean = (A.mean(-2, keepdim=True) @ B.mean(-1, keepdim=True))[..., 0, 0]
    square = matrix.norm().square() / matrix.ldim**2
    return DiagonalStatistics(
        diagonal.mean(-1),
        diagonal.std(-1, correction=0),
        (diagonal > 0).to(A.dtype).mean(-1),
        mean,
        (square - mean.square()).clamp_min(0).sqrt(),
    )


@public
def effective_rank(matrix: FactoredMatrix) -> Tensor:
    """exp of the entropy of the normalised singular values [...], from 1 to the rank (Roy and Vetterli 2007)."""
    share = matrix.S / matrix.S.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def _eigenvalues(matrices: Tensor) -> Tensor:
    """The eigenvalues of [..., r, r]. LAPACK takes one matrix at a time, so threads share the matrices out."""
    flat = matrices.flatten(0, -3)
    threads = min(torch.get_num_threads(), len(flat))
    if flat.device.type != "cpu" or threads < 2:
        return torch.linalg.eigvals(matrices)  # type: ignore[no-any-return]
    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(torch.linalg.eigvals, flat.chunk(threads)))).view(matrices.shape[:-1])


def _unembed_embed(weights: CircuitWeights) -> Tensor:
    """W_U @ W_E, [d, d]."""
    weights.check_one_vocabulary("an OV circuit that is not square has no eigenvalues")
    with OneDnnMatmul(weights.device):
        product = weights.W_U.to(weights.compute_dtype) @ weights.W_E.to(weights.compute_dtype)
    return through_final_gain(weights, product.mT).mT * weights.embed_scale


def _embed_embed(weights: CircuitWeights) -> Tensor:
    """W_E.T @ W_E, [d, d]."""
    W_E = weights.W_E.to(weights.compute_dtype)
    return W_E.mT @ W_E * weights.embed_scale**2
