"""Figures: `fc.plot.pairs(result).savefig("pairs.pdf")`, as PNG, SVG or PDF, and shown by notebooks.

| figure | names |
|---|---|
| term importance | orders, marginals |
| ablations, scores and attributions | pairs, heads, head_scores, scatter; and `Result.plot`, of any labels |
| composition of two heads | composition |
| spectra | eigenvalues |
| attention patterns | attention, patterns |
| skip-trigrams | skip_trigrams |

Each returns a matplotlib Figure that is no part of pyplot, so that nothing stays open. matplotlib is imported when
`fc.plot` is first used.
"""

from pyfastcircuits.plot.of_results import head_scores, heads, marginals, orders, pairs, scatter, skip_trigrams
from pyfastcircuits.plot.of_runs import attention, patterns
from pyfastcircuits.plot.of_weights import composition, eigenvalues

__all__ = [
    "attention",
    "composition",
    "eigenvalues",
    "head_scores",
    "heads",
    "marginals",
    "orders",
    "pairs",
    "patterns",
    "scatter",
    "skip_trigrams",
]
