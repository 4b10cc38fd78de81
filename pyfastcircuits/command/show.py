"""The tables that the command shows on the terminal (rich)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyfastcircuits import CircuitWeights, CopyingAccuracy, Result, SkipTrigrams, Sweep, positivity
from pyfastcircuits.command import validation
from pyfastcircuits.command.text import TokenText, corpus_tokens, rows_of
from pyfastcircuits.experiments.sweep import Example
from pyfastcircuits.ops import Backend, TopEntries
from pyfastcircuits.result import label_name
from pyfastcircuits.run.nodes import Head

# Elhage et al. 2021, "Term importance analysis", two layers: fall of the loss in nats.
ARTICLE_ORDERS = (1.8, 5.2, 0.3)
ARTICLE_MARGINALS = ((1.3, 0.05), (5.2, 4.0))
METRIC_NAMES = {
    "nll": "loss",
    "kl": "divergence",
    "logit_difference": "logit difference",
    "probability": "probability",
    "rank": "rank",
    "top1": "top-1 accuracy",
}
HEAD_SCORES = ("induction", "prefix_matching", "previous_token", "duplicate_token", "copying")
SEEN = 500  # a token of the text is looked at from so many occurrences on
TRIPLES = 100  # skip-trigrams counted for each head
TRIPLE = ("source ...", "destination", "-> output")
STRENGTHS = "attention: score less the destination's mean over sources; logit: less the mean over outputs"


def _table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> Table:
    """A table with columns of text, then of figures. Cells are plain text: a token such as "[START]" is no markup."""
    table = Table(title=title, caption=caption)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _narrowed(table: Table) -> Table:
    """The table, such that a narrow window folds the names of its columns and none of their figures."""
    table.collapse_padding = True
    for column in table.columns:
        column.overflow = "fold"
    return table


def _quoted(text: TokenText, token: int) -> str:
    """A token's text as Python writes it, long indentation as "' ' * 15"."""
    return _python(text.decode([token]))


def _python(piece: str) -> str:
    return f"' ' * {len(piece)}" if len(piece) > 4 and set(piece) == {" "} else repr(piece)


def order_steps(sweep: Sweep) -> dict[str, list[Any]]:
    """The steps of the term importance analysis: the paths there are by then, the loss, and its fall, in nats."""
    orders = [f"order <= {k}" for k in range(1, len(sweep.orders))]
    losses = [math.log(sweep.trace.weights.d_vocab), *sweep.orders.tolist(), float(sweep.trace.loss)]
    return {
        "paths": ["uniform", "order 0 (direct path)", *orders, "full model"],
        "loss": losses,
        "fall": [None, *(before - after for before, after in pairwise(losses))],
    }


def order_table(sweep: Sweep) -> Table:
    """The loss with the paths of each order added, beside the article's two-layer model."""
    title = "Term importance: loss with all paths up to an order, in nats"
    orders, rows = len(sweep.orders), []
    articles = ["", *map(str, ARTICLE_ORDERS[:orders]), *[""] * orders]
    for name, loss, fall, article in zip(*order_steps(sweep).values(), articles, strict=False):
        shown = "" if fall is None else f"{round(fall, 4) + 0.0:.4f}"  # no negative zero
        rows.append((name, f"{loss:.4f}", shown, article))
    return _table(title, ("paths",), ("loss", "fall", "article's fall"), rows)


def marginal_table(sweep: Sweep) -> Table:
    """The order-1 terms of each layer's heads, beside the article's two-layer model."""
    title = "Marginal effect of each layer's single-head paths: fall of the loss, in nats"
    names, rows = ("layer", "given the direct path alone", "article", "given the other layers too", "article"), []
    for layer, (alone, too) in enumerate(zip(*(m.tolist() for m in sweep.marginals), strict=True)):
        article = ARTICLE_MARGINALS[layer] if len(sweep.orders) == 3 else ("", "")
        rows.append((f"{layer + 1}", f"{alone:.4f}", f"{article[0]}", f"{too:.4f}", f"{article[1]}"))
    return _table(title, (), names, rows)


def of_pairs(found: Result) -> bool:
    """Whether a sweep's result is of pairs of heads, and not of heads or of layers."""
    return isinstance(found.labels[0], tuple) and len(found.labels[0]) == 2


def effect_table(found: Result, examples: list[Example], text: TokenText) -> Table:
    """The ablations that harm most, each with the token that suffers most."""
    verb = {"rise": "rise", "fall": "fall", "size": "change"}[found.harm]
    kind = "Head pairs whose path" if found.setup.get("scope") == "path" else "What"
    unit = ", in nats" if found.metric in ("nll", "kl") else ""
    names = ["source", "dest"] if of_pairs(found) else ["layer" if isinstance(found.labels[0], int) else "head"]
    title = f"{kind} matters most: {verb} of the {METRIC_NAMES[found.metric]} without it{unit}"
    table = _table(title, (), (*names, verb, "kl"), ())
    table.add_column("hit hardest: context -> token (with, without)")
    kl = dict(zip(found.labels, found.kl.flatten().tolist(), strict=True)) if "kl" in found.measured else {}
    for (label, change), example in zip(found.top(len(examples)), examples, strict=True):
        shown = Text(text(example.context)[-40:], style="dim")
        shown.append(" -> ").append(repr(text([example.target])), style="bold")
        shown.append(f" ({example.clean:.2f}, {example.ablated:.2f})")
        cells = map(label_name, label) if of_pairs(found) else [label_name(label)]
        table.add_row(*cells, f"{change:+.4f}", f"{kl[label]:.4f}" if kl else "", shown)
    return table


def composition_table(found: Result, eigenvalues: Tensor, copying: Tensor, top: int) -> Table:
    """The pairs that stand out most from a random rotation, by z-score; with the spectra that go with them.

    Args:
        found: of P pairs: z, score and baseline.
        eigenvalues: [P, r] complex, of the K-composed QK circuits; [0, r] for other kinds of composition.
        copying: [L, H].
        top: how many pairs.
    """
    title = f"{found.setup['kind']}-composition: pairs that stand out most from a random rotation"
    spectra = ("composed QK", "largest") if len(eigenvalues) else ()
    names = ("source", "dest", "score", "random", "z", "source copies", "dest copies", *spectra)
    caption = "random: mean score under a random rotation; z: score**2 against it. copies: eigenvalue copying score."
    if spectra:
        caption += (
            "\ncomposed QK: positivity of the K-composed QK circuit's eigenvalues; largest: real part of the largest."
        )
    rows = []
    for i in found.z.argsort(descending=True)[:top].tolist():
        pair: Any = found.labels[i]
        row = [*map(label_name, pair), *(f"{float(found.extra[name][i]):.4f}" for name in ("score", "baseline"))]
        row += [f"{float(found.z[i]):+.1f}", *(f"{float(copying[head]):+.2f}" for head in pair)]
        if spectra:
            largest = complex(eigenvalues[i, eigenvalues[i].abs().argmax()])
            row += [f"{float(positivity(eigenvalues[i])):+.2f}", f"{largest.real:.1e}"]
        rows.append(row)
    return _narrowed(_table(title, (), names, rows, caption))


def head_table(scores: Result, found: Result | None, top: int) -> Table:
    """Heads by induction score, of head_scores; with the evidence of their weights, of induction_heads."""
    evidence = () if found is None else ("after", "K-comp. z", "matching", "OV copies")
    names = ("head", *(name.replace("_", " ") for name in HEAD_SCORES), *evidence)
    caption = "copying: share of what a head raises that is for the tokens it attends to; -1: none, 1: all."
    if found is not None:
        caption += (
            "\nafter: the earlier head that attends most to the previous token. By the weights alone: K-comp. z, how\n"
            "their K-composition stands out from a random rotation; matching, positivity of the eigenvalues of their\n"
            "composed QK circuit; OV copies, that of the head's OV circuit."
        )
    pairs, rows = [] if found is None else found.pairs.tolist(), []
    places = {tuple(destination): i for i, (_, destination) in enumerate(pairs)}
    measured = [getattr(scores, name).flatten() for name in HEAD_SCORES]
    for i in scores.values.flatten().argsort(descending=True, stable=True)[:top].tolist():
        head = divmod(i, scores.values.shape[1])
        row = [label_name(head), *(f"{float(x[i]):.3f}" for x in measured)]
        if found is not None and (at := places.get(head)) is not None:
            row += ["{}.{}".format(*pairs[at][0]), f"{float(found.k_composition[at]):+.1f}"]
            row += [f"{float(x[at]):+.3f}" for x in (found.matching, found.copying)]
        rows.append(row)
    return _narrowed(_table("Heads by induction score, on random tokens that come again", (), names, rows, caption))


def _strengths(text: TokenText, tokens: Tensor, values: Tensor) -> str:
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return "  ".join(f"{_quoted(text, token)} {value:+.2f}" for token, value in pairs)


def entry_table(title: str, names: tuple[str, str, str], found: TopEntries, text: TokenText) -> Table:
    """Single entries of a table over the vocabulary: row token, column token, value."""
    entries = zip(*(x.tolist() for x in found), strict=True)
    rows = ([*(_quoted(text, token) for token in tokens), f"{value:+.2f}"] for value, *tokens in entries)
    return _table(title, names[:2], names[2:], rows)


def row_table(title: str, names: tuple[str, str], found: TopEntries, text: TokenText) -> Table:
    """The best entries of some rows of such a table: row token, column tokens with their values."""
    entries = zip(found.rows[:, 0].tolist(), found.columns, found.values, strict=True)
    return _table(title, names, (), ([_quoted(text, row), _strengths(text, *best)] for row, *best in entries))


def source_table(found: SkipTrigrams, text: TokenText) -> Table:
    """For each source, as in the article: the destinations that attend to it and the outputs it raises."""
    names = ("source", "destinations that attend to it", "outputs it raises")
    seen = zip(found.destinations, found.attention, strict=True)
    raised = zip(found.outputs, found.logits, strict=True)
    rows = (
        [_quoted(text, source), _strengths(text, *before), _strengths(text, *after)]
        for source, before, after in zip(found.sources.tolist(), seen, raised, strict=True)
    )
    return _table(f"Skip-trigrams of head {label_name(found.head)}", names, (), rows, STRENGTHS)


def triple_table(found: SkipTrigrams, text: TokenText) -> Table:
    """A head's largest skip-trigrams, as many as were kept of each source: source ... destination -> output."""
    title = f"Largest skip-trigrams of head {label_name(found.head)}"
    rows = (
        [*(_quoted(text, t) for t in x[:3]), f"{x.attention:+.2f}", f"{x.logit:+.2f}", f"{x.score:+.2f}"]
        for x in found.top(found.logits.shape[1])
    )
    return _table(title, TRIPLE, ("attention", "logit", "product"), rows, STRENGTHS)


def copying_table(found: CopyingAccuracy, eigenvalues: Tensor) -> Table:
    """How far each head raises the token it attends to; `eigenvalues` are the copying scores [L, H]."""
    names = ("head", "top 1", "top 5", "positive", "eigenvalues")
    heads = [divmod(i, eigenvalues.shape[1]) for i in range(eigenvalues.numel())]
    rows = ([label_name(x), *(f"{float(y[x]):.1%}" for y in found), f"{float(eigenvalues[x]):+.2f}"] for x in heads)
    caption = (
        "share of tokens whose own logit is the largest, among the five largest, above zero;\n"
        "eigenvalues: copying score of the spectrum, from -1 to 1"
    )
    return _table("Copying: a token's own logit in its row of the OV circuit", (), names, rows, caption)


def validation_tables(weights: CircuitWeights, text: TokenText, backend: Backend) -> Iterator[Table | str]:
    """Hold the tables of a model of at most one layer against its logits and the standard library's source.

    Raises:
        ValueError: the model is of another kind, or has no tokenizer.
    """
    validation.check_readable(weights)
    tokens = corpus_tokens(text, held_out=False).to(weights.device)
    rows = rows_of(text, tokens, weights.n_ctx or 128)
    yield f"training files of the standard library: {len(tokens)} tokens, {len(rows)} sequences of {rows.shape[1]}"
    patterns, logits = validation.rebuilt_errors(weights, rows[:: max(1, len(rows) // 8)][:8])
    yield f"rebuilt from the tables, in float64: logits differ from the model's by {logits:.1e} at most, " + (
        f"attention patterns by {patterns:.1e}" if weights.n_layers else "which has no attention patterns"
    )
    if not weights.n_layers:
        held_out = corpus_tokens(text, held_out=True).to(weights.device)
        fits = [validation.bigram_fit(weights, part, backend=backend) for part in (tokens, held_out)]
        yield _bigram_table(fits)
        yield _successor_table(fits[0], text)
        return
    counts = validation.TextCounts(rows)
    among = counts.frequent(SEEN)
    heads = (Head(0, index) for index in range(weights.n_heads))
    found = [validation.head_fit(weights, head, counts, among, TRIPLES, backend=backend) for head in heads]
    yield _head_fit_table(found)
    yield _evidence_table(found, text)
    yield _pattern_table(weights, counts, text)


def _bigram_table(fits: Sequence[validation.BigramFit]) -> Table:
    facts: list[tuple[str, Callable[[validation.BigramFit], str]]] = [
        ("bigrams (different ones)", lambda x: f"{x.bigrams} ({x.distinct})"),
        ("loss under the table's rows, nats a token", lambda x: f"{x.loss:.4f}"),
        ("entropy by counts: the least that any bigram table reaches", lambda x: f"{x.entropy:.4f}"),
        ("their difference: mean KL(counts || table)", lambda x: f"{x.divergence:.4f}"),
        ("entropy of single tokens", lambda x: f"{x.unigram:.4f}"),
        ("share of the way from single tokens to counts", lambda x: f"{x.explained:.1%}"),
        (f"bigrams that come {fits[0].least} times", lambda x: f"{x.compared}"),
        ("correlation of their log-probabilities", lambda x: f"{x.correlation:.3f}"),
        ("positions whose likeliest successor agrees", lambda x: f"{x.agreement:.1%}"),
    ]
    title = "The bigram table against bigrams of the standard library's source"
    rows = ([name, *map(value, fits)] for name, value in facts)
    return _table(title, ("what",), ("training files", "held-out files"), rows)


def _successor_table(fit: validation.BigramFit, text: TokenText) -> Table:
    title, rows = "Likeliest successors of the most frequent tokens", []
    columns = (x.tolist() for x in (fit.sources, fit.seen, fit.by_text, fit.by_table))
    for token, seen, *both in zip(*columns, strict=True):
        successors = ("  ".join(_quoted(text, t) for t in tokens if t >= 0) for tokens in both)
        rows.append([_quoted(text, token), *successors, f"{seen}"])
    return _table(title, ("token", "by counts", "by the table"), ("seen",), rows)


def _head_fit_table(heads: list[validation.HeadFit]) -> Table:
    names, rows = ("head", "triples", "seen enough", "lift > 1", "median lift", "control"), []
    for found in heads:
        counts = (len(found.triples), len(found.lifts), sum(lift > 1 for lift in found.lifts))
        middle = (f"{median(x):.2f}" if x else "-" for x in (found.lifts, found.control))
        rows.append([label_name(found.head), *map(str, counts), *middle])
    caption = (
        f"of tokens seen {SEEN} times. lift: P(output | source before, destination now) / P(output | destination now)\n"
        "seen enough: source before destination 100 times, destination before output 20 times.\n"
        "control: median lift of the same destinations and outputs behind a source drawn at random."
    )
    return _table("Each head's largest skip-trigrams, counted in the text", (), names, rows, caption)


def _evidence_table(heads: list[validation.HeadFit], text: TokenText) -> Table:
    title, rows = "Of each head, the largest that are seen enough", []
    for found in heads:
        for triple, counts in [pair for pair in found.triples if pair[1].supported][:3]:
            values = (f"{triple.attention:+.2f}", f"{triple.logit:+.2f}", f"{counts.lift:.2f}")
            rows.append([label_name(found.head), *(_quoted(text, token) for token in triple[:3]), *values])
    return _table(title, ("head", *TRIPLE), ("attention", "logit", "lift"), rows)


def _pattern_table(weights: CircuitWeights, counts: validation.TextCounts, text: TokenText) -> Table:
    names, rows = ("head", "attention", "logit", "lift", "shown"), []
    for name, *pieces in validation.PATTERNS:
        try:
            tokens = [text.token(piece) for piece in pieces]
        except ValueError as error:
            strength = ("", "", "", "", str(error))
        else:
            best, lift = validation.pattern_strength(weights, *tokens), f"{counts(*tokens).lift:.2f}"
            attention = f"{best.attention:+.2f} ({best.attention_rank})"
            logit = f"{best.logit:+.2f} ({best.logit_rank})"
            strength = (label_name(best.head), attention, logit, lift, "yes" if best.shown else "no")
        rows.append([name, *map(_python, pieces), *strength])
    caption = (
        "of the head that shows it best; in brackets, how many tokens stand above, as destination and as output.\n"
        "shown: the attention is above the mean token's, and the output among the first 40."
    )
    return _table("Patterns of Python", ("pattern", *TRIPLE), names, rows, caption)
