"""Whether the tables over the vocabulary say the truth, held against the model's own logits and against a text.

That can be asked of models of no layer (bigram tables) and of one (skip-trigram tables), whose logits the tables and
the attention patterns make up completely.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import pyfastcircuits as fc
from pyfastcircuits import bigrams, ov_circuit, qk_tables, skip_trigrams, top_per_row, trace
from pyfastcircuits.circuits.tables import row_logsumexp
from pyfastcircuits.ops import Backend
from pyfastcircuits.run.nodes import Head


def check_readable(weights: fc.CircuitWeights) -> None:
    """Raise ValueError unless tables and patterns make up the model's logits completely."""
    if weights.n_layers > 1:
        raise ValueError(f"the model has {weights.n_layers} layers: tables are all of a model of at most one")
    if weights.positional == "standard" or weights.norm == "layernorm":
        raise ValueError(
            f"weights.positional is {weights.positional!r} and norm {weights.norm!r}: what a table says of a token is "
            "exact only where positions are not added to the residual stream, and with a layernorm after `center`"
        )


@torch.no_grad()
def rebuilt_errors(weights: fc.CircuitWeights, tokens: Tensor) -> tuple[float, float]:
    """Rebuild attention patterns and logits from the tables: their largest errors against the model's run, in fp64.

    The patterns are the softmax of the sum of the QK tables. The logits are the final norm's 1/std times a sum: the
    bigram table's row of the present token, each head's OV rows mixed by its pattern, and the biases.

    Args:
        weights: a model of at most one layer; see check_readable.
        tokens: [B, T].

    Raises:
        ValueError: the model is of another kind.
    """
    check_readable(weights)
    weights = weights.to(torch.float64)
    run = trace(weights, tokens)
    logits = _rows(bigrams(weights), run.tokens)
    patterns = [0.0]
    for head in range(weights.n_heads if weights.n_layers else 0):
        pattern = _pattern(weights, Head(0, head), run.tokens)
        patterns.append(float((pattern - run.pattern(0)[:, head]).abs().max()))
        logits = logits + pattern @ _rows(ov_circuit(weights, Head(0, head), normed=True), run.tokens)
    if weights.n_layers:
        logits = logits + weights.written_bias(0) @ weights.W_U
    logits = logits * run.scales[-1][..., None]
    if weights.b_U is not None:
        logits = logits + weights.b_U
    return max(patterns), float((logits - run.logits()).abs().max())


def _rows(table: fc.FactoredMatrix, tokens: Tensor) -> Tensor:
    """Rows of a table, [B, T, V]."""
    return table.A[tokens] @ table.B


def _pattern(weights: fc.CircuitWeights, head: Head, tokens: Tensor) -> Tensor:
    """The causal softmax of the sum of a head's QK tables, [B, T, T]."""
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    distance = places[:, None] - places
    scores = torch.full((len(tokens), length, length), -torch.inf, dtype=weights.compute_dtype, device=tokens.device)
    for offset in range(length) if weights.positional == "rotary" else [0]:
        table = qk_tables(weights, head, normed=True, offset=offset)
        total = table.token_token.A[tokens] @ table.token_token.B.mT[tokens].mT
        if table.token_position and table.position_token and table.position_position:
            total = total + table.token_position.A[tokens] @ table.token_position.B[:, :length]
            total = total + table.position_token.A[:length] @ table.position_token.B.mT[tokens].mT
            total = total + table.position_position.A[:length] @ table.position_position.B[:, :length]
        wanted = distance == offset if weights.positional == "rotary" else distance >= 0
        scores = torch.where(wanted, total, scores)
    return scores.softmax(-1)


@dataclass(frozen=True)
class BigramFit:
    """The bigram table of a model against the bigrams of a text. Losses are in nats a token.

    Attributes:
        bigrams: the number of bigrams in the text.
        distinct: the number of different ones.
        loss: the mean NLL of the next token under the softmax of the table's rows.
        entropy: that of the next token given this one, by the text's counts: the least loss of any bigram table.
        unigram: the entropy of the next token alone, by the text's counts.
        correlation: Pearson's, between the log-probabilities of the table and those of the counts, over the bigrams
            seen `least` times.
        compared: the number of bigrams seen `least` times.
        least: see `compared`.
        agreement: the share of positions for whose token the table and the counts have the same likeliest successor.
        sources: [N], the most frequent tokens.
        seen: [N], their counts.
        by_text, by_table: [N, k], their likeliest successors by counts and by the table, -1 where the text has fewer.
    """

    bigrams: int
    distinct: int
    loss: float
    entropy: float
    unigram: float
    correlation: float
    compared: int
    least: int
    agreement: float
    sources: Tensor
    seen: Tensor
    by_text: Tensor
    by_table: Tensor

    @property
    def divergence(self) -> float:
        """Mean KL(text's successors || table's), in nats: loss - entropy."""
        return self.loss - self.entropy

    @property
    def explained(self) -> float:
        """Where the loss lies between `unigram`, 0, and `entropy`, the best that a bigram table can reach, 1."""
        return (self.unigram - self.loss) / (self.unigram - self.entropy)


@torch.no_grad()
def bigram_fit(
    weights: fc.CircuitWeights,
    tokens: Tensor,
    *,
    least: int = 50,
    examples: int = 8,
    k: int = 3,
    backend: Backend = "auto",
) -> BigramFit:
    """Hold the bigram table of a model of no layer against a text.

    Args:
        weights: the model.
        tokens: [N], the text.
        least, examples, k: see BigramFit.
        backend: see pyfastcircuits.ops.

    Raises:
        ValueError: the model is of another kind, or the text is too short to compare anything.
        RuntimeError: the backend is not there.
    """
    check_readable(weights)
    table = bigrams(weights, normed=True)
    if weights.b_U is not None:
        table = table + fc.FactoredMatrix(torch.ones_like(table.A[:, :1]), weights.b_U[None].to(table.dtype))
    V = weights.d_vocab
    codes, counts = (tokens[:-1] * V + tokens[1:]).unique(return_counts=True)
    first, second, counts = codes // V, codes % V, counts.double()
    before = counts.new_zeros(V).index_add_(0, first, counts)
    after = counts.new_zeros(V).index_add_(0, second, counts)
    total = counts.sum()
    by_table = log_probabilities(table, first, second, backend)
    by_text = (counts / before[first]).log()
    often = counts >= least
    if int(often.sum()) < 2:
        raise ValueError(f"the text has {int(often.sum())} bigrams that come {least} times: too short to compare")
    best = top_per_row(table, k, backend=backend).columns
    successors = _successors(first, second, counts, V, k)
    frequent = before.sort(descending=True, stable=True).indices[:examples]
    return BigramFit(
        bigrams=int(total),
        distinct=len(codes),
        loss=float(-(counts * by_table).sum() / total),
        entropy=float(-(counts * by_text).sum() / total),
        unigram=float(-(counts * (after[second] / total).log()).sum() / total),
        correlation=float(torch.corrcoef(torch.stack((by_text[often], by_table[often])))[0, 1]),
        compared=int(often.sum()),
        least=least,
        agreement=float(((successors[:, 0] == best[:, 0]) * before).sum() / total),
        sources=frequent,
        seen=before[frequent].long(),
        by_text=successors[frequent],
        by_table=best[frequent],
    )


def log_probabilities(table: fc.FactoredMatrix, rows: Tensor, columns: Tensor, backend: Backend) -> Tensor:
    """Entries (rows[i], columns[i]) of the table's row-wise log-softmax, in fp64, [N]."""
    parts = zip(rows.split(1 << 16), columns.split(1 << 16), strict=True)
    entries = torch.cat([(table.A[row] * table.B.mT[column]).sum(-1) for row, column in parts])
    return entries.double() - row_logsumexp(table.A, table.B, backend)[rows]


def _successors(first: Tensor, second: Tensor, counts: Tensor, V: int, k: int) -> Tensor:
    """The k most frequent second tokens behind each first one, [V, k]; -1 where there are fewer."""
    order = counts.sort(descending=True, stable=True).indices
    order = order[first[order].sort(stable=True).indices]
    first, second = first[order], second[order]
    rank = torch.arange(len(first), device=first.device) - torch.searchsorted(first, first)
    out = torch.full((V, k), -1, device=first.device)
    kept = rank < k
    out[first[kept], rank[kept]] = second[kept]
    return out


class Counts(NamedTuple):
    """How often a text shows a skip-trigram, in positions that hold the destination and are followed by a token."""

    destination: int  # all such positions
    followed: int  # those followed by the output
    together: int  # those with the source earlier in the same sequence
    followed_together: int  # those with both

    @property
    def lift(self) -> float:
        """P(output | source earlier, destination now) / P(output | destination now); NaN where either is never seen."""
        expected = self.together * self.followed
        return self.followed_together * self.destination / expected if expected else float("nan")

    @property
    def supported(self) -> bool:
        """Whether the text shows enough for the lift to mean something: 100 times together, 20 times followed."""
        return self.together >= 100 and self.followed >= 20


class TextCounts:
    """Counts skip-trigrams in sequences of tokens [N, T]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._sorted = tokens.flatten().sort(stable=True)

    def places(self, token: int) -> tuple[Tensor, Tensor]:
        """Sequences and positions that hold a token, in order."""
        start, end = torch.searchsorted(self._sorted.values, torch.tensor([token, token + 1]).to(self.tokens)).tolist()
        found = self._sorted.indices[start:end]
        length = self.tokens.shape[1]
        return found // length, found % length

    def __call__(self, source: int, destination: int, output: int) -> Counts:
        """How often the source comes before the destination, with and without the output next."""
        row, place = self.places(source)
        first = torch.full_like(self.tokens[:, 0], self.tokens.shape[1]).scatter_reduce(0, row, place, "amin")
        row, place = self.places(destination)
        row, place = (x[place < self.tokens.shape[1] - 1] for x in (row, place))
        together, followed = place > first[row], self.tokens[row, place + 1] == output
        return Counts(len(row), int(followed.sum()), int(together.sum()), int((followed & together).sum()))

    def frequent(self, least: int) -> Tensor:
        """The tokens that the sequences hold at least so many times."""
        return (torch.bincount(self._sorted.values) >= least).nonzero()[:, 0]


@dataclass(frozen=True)
class HeadFit:
    """The largest skip-trigrams of a head against counts in a text.

    Attributes:
        head: (layer, head).
        triples: the skip-trigrams, each with its counts.
        control: lifts of the same destinations and outputs behind a source drawn at random, of the supported triples.
    """

    head: Head
    triples: list[tuple[fc.SkipTrigram, Counts]]
    control: list[float]

    @property
    def lifts(self) -> list[float]:
        """Lifts of the supported triples."""
        return [counts.lift for _, counts in self.triples if counts.supported]


@torch.no_grad()
def head_fit(
    weights: fc.CircuitWeights, head: Head, counts: TextCounts, among: Tensor, n: int, *, backend: Backend = "auto"
) -> HeadFit:
    """Count the n largest skip-trigrams of a head in a text, out of the tokens `among` (n is at most their number).

    Raises:
        ValueError: as skip_trigrams; the model is of another kind.
    """
    check_readable(weights)
    n = min(n, len(among))
    found = skip_trigrams(weights, head, among, n, among=among, normed=True, backend=backend).top(n)
    triples = [(t, counts(t.source, t.destination, t.output)) for t in found]
    generator = torch.Generator().manual_seed(head[1])
    control = []
    for triple, seen in triples:
        if seen.supported:
            others = among[torch.randperm(len(among), generator=generator)[:20]].tolist()
            drawn = (counts(other, triple.destination, triple.output) for other in others if other != triple.source)
            control += [next((c.lift for c in drawn if c.supported), float("nan"))]
    return HeadFit(head, triples, [lift for lift in control if lift == lift])


PATTERNS = (  # skip-trigrams that Python's grammar makes: a name; source, destination and output by their text
    ("indentation falls", " " * 15, " " * 11, " else"),
    ("indentation falls", " " * 15, " " * 11, " elif"),
    ("indentation falls", " " * 15, " " * 11, " except"),
    ("indentation stays", " " * 11, "\n", " " * 11),
    ("indentation after a colon", ":", "\n", " " * 7),
    ("if ... :", " if", ":", "\n"),
    ("in ... :", " in", " name", ":"),
    ("for ... in", " for", " name", " in"),
    ("def ... self", " def", "(", "self"),
    ("self ... .", " self", ".", "file"),
    ("[ ... ]", "[", "name", "]"),
    ("open ... ,", " open", ",", " '"),
    ("with ... as", " with", ")", " as"),
    ("try ... except", " try", " " * 7, " except"),
    ("import ... import", "import", "\n", "import"),
    ("codecs ... .", "codecs", ".", "charmap"),
)


class PatternStrength(NamedTuple):
    """How strongly the tables of one head show a skip-trigram; a rank counts the tokens that are stronger."""

    head: Head
    attention: float
    attention_rank: int  # of the destination, for this source
    logit: float
    logit_rank: int  # of the output, for this source

    @property
    def shown(self) -> bool:
        """Whether the destination prefers the source to the mean token, and the output is in the first 40."""
        return self.attention > 0 and self.logit > 0 and self.logit_rank < 40


@torch.no_grad()
def pattern_strength(weights: fc.CircuitWeights, source: int, destination: int, output: int) -> PatternStrength:
    """The first-layer head whose tables show the skip-trigram best: shown at all, then by attention * logit."""
    found = []
    for index in range(weights.n_heads):
        table = qk_tables(weights, Head(0, index), normed=True).token_token
        keys = table.B - table.B.mean(-1, keepdim=True)
        attention = table.A @ keys[:, source]
        row = ov_circuit(weights, Head(0, index), normed=True)
        logits = row.A[source] @ row.B
        logits = logits - logits.mean()
        ranks = [int((x > x[i]).sum()) for x, i in ((attention, destination), (logits, output))]
        strengths = float(attention[destination]), ranks[0], float(logits[output]), ranks[1]
        found.append(PatternStrength(Head(0, index), *strengths))
    return max(found, key=lambda s: (s.shown, min(s.attention, s.logit) > 0, s.attention * s.logit))
