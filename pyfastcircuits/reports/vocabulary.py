"""What a report says of tokens by the weights alone: skip-trigrams, bigrams, and the OV circuits of virtual heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.circuits.skip_trigrams import SkipTrigrams, skip_trigrams
from pyfastcircuits.circuits.spectra import positivity
from pyfastcircuits.circuits.tables import top_entries, top_per_row
from pyfastcircuits.circuits.vocabulary import bigrams, embedded_tokens, through_final_gain
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.ops import TopEntries
from pyfastcircuits.reports.pack import halves, numbers, rounded
from pyfastcircuits.reports.study import Study
from pyfastcircuits.run.nodes import Head

TRIPLES = 40  # of each head
BESIDE = 4  # destinations and outputs of a source token
ROWS = 10_000  # of heads and source tokens
VIRTUAL = 96  # pairs whose virtual head is described token by token
WORK = 2e12  # multiply-adds that tables may take; models whose tables take more are shown fewer sources
ENTRIES = 6  # of a virtual head's OV circuit


def virtual_heads(study: Study) -> dict[str, Any]:
    """The OV circuits of the virtual heads of the pairs that compose most by values: positivity, largest entries."""
    weights = study.centered
    tokens, unembed = embedded_tokens(weights), weights.W_U.to(weights.compute_dtype)
    each = tokens.shape[0] * unembed.shape[1] * weights.d_value
    count = min(VIRTUAL, len(study.pairs), max(1, int(WORK / 4 / each)))
    norms = torch.stack([_virtual(study, pair)[2] for pair in study.pairs]) if count < len(study.pairs) else None
    kept = list(range(count)) if norms is None else sorted(norms.argsort(descending=True)[:count].tolist())
    if count < len(study.pairs):
        study.cuts.append(f"Virtual heads are described token by token for the {count} pairs that write most.")
    found, scores = [], []
    for i in kept:
        values, written, _ = _virtual(study, study.pairs[i])
        circuit = FactoredMatrix(tokens @ values, through_final_gain(weights, written) @ unembed)
        scores.append(positivity(torch.linalg.eigvals(circuit.B @ circuit.A)))
        best = top_entries(
            circuit, min(ENTRIES, circuit.ldim * circuit.rdim), normalize="center", backend=study.backend
        )
        found.append(_entries(study, best))
    study.progress(1)
    return {"kept": kept, "positivity": rounded(torch.stack(scores)), "entries": found}


def _virtual(study: Study, pair: tuple[Head, Head]) -> tuple[Tensor, Tensor, Tensor]:
    """The factors [d, r] and [r, d] of a virtual head's OV, and its Frobenius norm."""
    weights, (first, second) = study.centered, pair
    values = weights.head("W_V", *first)
    written = weights.head("W_O", *first) @ weights.head("W_V", *second) @ weights.head("W_O", *second)
    square = ((values.mT @ values) * (written @ written.mT)).sum()
    return values, written, square.clamp_min(0).sqrt()


def trigrams(study: Study) -> dict[str, Any]:
    """Each head's largest skip-trigrams; for tokens of the text, its destinations and outputs; and the bigrams.

    Raises:
        ValueError: queries and keys come through something that the weights do not hold.
    """
    weights, V = study.centered, study.weights.d_vocab
    each = V * V * (weights.d_head + weights.d_value) + 1.0
    whole = each * len(study.heads) <= WORK
    sources = _sources(study)
    found = []
    if not whole and study.heads:
        study.cuts.append(
            f"Skip-trigrams are searched among the {len(sources)} source tokens that are commonest in the text, not "
            f"all {V}."
        )
    for head in study.heads:
        k = min(TRIPLES, V)
        every = skip_trigrams(weights, head, None if whole else sources, k, backend=study.backend)
        best = [
            [*study.pieces([t.source, t.destination, t.output]), *rounded(torch.tensor([t.attention, t.logit]))]
            for t in every.top(k)
        ]
        rows = torch.tensor(sources, device=weights.device) if whole else slice(None)
        found.append({"best": best, **_beside(study, every, rows)})
        study.progress(1)
    direct = bigrams(weights)
    searched = None if V * V * weights.d_model <= WORK else sources
    largest = top_entries(direct, min(TRIPLES, V), rows=searched, normalize="center", backend=study.backend)
    near = top_per_row(direct, min(BESIDE, V), sources, normalize="center", backend=study.backend)
    study.progress(1)
    return {
        "sources": study.pieces(sources),
        "heads": found,
        "bigrams": {
            "best": _entries(study, largest),
            "outputs": _places(study, near.columns),
            "logits": halves(near.values),
        },
    }


def _sources(study: Study) -> list[int]:
    """The tokens that are commonest in the text, the commonest first: as many as the page has room for."""
    tokens, counts = study.run.tokens.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    most = max(8, ROWS // max(1, len(study.heads)))
    if len(order) > most:
        study.cuts.append(f"Tables by source token have the {most} commonest of {len(order)} different tokens.")
    return list(tokens[order[:most]].tolist())


def _beside(study: Study, found: SkipTrigrams, rows: Any) -> dict[str, Any]:
    """The best destinations and outputs of some source tokens."""
    return {
        "destinations": _places(study, found.destinations[rows, :BESIDE]),
        "attention": halves(found.attention[rows, :BESIDE]),
        "outputs": _places(study, found.outputs[rows, :BESIDE]),
        "logits": halves(found.logits[rows, :BESIDE]),
    }


def _places(study: Study, tokens: Tensor) -> dict[str, Any]:
    """Where tokens stand among the pieces."""
    return numbers(torch.tensor(study.pieces(tokens)))


def _entries(study: Study, found: TopEntries) -> list[list[Any]]:
    """Entries of a table: row, column, value."""
    parts: Sequence[list[Any]] = (study.pieces(found.rows), study.pieces(found.columns), rounded(found.values))
    return [list(entry) for entry in zip(*parts, strict=True)]
