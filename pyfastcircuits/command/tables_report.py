"""What the vocabulary's tables show (rich) and write (Parquet)."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyfastcircuits.circuits.tables import CopyingAccuracy, SkipTrigrams, copying_accuracy, skip_trigrams, top_entries
from pyfastcircuits.circuits.vocabulary import bigrams, copying_scores
from pyfastcircuits.command.report import write_table
from pyfastcircuits.command.text import TokenText
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, TopEntries

__all__ = [
    "add_row",
    "copying_table",
    "entry_table",
    "new_table",
    "quoted",
    "row_table",
    "source_table",
    "triple_table",
    "write_heads",
]

FILES = {
    "ov": ("layer", "head", "rank", "source", "output", "logit"),
    "qk": ("layer", "head", "rank", "source", "destination", "attention"),
    "skip-trigrams": ("layer", "head", "rank", "source", "destination", "output", "attention", "logit", "score"),
    "copying": ("layer", "head", "top1", "top5", "positive", "eigenvalues"),
    "bigrams": ("rank", "token", "next", "logit"),
}
_TOKENS = ("source", "destination", "output", "token", "next")
_REALS = ("attention", "logit", "score", "top1", "top5", "positive", "eigenvalues")
_STRENGTHS = "attention: score less the destination's mean over sources; logit: less the mean over outputs"


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: columns of text, then columns of numbers."""
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a token such as "[START]" is no markup."""
    table.add_row(*map(Text, cells))


def quoted(piece: str) -> str:
    """A token's text as Python writes it, long indentation as "' ' * 15"."""
    return f"' ' * {len(piece)}" if len(piece) > 4 and set(piece) == {" "} else repr(piece)


def _strengths(text: TokenText, tokens: Tensor, values: Tensor) -> str:
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return "  ".join(f"{quoted(text.decode([token]))} {value:+.2f}" for token, value in pairs)


def entry_table(title: str, names: tuple[str, str, str], found: TopEntries, text: TokenText) -> Table:
    """Single entries of a table: row token, column token, value."""
    table = new_table(title, names[:2], names[2:])
    for value, *tokens in zip(*(x.tolist() for x in found), strict=True):
        add_row(table, *(quoted(text.decode([token])) for token in tokens), f"{value:+.2f}")
    return table


def row_table(title: str, names: tuple[str, str], found: TopEntries, text: TokenText) -> Table:
    """The best entries of some rows: row token, column tokens with their values."""
    table = new_table(title, names, ())
    for row, columns, values in zip(found.rows[:, 0].tolist(), found.columns, found.values, strict=True):
        add_row(table, quoted(text.decode([row])), _strengths(text, columns, values))
    return table


def source_table(found: SkipTrigrams, text: TokenText) -> Table:
    """For each source, as in the article: the destinations that attend to it and the outputs it raises."""
    layer, head = found.head
    names = ("source", "destinations that attend to it", "outputs it raises")
    table = new_table(f"Skip-trigrams of head {layer}.{head}", names, ())
    for i, source in enumerate(found.sources.tolist()):
        seen = _strengths(text, found.destinations[i], found.attention[i])
        add_row(table, quoted(text.decode([source])), seen, _strengths(text, found.outputs[i], found.logits[i]))
    table.caption = _STRENGTHS
    return table


def triple_table(found: SkipTrigrams, text: TokenText) -> Table:
    """A head's largest skip-trigrams, as many as were kept of each source: source ... destination -> output."""
    title = f"Largest skip-trigrams of head {found.head[0]}.{found.head[1]}"
    table = new_table(title, ("source ...", "destination", "-> output"), ("attention", "logit", "product"))
    for triple in found.top(found.logits.shape[1]):
        tokens = (quoted(text.decode([t])) for t in triple[:3])
        add_row(table, *tokens, *(f"{x:+.2f}" for x in (triple.attention, triple.logit, triple.score)))
    table.caption = _STRENGTHS
    return table


def copying_table(found: CopyingAccuracy, eigenvalues: Tensor) -> Table:
    """How far each head raises the token it attends to; `eigenvalues` are the copying scores [L, H]."""
    names = ("head", "top 1", "top 5", "positive", "eigenvalues")
    table = new_table("Copying: a token's own logit in its row of the OV circuit", (), names)
    for layer, head in torch.cartesian_prod(*map(torch.arange, eigenvalues.shape)).tolist():
        shares = (f"{float(x[layer, head]):.1%}" for x in found)
        add_row(table, f"{layer}.{head}", *shares, f"{float(eigenvalues[layer, head]):+.2f}")
    table.caption = "share of tokens whose own logit is the largest, among the five largest, above zero;\n"
    table.caption += "eigenvalues: copying score of the spectrum, from -1 to 1"
    return table


def write_heads(
    weights: CircuitWeights,
    k: int,
    out: Path,
    text: TokenText,
    *,
    normed: bool,
    offset: int,
    backend: Backend,
    progress: Callable[[float], None],
) -> list[Path]:
    """Write the k largest entries of every head's tables, its k largest skip-trigrams and how far it copies: see FILES.

    Tokens come with their text. Attention is less the destination's mean over sources, logits are less the mean over
    outputs; `score` is their product.

    Returns:
        The files.
    """
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in FILES}
    eigenvalues = copying_scores(weights)
    for layer, head in itertools.product(range(weights.n_layers), range(weights.n_heads)):
        found = skip_trigrams(weights, (layer, head), k=k, normed=normed, offset=offset, backend=backend)
        for name, tokens, values in (("ov", found.outputs, found.logits), ("qk", found.destinations, found.attention)):
            best = values.flatten().sort(descending=True, stable=True).indices[:k]  # each row's k largest hold them
            columns = (found.sources[best // k], tokens.flatten()[best], values.flatten()[best])
            rows[name] += [(layer, head, *entry) for entry in _ranked(columns)]
        rows["skip-trigrams"] += [(layer, head, i, *t, t.score) for i, t in enumerate(found.top(k))]
        shares = copying_accuracy(weights, [(layer, head)], backend=backend)
        rows["copying"].append((layer, head, *map(float, shares), float(eigenvalues[layer, head])))
        progress(1)
    entries = top_entries(bigrams(weights, normed=normed), k, normalize="center", backend=backend)
    rows["bigrams"] += _ranked((entries.rows, entries.columns, entries.values))
    for name, names in FILES.items():
        write_table(_with_text(names, rows[name], text), out / f"{name}.parquet")
    return [out / f"{name}.parquet" for name in FILES]


def _ranked(columns: Iterable[Tensor]) -> Iterable[tuple[float, ...]]:
    return zip(itertools.count(), *(column.tolist() for column in columns), strict=False)


def _with_text(names: tuple[str, ...], rows: list[tuple[float, ...]], text: TokenText) -> pa.Table:
    """Columns of the rows, each column of tokens followed by one of their text."""
    arrays = {}
    for i, name in enumerate(names):
        values = [row[i] for row in rows]
        arrays[name] = pa.array(values, pa.float64() if name in _REALS else pa.int64())
        if name in _TOKENS:
            arrays[f"{name}_text"] = pa.array([text.decode([int(x)]) for x in values], pa.string())
    return pa.table(arrays)
