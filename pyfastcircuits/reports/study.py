"""What a report is about: a run over a text, one over random tokens that repeat, and which heads are shown.

A page has room for so much. What does not fit is left out by the same rules for every model, and `Study.cuts` says it
in sentences that the page shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.experiments.ablation import head_ablation
from pyfastcircuits.model.folding import center
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.reports.pack import Pieces
from pyfastcircuits.result import Result, label_name
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.trace import FrozenTrace

HEADS = 192  # in a matrix of pairs: more than so many rows nobody reads
COPY = 24  # random tokens in one copy


@dataclass
class Study:
    """A model, its runs, and what the sections of a report share.

    Attributes:
        model: what runs.
        weights: its weights.
        text: its tokenizer.
        run: the run over the text.
        backend: which kernels run.
        progress: called with the number of steps finished since the last call.
        pieces: the tokens that the page shows.
        cuts: what is left out, in sentences.
    """

    model: Any
    weights: CircuitWeights
    text: TokenText
    run: FrozenTrace
    backend: Backend
    progress: Callable[[float], None]
    pieces: Pieces
    cuts: list[str] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The token in front of a sequence of random ones."""
        own = self.text.start
        return (start_of(self.model, self.weights.d_vocab) or 0) if own is None else own

    @cached_property
    def ablated(self) -> Result:
        """Each head ablated, attention frozen; [L, H]."""
        return head_ablation(self.run, backend=self.backend)

    @cached_property
    def heads(self) -> list[Head]:
        """The heads that matrices and lists show, in order: all, or those whose ablation changes the loss most."""
        layers, heads = self.weights.n_layers, self.weights.n_heads
        every = [Head(layer, head) for layer in range(layers) for head in range(heads)]
        if len(every) <= HEADS:
            return every
        self.cuts.append(
            f"Of {len(every)} heads, matrices and lists show the {HEADS} whose ablation changes the loss most."
        )
        size = self.ablated.delta.flatten().abs()
        kept = size.argsort(descending=True, stable=True)[:HEADS].sort().values
        return [every[i] for i in kept.tolist()]

    @cached_property
    def pairs(self) -> list[tuple[Head, Head]]:
        """The pairs of shown heads, source and destination in a later layer, in order."""
        return [(first, second) for first, second in combinations(self.heads, 2) if first.layer < second.layer]

    @cached_property
    def centered(self) -> CircuitWeights:
        """The weights for what weights alone say: with layernorms, what is written is centred first."""
        return center(self.weights) if self.weights.norm == "layernorm" else self.weights

    @cached_property
    def repeated(self) -> FrozenTrace | None:
        """A run over one sequence of random tokens that come twice; None where the model is too small for it."""
        length = self.copy_length
        if length is None:
            return None
        drawn = torch.randperm(self.weights.d_vocab - 1, generator=torch.Generator().manual_seed(0))[:length]
        copy = drawn + (drawn >= self.start)
        tokens = torch.cat((torch.tensor([self.start]), copy, copy)).to(self.weights.device)
        return trace(self.model, tokens, weights=self.weights)

    @property
    def copy_length(self) -> int | None:
        """How many random tokens a copy has; None where the vocabulary or the positions have no room for two."""
        room = positions(self.model, self.weights)
        length = min(COPY, self.weights.d_vocab - 1, COPY if room is None else (room - 1) // 2)
        return length if length >= 2 else None

    def index(self, head: Head) -> int:
        """The place of a shown head in lists."""
        return self._indices[head]

    @cached_property
    def _indices(self) -> dict[Head, int]:
        return {head: i for i, head in enumerate(self.heads)}

    def picked(self, values: Tensor) -> Tensor:
        """The entries of the shown heads in an array [L, H, ...]: [n, ...]."""
        layers, heads = ([head[i] for head in self.heads] for i in (0, 1))
        return values[layers, heads]

    @property
    def names(self) -> list[str]:
        """The names of the shown heads."""
        return [label_name(tuple(head)) for head in self.heads]


def positions(model: Any, weights: CircuitWeights) -> int | None:
    """The number of positions of a model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)
