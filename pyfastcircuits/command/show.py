"""The tables that the command shows on the terminal (rich)."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyfastcircuits import Circuit, CopyingAccuracy, Faithfulness, Result, SkipTrigrams, Sweep, positivity
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.command.plain import in_nats, percent, significant
from pyfastcircuits.experiments.orders import ARTICLE_MARGINALS, ARTICLE_ORDERS
from pyfastcircuits.ops import TopEntries
from pyfastcircuits.result import label_name
from pyfastcircuits.sweeps.sweep import Example
from pyfastcircuits.sweeps.units import duration

METRIC_NAMES = {"nll": "loss", "kl": "divergence", "top1": "top-1 accuracy"}  # of the others, their own in words
HEAD_SCORES = ("induction", "prefix_matching", "previous_token", "duplicate_token", "copying")
COLUMNS = 80  # of a window in which tables keep words whole,
WORD = 20  # those of so many letters at least
TRIPLE = ("source ...", "destination", "-> output")
STRENGTHS = "attention: score less the destination's mean over sources; logit: less the mean over outputs"


def make_table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> Table:
    """A table with columns of text, then of figures, whose words stay whole in a narrow window.

    Cells are plain text: a token such as "[START]" is no markup.
    """
    columns = list(zip((*left, *right), *rows, strict=True))
    widths = [min(WORD, max(len(word) for cell in column for word in cell.split() or [""])) for column in columns]
    narrow = sum(widths) + 3 * len(widths) + 1 > COLUMNS
    table = Table(title=title, caption=caption, caption_justify="left", collapse_padding=narrow)
    for i, ((name, *_), width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(name, justify="left" if i < len(left) else "right", overflow="fold", min_width=width)
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(Text, row))
    return table


def metric_name(metric: str) -> str:
    """A metric as people call it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def order_steps(sweep: Sweep) -> dict[str, list[Any]]:
    """The steps of the term importance analysis: the paths there are by then, the loss, and its fall, in nats."""
    orders = [f"order <= {k}" for k in range(1, len(sweep.orders))]
    losses = [math.log(sweep.trace.weights.d_vocab_out), *sweep.orders.tolist(), float(sweep.loss)]
    rounding = 4 * torch.finfo(sweep.trace.weights.compute_dtype).eps
    falls = [before - after for before, after in pairwise(losses)]
    return {
        "paths": ["uniform", "order 0 (direct path)", *orders, "full model"],
        "loss": losses,
        "fall": [None, *(x if abs(x) > rounding * losses[0] else 0.0 for x in falls)],
    }


def order_table(sweep: Sweep) -> Table:
    """The loss with the paths of each order added, beside the article's two-layer model."""
    orders = len(sweep.orders)
    articles = ["", *map(str, ARTICLE_ORDERS[:orders]), *[""] * orders]
    names, losses, (_, *falls) = order_steps(sweep).values()
    (unit, losses), (fall_unit, falls) = in_nats(losses), in_nats(falls)
    rows = zip(names, losses, ["", *falls], articles, strict=False)
    figures = (f"loss ({unit})", f"fall ({fall_unit})", "article's fall (nats)")
    return make_table("Term importance: loss with all paths up to an order", ("paths",), figures, rows)


def marginal_table(sweep: Sweep) -> Table:
    """The order-1 terms of each layer's heads, beside the article's two-layer model."""
    title, rows = "Marginal effect of each layer's single-head paths: fall of the loss", []
    (unit, alone), (other, too) = (in_nats(x.tolist()) for x in sweep.marginals)
    article = "article (nats)"
    names = (
        "layer",
        f"given the direct path alone ({unit})",
        article,
        f"given the other layers too ({other})",
        article,
    )
    for layer, (first, second) in enumerate(zip(alone, too, strict=True)):
        theirs = ARTICLE_MARGINALS[layer] if len(sweep.orders) == 3 else ("", "")
        rows.append((f"{layer + 1}", first, f"{theirs[0]}", second, f"{theirs[1]}"))
    return make_table(title, (), names, rows)


def of_pairs(found: Result) -> bool:
    """Whether a sweep's result is of pairs of heads, and not of heads or of layers."""
    return isinstance(found.labels[0], tuple) and len(found.labels[0]) == 2


def effect_table(found: Result, examples: list[Example], text: TokenText) -> Table:
    """The ablations that harm most, each with the token that suffers most."""
    verb = {"rise": "rise", "fall": "fall", "size": "change"}[found.harm]
    kind = "Head pairs whose path" if found.setup.get("scope") == "path" else "What"
    title = f"{kind} matters most: {verb} of the {metric_name(found.metric)} without it"
    names = ["source", "dest"] if of_pairs(found) else ["layer" if isinstance(found.labels[0], int) else "head"]
    names.append("hit hardest: context -> token (with it, change without)")
    best = found.top(len(examples))
    columns = [_column(verb, [change for _, change in best], found.metric in ("nll", "kl"), signed=True)]
    if "kl" in found.measured[1:]:
        kl = dict(zip(found.labels, found.kl.flatten().tolist(), strict=True))
        columns.append(_column("kl", [kl[label] for label, _ in best], True, signed=False))
    rows = []
    for (label, _), example, *figures in zip(best, examples, *(cells for _, cells in columns), strict=True):
        shown = f"{text(example.context)[-40:]} -> {text.quoted(example.target)}"
        values = significant(example.clean), significant(example.ablated - example.clean, signed=True)
        heads = map(label_name, label) if of_pairs(found) else [label_name(label)]
        rows.append([*heads, f"{shown} ({', '.join(values)})", *figures])
    return make_table(title, names, [name for name, _ in columns], rows)


def _column(name: str, values: Sequence[float], nats: bool, *, signed: bool) -> tuple[str, list[str]]:
    """A column of figures and its name, with the unit of those in nats."""
    if not nats:
        return name, [significant(x, 4, signed=signed) for x in values]
    unit, figures = in_nats(values, signed=signed)
    return f"{name}\n({unit})", figures


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
            " composed QK: positivity of the K-composed QK circuit's eigenvalues; largest: real part of the largest."
        )
    rows = []
    for i in found.z.argsort(descending=True)[:top].tolist():
        pair: Any = found.labels[i]
        row = [*map(label_name, pair), *(significant(float(found.extra[name][i])) for name in ("score", "baseline"))]
        row += [significant(float(x), signed=True) for x in (found.z[i], *(copying[head] for head in pair))]
        if spectra:
            largest = complex(eigenvalues[i, eigenvalues[i].abs().argmax()])
            row += [significant(float(positivity(eigenvalues[i])), signed=True), significant(largest.real)]
        rows.append(row)
    return make_table(title, (), names, rows, caption)


def head_table(scores: Result, top: int) -> Table:
    """Heads by induction score, of head_scores."""
    names = ("head", *(name.replace("_", " ") for name in HEAD_SCORES))
    caption = "copying: share of what a head raises that is for the tokens it attends to; -1: none, 1: all."
    rows = [
        [label_name(label), *(significant(float(getattr(scores, name)[label])) for name in HEAD_SCORES)]
        for ((label,), _) in scores.top(top)
    ]
    return make_table("Heads by induction score, on random tokens that come again", (), names, rows, caption)


def induction_table(found: Result, top: int) -> Table:
    """What the weights say of the same heads, of induction_heads."""
    names = ("head", "induction", "after", "previous token", "K-composition z", "matching", "OV copies")
    caption = (
        "after: the earlier head that attends most to the previous token, and its score. K-composition z: how their "
        "K-composition stands out from a random rotation; matching, positivity of the eigenvalues of their composed "
        "QK circuit; OV copies, that of the head's OV circuit."
    )
    rows = []
    for i in found.values.argsort(descending=True, stable=True)[:top].tolist():
        pair: Any = found.labels[i]
        figures = (found.values, found.previous_token, found.k_composition, found.matching, found.copying)
        induction, previous, z, *spectra = (float(x[i]) for x in figures)
        signed = (significant(x, signed=True) for x in (z, *spectra))
        rows.append([label_name(pair[1]), significant(induction), label_name(pair[0]), significant(previous), *signed])
    return make_table("The same by their weights: heads after the first layer", (), names, rows, caption)


def _strengths(text: TokenText, tokens: Tensor, values: Tensor) -> str:
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return "  ".join(f"{text.quoted(token)} {significant(value, signed=True)}" for token, value in pairs)


def entry_table(title: str, names: tuple[str, str, str], found: TopEntries, text: TokenText) -> Table:
    """Single entries of a table over the vocabulary: row token, column token, value."""
    entries = zip(*(x.tolist() for x in found), strict=True)
    rows = ([*(text.quoted(token) for token in tokens), significant(value, signed=True)] for value, *tokens in entries)
    return make_table(title, names[:2], names[2:], rows)


def row_table(title: str, names: tuple[str, str], found: TopEntries, text: TokenText) -> Table:
    """The best entries of some rows of such a table: row token, column tokens with their values."""
    entries = zip(found.rows[:, 0].tolist(), found.columns, found.values, strict=True)
    return make_table(title, names, (), ([text.quoted(row), _strengths(text, *best)] for row, *best in entries))


def source_table(found: SkipTrigrams, text: TokenText) -> Table:
    """For each source, as in the article: the destinations that attend to it and the outputs it raises."""
    names = ("source", "destinations that attend to it", "outputs it raises")
    seen = zip(found.destinations, found.attention, strict=True)
    raised = zip(found.outputs, found.logits, strict=True)
    rows = (
        [text.quoted(source), _strengths(text, *before), _strengths(text, *after)]
        for source, before, after in zip(found.sources.tolist(), seen, raised, strict=True)
    )
    return make_table(f"Skip-trigrams of head {label_name(found.head)}", names, (), rows, STRENGTHS)


def triple_table(found: SkipTrigrams, text: TokenText) -> Table:
    """A head's largest skip-trigrams, as many as were kept of each source: source ... destination -> output."""
    title = f"Largest skip-trigrams of head {label_name(found.head)}"
    rows = (
        [
            *(text.quoted(t) for t in x[:3]),
            *(significant(y, signed=True) for y in (x.attention, x.logit, x.score)),
        ]
        for x in found.top(found.logits.shape[1])
    )
    return make_table(title, TRIPLE, ("attention", "logit", "product"), rows, STRENGTHS)


def circuit_table(found: Circuit, top: int) -> Table:
    """The best edges of a circuit."""
    caption = "score: first-order change of the metric when this edge alone carries the corrupted prompt's write"
    rows = [
        [label_name(source), label_name(receiver), significant(score, signed=True)]
        for (source, receiver), score in [*found.scores.items()][:top]
    ]
    return make_table("The circuit: its best edges", ("source", "receiver"), ("score",), rows, caption)


def kept(found: Faithfulness, of: str = "") -> str:
    """What a circuit keeps of the task, in a sentence: of the metric, and of right choices between two tokens."""
    of_metric = f"The circuit keeps {percent(found.faithfulness)} of the model's {metric_name(found.metric)}"
    if found.right is None or not found.right[0]:
        return f"{of_metric}{of}."
    model, empty, circuit = found.right
    return (
        f"{of_metric}, and {percent(circuit / model)} of its right choices between the two answers{of} "
        f"({percent(empty / model)} without any edge)."
    )


def choosing(candidates: int, edges: int, runs: int, seconds: float) -> str:
    """What it costs to choose a circuit by running the model, of `seconds` a run; in time, where it is a minute."""
    about = f", about {duration(runs * seconds)}" if runs * seconds >= 60 else ""
    return (
        f"Choosing {edges} of {candidates} edges runs the model up to {runs:,} times{about}, and {candidates + 1} "
        "times more for each exchange that helps; --no-prune takes the best by their scores."
    )


def enough(whole: Faithfulness, share: float = 0.9) -> str:
    """How many of the best edges keep such a share of the metric, as far as the curve tells."""
    curve = whole.curve
    assert curve is not None
    there = [int(size) for size, x in zip(curve.sizes, curve.faithfulness, strict=True) if float(x) >= share]
    what = f"keep {percent(share)} of the {metric_name(whole.metric)}"
    few = f"the {there[0]} best edges by their scores" if there else "none"
    return f"Of the sizes on the curve, {few} {what}."


def faithfulness_table(found: Faithfulness, whole: Faithfulness) -> Table:
    """How much of the model a circuit explains, and circuits of other sizes by the same scores."""
    curve = whole.curve
    assert curve is not None
    rows = [["this circuit", str(len(found.circuit)), significant(found.faithfulness)]]
    if found.right is not None:
        rows.append(
            ["right choices: model, circuit, nothing", "", " / ".join(percent(found.right[i]) for i in (0, 2, 1))]
        )
    rows.append(["the model without it", "", significant(1 - found.completeness)])
    rows.append(["random circuits", str(len(found.circuit)), significant(float(found.random.mean()))])
    rows += [
        ["the best edges", str(size), significant(share)]
        for size, share in zip(curve.sizes.tolist(), curve.faithfulness.tolist(), strict=True)
    ]
    caption = (
        f"{metric_name(found.metric)} of the model {significant(found.full)}, with all edges corrupted "
        f"{significant(found.empty)}; faithfulness is the share of the way between. CPR {significant(curve.cpr)}, CMD "
        f"{significant(curve.cmd)}."
    )
    return make_table(
        "Faithfulness: all other edges corrupted", ("edges inside", "edges"), ("faithfulness",), rows, caption
    )


def copying_table(found: CopyingAccuracy, eigenvalues: Tensor) -> Table:
    """How far each head raises the token it attends to; `eigenvalues` are the copying scores [L, H]."""
    names = ("head", "top 1", "top 5", "positive", "eigenvalues")
    heads = [divmod(i, eigenvalues.shape[1]) for i in range(eigenvalues.numel())]
    rows = (
        [label_name(x), *(percent(float(y[x])) for y in found), significant(float(eigenvalues[x]), signed=True)]
        for x in heads
    )
    caption = (
        "share of tokens whose own logit is the largest, among the five largest, above zero; "
        "eigenvalues: copying score of the spectrum, from -1 to 1"
    )
    return make_table("Copying: a token's own logit in its row of the OV circuit", (), names, rows, caption)
