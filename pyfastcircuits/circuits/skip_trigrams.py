"""Skip-trigrams: a source token seen before makes a head raise an output token, from a destination token.

A head attends from the destination to the source by its QK circuit, and raises the output by its OV circuit: together
the circuits are a table of triples [source] ... [destination] -> [output] ("Skip-Trigram" tables, section "One-Layer
Attention-Only Transformers", Elhage et al. 2021).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.adapters.texts import no_token
from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.tables import Indices, checked_indices, top_per_row
from pyfastcircuits.circuits.vocabulary import ov_circuit, qk_tables
from pyfastcircuits.model.factored import FactoredMatrix
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.run.nodes import Head, parse_head


class SkipTrigram(NamedTuple):
    """A source token seen before, the present token, and the output token that the head then raises."""

    source: int
    destination: int
    output: int
    attention: float  # how much more the destination attends to the source than to the mean token, in score
    logit: float  # how much more attending to the source raises the output than the mean token, in logits

    @property
    def score(self) -> float:
        """attention * logit."""
        return self.attention * self.logit


@dataclass(frozen=True, eq=False)
class SkipTrigrams:
    """For each of S source tokens, the k destinations that favour it and the k outputs it raises, best first.

    Attributes:
        head: (layer, head).
        sources: [S] tokens.
        destinations: [S, k] tokens.
        attention: [S, k], the attention score of each destination to the source, less its mean over all tokens.
        outputs: [S, k] tokens.
        logits: [S, k], the logit that the source adds to each output, less its mean over all tokens.
        text: turns token ids into text, for `table` and `str`; an id of which it makes none is shown as "<id 50300>".
    """

    head: Head
    sources: Tensor
    destinations: Tensor
    attention: Tensor
    outputs: Tensor
    logits: Tensor
    text: Callable[[list[int]], str] | None = None

    @public
    def top(self, n: int) -> list[SkipTrigram]:
        """The n triples (source, destination, output) of largest attention * logit, both positive, best first.

        They are exact: of one source, none can lie outside its n best destinations and n best outputs. There are fewer
        than n where no more are positive.

        Raises:
            ValueError: n is above k, so that triples that were not kept might be among them.
        """
        k = self.logits.shape[1]
        if not 0 <= n <= k:
            raise ValueError(f"n is {n}, expected 0 to k = {k}: of each source no more were kept")
        best = self.attention[:, 0].clamp_min(0) * self.logits[:, 0].clamp_min(0)
        kept = best.sort(descending=True, stable=True).indices[:n]
        attention, logits = self.attention[kept, :n, None], self.logits[kept, None, :n]
        scores = torch.where((attention > 0) & (logits > 0), attention * logits, -torch.inf)
        ordered = scores.flatten().sort(descending=True, stable=True)
        found = []
        for place in ordered.indices[:n][ordered.values[:n] > 0].tolist():
            i, j, m = place // n**2, place // n % n, place % n
            s = int(kept[i])
            source, destination, output = self.sources[s], self.destinations[s, j], self.outputs[s, m]
            strengths = float(self.attention[s, j]), float(self.logits[s, m])
            found.append(SkipTrigram(int(source), int(destination), int(output), *strengths))
        return found

    @public
    def plot(self, n: int | None = None) -> Any:
        """Draw the n largest as bars of attention times logit; None: ten, or k if that is less.

        Raises:
            ValueError: as top, or n is 0.
            ImportError: matplotlib is missing.
        """
        from pyfastcircuits.drawing.marks import bars

        n = min(10, self.logits.shape[1]) if n is None else n
        if n == 0:
            raise ValueError("n is 0, expected at least 1")
        found = self.top(n)
        names = ["{} … {} → {}".format(*map(self._short, t[:3])) for t in found]
        title = f"Largest skip-trigrams of head {self.head[0]}.{self.head[1]}"
        return bars(names, [t.score for t in found], title=title, x="attention times logit")

    def _repr_html_(self) -> str:
        """The largest, as a table with a picture."""
        from pyfastcircuits.drawing.notebook import card

        found = self.top(min(10, self.logits.shape[1]))
        rows = [(*map(self._short, t[:3]), *(f"{x:+.3g}" for x in (*t[3:], t.score))) for t in found]
        names = ("source", "destination", "output", "attention", "logit", "product")
        return card(f"Skip-trigrams of head {self.head[0]}.{self.head[1]}", names, rows, self.plot)

    def table(self) -> Any:
        """A pyarrow table: a row for each source and rank, with text columns where `text` is given.

        Raises:
            ImportError: pyarrow is missing.
        """
        import pyarrow as pa

        S, k = self.logits.shape
        columns: dict[str, Any] = {
            "layer": pa.array([self.head[0]] * (S * k), pa.int32()),
            "head": pa.array([self.head[1]] * (S * k), pa.int32()),
            "source": self.sources.repeat_interleave(k),
            "rank": torch.arange(k).repeat(S),
            "destination": self.destinations.flatten(),
            "attention": self.attention.flatten(),
            "output": self.outputs.flatten(),
            "logit": self.logits.flatten(),
        }
        for name in ("source", "destination", "output"):
            if self.text is not None:
                columns[f"{name}_text"] = [self.text([x]) or no_token(x) for x in columns[name].tolist()]
        return pa.table({name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in columns.items()})

    def __str__(self) -> str:
        """A line for each source: its destinations, its outputs."""
        lines = [f"head {self.head[0]}.{self.head[1]}: source | destinations that attend to it | outputs it raises"]
        for s, source in enumerate(self.sources.tolist()):
            cells = [
                ", ".join(f"{self._shown(t)} {v:+.2f}" for t, v in zip(tokens[s].tolist(), x[s].tolist(), strict=True))
                for tokens, x in ((self.destinations, self.attention), (self.outputs, self.logits))
            ]
            lines.append(" | ".join((self._shown(source), *cells)))
        return "\n".join(lines)

    def _short(self, token: int) -> str:
        """A token as `_shown`, long indentation as "' ' * 15"."""
        text = self._shown(token)
        return f"' ' * {len(text) - 2}" if len(text) > 6 and not text.strip("' ") else text

    def _shown(self, token: int) -> str:
        text = str(token) if self.text is None else self.text([token])
        return repr(text) if text else no_token(token)


@public
@torch.no_grad()
def skip_trigrams(
    weights: CircuitWeights,
    head: Sequence[int],
    source_tokens: Indices | None = None,
    k: int = 10,
    *,
    among: Indices | None = None,
    normed: bool = False,
    offset: int = 0,
    text: Callable[[list[int]], str] | None = None,
    backend: Backend = "auto",
) -> SkipTrigrams:
    """A head's skip-trigrams [source] ... [destination] -> [output], from its QK and OV circuits.

    A destination attends to a source by its attention score less the mean over all sources, because a shift of all its
    scores changes no pattern. An output is raised by its logit less the mean over all outputs. Neither mean depends on
    `among`. Positions are left out (`qk_tables` has them); b_Q is in the scores, b_V is not in the logits.

    Args:
        weights: the model.
        head: (layer, head).
        source_tokens: S tokens; all if None.
        k: the number of destinations and outputs of each source, and the most triples that `.top` finds.
        among: only these tokens as destinations and outputs; all if None. It is for models that predict the tokens that
            they read.
        normed: each embedding goes through the norm first; see ov_circuit.
        offset: with rotary positions, the destination stands so many positions after the source.
        text: turns token ids into text in the result, e.g. a tokenizer's `decode`.
        backend: see pyfastcircuits.ops.

    Raises:
        ValueError: the head is not a pair of integers; k is out of range; there is no token, or one comes twice in
            `among`; `among` is given, and the model predicts other tokens than it reads; the offset does not fit.
        IndexError: the model has no such head or token.
        TypeError: tokens are not integers.
        RuntimeError: the backend is not there.

    Source: "Skip-Trigram tables", section "One-Layer Attention-Only Transformers", Elhage et al. 2021.
    """
    head = parse_head(weights, head)
    V, device = weights.d_vocab, weights.device
    sources = checked_indices("source_tokens", source_tokens, V, device, repeated=True)
    if among is not None:
        weights.check_one_vocabulary("among is given, but a destination is no output")
    columns = checked_indices("among", among, V, device)
    scores = qk_tables(weights, head, normed=normed, offset=offset).token_token
    keys = scores.B - scores.B.mean(-1, dtype=torch.float64, keepdim=True).to(scores.dtype)
    seen = top_per_row(FactoredMatrix(keys.mT, scores.A.mT), k, sources, columns=columns, backend=backend)
    raised = top_per_row(
        ov_circuit(weights, head, normed=normed), k, sources, columns=columns, normalize="center", backend=backend
    )
    if sources is None:
        sources = torch.arange(V, device=device)
    return SkipTrigrams(head, sources, seen.columns, seen.values, raised.columns, raised.values, text)
