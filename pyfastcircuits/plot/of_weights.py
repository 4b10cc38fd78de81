"""Figures of what weights alone say: composition of pairs of heads, spectra of circuits."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.composition import composition_scores
from pyfastcircuits.circuits.composition_baseline import composition_z_scores
from pyfastcircuits.circuits.spectra import circuit_eigenvalues, positivity
from pyfastcircuits.drawing.marks import spectra
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.plot.of_results import pairs
from pyfastcircuits.run.nodes import Kind, parse_head

MOST = 24  # panels of one figure


@public
def composition(weights: CircuitWeights, kind: Kind = "K", *, raw: bool = False, backend: Backend = "auto") -> Any:
    """Draw the composition of every pair of heads, sources down and destinations across.

    Args:
        weights: the model, as composition_scores takes it.
        kind: by queries, keys or values.
        raw: the scores themselves, and not their distance from what a random rotation gives.
        backend: of composition_scores.

    Raises:
        ValueError: a model of fewer than two layers; else as composition_scores.
    """
    if weights.n_layers < 2:
        raise ValueError(f"weights has {weights.n_layers} layers: composition needs heads in two")
    scores = composition_scores(weights, kind, backend=backend)
    if raw:
        return pairs(scores, title=f"{kind}-composition scores", scale="score")
    z = composition_z_scores(weights, kind, scores)
    scale = "standard deviations from a random rotation"
    return pairs(z, title=f"{kind}-composition against a random rotation", scale=scale)


@public
def eigenvalues(
    weights: CircuitWeights, circuit: Literal["OV", "QK"] = "OV", heads: Sequence[Any] | None = None
) -> Any:
    """Draw the eigenvalues of full circuits on the complex plane, a panel for each head, with their positivity.

    Args:
        weights: the model.
        circuit: "OV", whose positive eigenvalues mean copying; or "QK", whose positive ones mean that a token attends
            to itself.
        heads: (layer, head) each; None: all, or the 24 whose eigenvalues are most nearly of one sign.

    Raises:
        ValueError: a head that is no pair of integers; there is no head; as circuit_eigenvalues.
        IndexError: a head that the model does not have.

    Source: "Summarizing OV/QK Matrices", Elhage et al. 2021.
    """
    asked = None if heads is None else [parse_head(weights, head, "heads") for head in heads]
    if not weights.n_layers or asked == []:
        raise ValueError("heads is empty, or the model has none: there is nothing to draw")
    values = circuit_eigenvalues(weights, circuit)
    score = positivity(values)
    if asked is None:
        best = score.abs().flatten().nan_to_num(-1).argsort(descending=True, stable=True)[:MOST].sort().values
        asked = [parse_head(weights, divmod(i, weights.n_heads)) for i in best.tolist()]
    names = [f"{head.layer}.{head.head}: {float(score[head]):+.2f}" for head in asked]
    word = "copying score" if circuit == "OV" else "positivity"
    return spectra(
        torch.stack([values[head] for head in asked]),
        names,
        title=f"Eigenvalues of the {circuit} circuits",
        caption=f"Above each: the head and its {word}. The circle is the largest modulus of the head.",
    )
