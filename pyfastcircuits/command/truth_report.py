"""Whether the vocabulary's tables tell the truth: what `pyfastcircuits tables --check` shows (rich)."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from rich.table import Table

from pyfastcircuits.command.tables_report import add_row, new_table, quoted
from pyfastcircuits.command.text import TokenText, corpus_tokens, rows_of
from pyfastcircuits.command.truth import (
    BigramTruth,
    HeadTruth,
    Pattern,
    TextCounts,
    bigram_truth,
    check_readable,
    head_truth,
    pattern_strength,
    rebuilt_errors,
)
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend

__all__ = ["check"]

SEEN = 500  # times a token comes in the text to be looked at
TRIPLES = 100  # of each head
PATTERNS = (
    Pattern("indentation falls", " " * 15, " " * 11, " else"),
    Pattern("indentation falls", " " * 15, " " * 11, " elif"),
    Pattern("indentation falls", " " * 15, " " * 11, " except"),
    Pattern("indentation stays", " " * 11, "\n", " " * 11),
    Pattern("indentation after a colon", ":", "\n", " " * 7),
    Pattern("if ... :", " if", ":", "\n"),
    Pattern("in ... :", " in", " name", ":"),
    Pattern("for ... in", " for", " name", " in"),
    Pattern("def ... self", " def", "(", "self"),
    Pattern("self ... .", " self", ".", "file"),
    Pattern("[ ... ]", "[", "name", "]"),
    Pattern("open ... ,", " open", ",", " '"),
    Pattern("with ... as", " with", ")", " as"),
    Pattern("try ... except", " try", " " * 7, " except"),
    Pattern("import ... import", "import", "\n", "import"),
    Pattern("codecs ... .", "codecs", ".", "charmap"),
)


def check(weights: CircuitWeights, text: TokenText, backend: Backend) -> Iterator[Table | str]:
    """Hold the tables of a model of at most one layer against its logits and the standard library's source.

    Raises:
        ValueError: a model of another kind, or without a tokenizer.
    """
    check_readable(weights)
    tokens = corpus_tokens(text, held_out=False).to(weights.device)
    rows = rows_of(text, tokens, weights.n_ctx or 128)
    yield f"training files of the standard library: {len(tokens)} tokens, {len(rows)} sequences of {rows.shape[1]}"
    patterns, logits = rebuilt_errors(weights, rows[:: max(1, len(rows) // 8)][:8])
    yield f"rebuilt from the tables, in float64: logits differ from the model's by {logits:.1e} at most, " + (
        f"attention patterns by {patterns:.1e}" if weights.n_layers else "which has no attention patterns"
    )
    if not weights.n_layers:
        found = bigram_truth(weights, tokens, backend=backend)
        held_out = corpus_tokens(text, held_out=True).to(weights.device)
        yield _bigram_table((found, bigram_truth(weights, held_out, backend=backend)))
        yield _successor_table(found, text)
        return
    counts = TextCounts(rows)
    among = counts.frequent(SEEN)
    heads = [head_truth(weights, (0, h), counts, among, TRIPLES, backend=backend) for h in range(weights.n_heads)]
    yield _head_table(heads)
    yield _evidence_table(heads, text)
    yield _pattern_table(weights, counts, text)


def _bigram_table(found: Sequence[BigramTruth]) -> Table:
    names = ("training files", "held-out files")
    table = new_table("The bigram table against bigrams of the standard library's source", ("what",), names)
    rows: list[tuple[str, Callable[[BigramTruth], str]]] = [
        ("bigrams (different ones)", lambda x: f"{x.bigrams} ({x.distinct})"),
        ("loss under the table's rows, nats a token", lambda x: f"{x.loss:.4f}"),
        ("entropy by counts: the least that any bigram table reaches", lambda x: f"{x.entropy:.4f}"),
        ("their difference: mean KL(counts || table)", lambda x: f"{x.divergence:.4f}"),
        ("entropy of single tokens", lambda x: f"{x.unigram:.4f}"),
        ("share of the way from single tokens to counts", lambda x: f"{x.explained:.1%}"),
        (f"bigrams that come {found[0].least} times", lambda x: f"{x.compared}"),
        ("correlation of their log-probabilities", lambda x: f"{x.correlation:.3f}"),
        ("positions whose likeliest successor agrees", lambda x: f"{x.agreement:.1%}"),
    ]
    for name, value in rows:
        add_row(table, name, *map(value, found))
    return table


def _successor_table(found: BigramTruth, text: TokenText) -> Table:
    table = new_table(
        "Likeliest successors of the most frequent tokens", ("token", "by counts", "by the table"), ("seen",)
    )
    for token, seen, *both in zip(
        *(x.tolist() for x in (found.sources, found.seen, found.by_text, found.by_table)), strict=True
    ):
        shown = ("  ".join(quoted(text.decode([t])) for t in tokens if t >= 0) for tokens in both)
        add_row(table, quoted(text.decode([token])), *shown, str(seen))
    return table


def _head_table(heads: list[HeadTruth]) -> Table:
    names = ("head", "triples", "seen enough", "lift > 1", "median lift", "control")
    table = new_table("Each head's largest skip-trigrams, counted in the text", (), names)
    for found in heads:
        lifts = found.lifts
        middle = (f"{median(x):.2f}" if x else "-" for x in (lifts, found.control))
        above = str(sum(lift > 1 for lift in lifts))
        add_row(table, f"0.{found.head[1]}", str(len(found.triples)), str(len(lifts)), above, *middle)
    table.caption = (
        f"of tokens seen {SEEN} times. lift: P(output | source before, destination now) / P(output | destination now)\n"
        "seen enough: source before destination 100 times, destination before output 20 times.\n"
        "control: median lift of the same destinations and outputs behind a source drawn at random."
    )
    return table


def _evidence_table(heads: list[HeadTruth], text: TokenText) -> Table:
    names = ("source ...", "destination", "-> output")
    table = new_table(
        "Of each head, the largest that are seen enough", ("head", *names), ("attention", "logit", "lift")
    )
    for found in heads:
        for triple, counts in [pair for pair in found.triples if pair[1].supported][:3]:
            tokens = (quoted(text.decode([t])) for t in triple[:3])
            values = (f"{triple.attention:+.2f}", f"{triple.logit:+.2f}", f"{counts.lift:.2f}")
            add_row(table, f"0.{found.head[1]}", *tokens, *values)
    return table


def _pattern_table(weights: CircuitWeights, counts: TextCounts, text: TokenText) -> Table:
    names = ("pattern", "source ...", "destination", "-> output")
    table = new_table("Patterns of Python", names, ("head", "attention", "logit", "lift", "shown"))
    for pattern in PATTERNS:
        try:
            tokens = [text.token(piece) for piece in pattern[1:]]
        except ValueError as error:
            add_row(table, pattern.name, *map(quoted, pattern[1:]), "", "", "", "", str(error))
            continue
        best, lift = pattern_strength(weights, *tokens), counts(*tokens).lift
        attention = f"{best.attention:+.2f} ({best.attention_rank})"
        logit = f"{best.logit:+.2f} ({best.logit_rank})"
        shown = "yes" if best.shown else "no"
        add_row(
            table, pattern.name, *map(quoted, pattern[1:]), f"0.{best.head[1]}", attention, logit, f"{lift:.2f}", shown
        )
    table.caption = (
        "of the head that shows it best; in brackets, how many tokens stand above, as destination and as output.\n"
        "shown: the attention is above the mean token's, and the output among the first 40."
    )
    return table
