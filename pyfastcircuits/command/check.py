"""The check of a model's tables over the vocabulary: its findings, and the tables that show them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from statistics import median
from typing import Any

from rich.table import Table
from torch import Tensor

from pyfastcircuits import CircuitWeights
from pyfastcircuits.adapters.texts import TokenText, corpus_tokens, quoted, rows_of
from pyfastcircuits.command import validation
from pyfastcircuits.command.guard import Failed
from pyfastcircuits.command.plain import percent, significant
from pyfastcircuits.command.show import TRIPLE, make_table
from pyfastcircuits.ops import Backend
from pyfastcircuits.result import label_name
from pyfastcircuits.run.nodes import Head

SEEN = 500  # a token of the text is looked at from so many occurrences on
TRIPLES = 100  # skip-trigrams counted for each head
TOLERANCE = 1e-6  # of logits and patterns that tables give in float64


def check_tables(
    weights: CircuitWeights, text: TokenText, backend: Backend, progress: Callable[[float], None]
) -> Iterator[tuple[str, Any, Table | str]]:
    """Hold the tables of a model of at most one layer against its logits and the standard library's source.

    Yields each finding by its name, as values and as people read it. `progress` adds up to `check_steps`.

    Raises:
        ValueError: the model is of another kind, or has no tokenizer.
        Failed: the tables do not give the model's logits.
    """
    validation.check_readable(weights)
    tokens = corpus_tokens(text, held_out=False).to(weights.device)
    rows = rows_of(text, tokens, weights.n_ctx or 128)
    progress(1)
    corpus = f"training files of the standard library: {len(tokens)} tokens, {len(rows)} sequences of {rows.shape[1]}"
    yield "corpus", {"tokens": len(tokens), "sequences": len(rows), "length": rows.shape[1]}, corpus
    patterns, logits = validation.rebuilt_errors(weights, rows[:: max(1, len(rows) // 8)][:8])
    progress(1)
    rebuilt = f"rebuilt from the tables, in float64: logits differ from the model's by {logits:.1e} at most, " + (
        f"attention patterns by {patterns:.1e}" if weights.n_layers else "which has no attention patterns"
    )
    yield "rebuilt", {"logits": logits, "patterns": patterns}, rebuilt
    if weights.n_layers:
        yield from _head_findings(weights, text, validation.TextCounts(rows), backend, progress)
    else:
        held_out = corpus_tokens(text, held_out=True).to(weights.device)
        fits = [validation.bigram_fit(weights, part, backend=backend) for part in (tokens, held_out)]
        progress(1)
        yield "bigrams", dict(zip(("training", "held_out"), map(_figures, fits), strict=True)), _bigram_table(fits)
        yield "successors", _successors(fits[0]), _successor_table(fits[0], text)
    if not (patterns <= TOLERANCE and logits <= TOLERANCE):
        raise Failed(f"--check: what the tables give differs from the model by more than {TOLERANCE}")


def check_steps(weights: CircuitWeights) -> dict[str, int]:
    """The phases of check_tables."""
    counted = (
        {"counting": weights.n_heads, "patterns": len(validation.PATTERNS)} if weights.n_layers else {"counting": 1}
    )
    return {"reading": 1, "rebuilding": 1, **counted}


def _head_findings(
    weights: CircuitWeights,
    text: TokenText,
    counts: validation.TextCounts,
    backend: Backend,
    progress: Callable[[float], None],
) -> Iterator[tuple[str, Any, Table]]:
    among, found = counts.frequent(SEEN), []
    for index in range(weights.n_heads):
        found.append(validation.head_fit(weights, Head(0, index), counts, among, TRIPLES, backend=backend))
        progress(1)
    lifts = [{"head": label_name(x.head), "lifts": x.lifts, "control": x.control} for x in found]
    yield "heads", lifts, _head_fit_table(found)
    triples = [
        {"head": label_name(x.head), **triple._asdict(), **counts._asdict(), "lift": counts.lift}
        for x in found
        for triple, counts in x.triples
    ]
    yield "skip-trigrams", triples, _evidence_table(found, text)
    patterns = []
    for pattern in validation.PATTERNS:
        patterns.append(_pattern(weights, counts, text, *pattern))
        progress(1)
    yield "patterns", patterns, _pattern_table(patterns)


def _figures(fit: validation.BigramFit) -> dict[str, float]:
    """The figures of a fit, without its examples."""
    figures = {x.name: getattr(fit, x.name) for x in fields(fit) if not isinstance(getattr(fit, x.name), Tensor)}
    return figures | {"divergence": fit.divergence, "explained": fit.explained}


def _successors(fit: validation.BigramFit) -> list[dict[str, Any]]:
    columns = {name: getattr(fit, name).tolist() for name in ("sources", "seen", "by_text", "by_table")}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _bigram_table(fits: Sequence[validation.BigramFit]) -> Table:
    facts: list[tuple[str, Callable[[validation.BigramFit], str]]] = [
        ("bigrams (different ones)", lambda x: f"{x.bigrams} ({x.distinct})"),
        ("loss under the table's rows, nats a token", lambda x: significant(x.loss, 4)),
        ("entropy by counts: the least that any bigram table reaches", lambda x: significant(x.entropy, 4)),
        ("their difference: mean KL(counts || table)", lambda x: significant(x.divergence, 4)),
        ("entropy of single tokens", lambda x: significant(x.unigram, 4)),
        ("share of the way from single tokens to counts", lambda x: percent(x.explained)),
        (f"bigrams that come {fits[0].least} times", lambda x: f"{x.compared}"),
        ("correlation of their log-probabilities", lambda x: significant(x.correlation)),
        ("positions whose likeliest successor agrees", lambda x: percent(x.agreement)),
    ]
    title = "The bigram table against bigrams of the standard library's source"
    rows = ([name, *map(value, fits)] for name, value in facts)
    return make_table(title, ("what",), ("training files", "held-out files"), rows)


def _successor_table(fit: validation.BigramFit, text: TokenText) -> Table:
    title, rows = "Likeliest successors of the most frequent tokens", []
    columns = (x.tolist() for x in (fit.sources, fit.seen, fit.by_text, fit.by_table))
    for token, seen, *both in zip(*columns, strict=True):
        successors = ("  ".join(text.quoted(t) for t in tokens if t >= 0) for tokens in both)
        rows.append([text.quoted(token), *successors, f"{seen}"])
    return make_table(title, ("token", "by counts", "by the table"), ("seen",), rows)


def _head_fit_table(heads: list[validation.HeadFit]) -> Table:
    names, rows = ("head", "triples", "seen enough", "lift > 1", "median lift", "control"), []
    for found in heads:
        counts = (len(found.triples), len(found.lifts), sum(lift > 1 for lift in found.lifts))
        middle = (significant(median(x)) if x else "-" for x in (found.lifts, found.control))
        rows.append([label_name(found.head), *map(str, counts), *middle])
    caption = (
        f"of tokens seen {SEEN} times. lift: P(output | source before, destination now) / P(output | destination now); "
        "seen enough: source before destination 100 times, destination before output 20 times; "
        "control: median lift of the same destinations and outputs behind a source drawn at random."
    )
    return make_table("Each head's largest skip-trigrams, counted in the text", (), names, rows, caption)


def _evidence_table(heads: list[validation.HeadFit], text: TokenText) -> Table:
    title, rows = "Of each head, the largest that are seen enough", []
    for found in heads:
        for triple, counts in [pair for pair in found.triples if pair[1].supported][:3]:
            values = (*(significant(x, signed=True) for x in triple[3:5]), significant(counts.lift))
            rows.append([label_name(found.head), *(text.quoted(token) for token in triple[:3]), *values])
    return make_table(title, ("head", *TRIPLE), ("attention", "logit", "lift"), rows)


def _pattern(
    weights: CircuitWeights, counts: validation.TextCounts, text: TokenText, name: str, *pieces: str
) -> dict[str, Any]:
    """How strongly the model shows a pattern of Python; "error" where a piece is no token of the model."""
    found: dict[str, Any] = {"pattern": name, "pieces": pieces}
    try:
        tokens = [text.token(piece) for piece in pieces]
    except ValueError as error:
        return found | {"error": str(error)}
    best = validation.pattern_strength(weights, *tokens)
    lift = counts(*tokens).lift
    return found | best._asdict() | {"head": label_name(best.head), "lift": lift, "shown": best.shown}


def _pattern_table(patterns: Sequence[dict[str, Any]]) -> Table:
    names, rows = ("pattern", "skip-trigram", "head", "attention", "logit", "lift", "shown"), []
    for found in patterns:
        trigram = "{} ... {} -> {}".format(*map(quoted, found["pieces"]))
        if "error" in found:
            rows.append([found["pattern"], f"{trigram}: {found['error']}", *[""] * 5])
            continue
        strengths = (f"{significant(found[x], signed=True)} ({found[f'{x}_rank']})" for x in ("attention", "logit"))
        shown = "yes" if found["shown"] else "no"
        rows.append([found["pattern"], trigram, found["head"], *strengths, significant(found["lift"]), shown])
    caption = (
        "of the head that shows it best; in brackets, how many tokens stand above, as destination and as output; "
        "shown: the attention is above the mean token's, and the output among the first 40."
    )
    return make_table("Patterns of Python", names[:2], names[2:], rows, caption)
