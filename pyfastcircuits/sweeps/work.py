"""A sweep as a pure function of a model, sequences and experiments, cut into chunks that anyone may run in any order.

A chunk finds, for each of its sequences and experiments, the mean effect over the positions measured in that sequence.
All that a sweep tells is made of these numbers and of how many positions each is a mean of: see `moments`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.experiments.ablation import all_pairs, head_ablation, layer_ablation, pair_ablation
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import MetricSpec, metric_spec
from pyfastcircuits.experiments.options import DEFAULTS, Attention, measurement
from pyfastcircuits.experiments.orders import layer_marginals, order_losses
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.paths import enumerate_paths
from pyfastcircuits.run.trace import FrozenTrace
from pyfastcircuits.sweeps.corpus import Sequences

SweepScope = Literal["path", "direct", "edge", "joint", "head", "layer"]
Split = Literal["none", "sequences", "experiments", "vocabulary"]
WORK = {"cpu": 2e11, "cuda": 2e13}  # multiply-adds of a chunk: some seconds, of one core
PATTERNS = 1 << 29  # bytes of attention patterns of the sequences of a chunk, at least one sequence's
FIRST = 64  # sequences, those at the beginning, over which mean ablation takes its means
_WIDE = 50  # how many times more work a chunk's experiments are than the clean logits, which each chunk makes anew


@dataclass(frozen=True)
class Chunk:
    """A part of a sweep: some sequences, and some experiments by their numbers in `Work.labels`."""

    index: int
    sequences: slice
    experiments: slice

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of sequences and of experiments."""
        return self.sequences.stop - self.sequences.start, self.experiments.stop - self.experiments.start


@dataclass(frozen=True)
class Cut:
    """The sizes of chunks: how many sequences and experiments they have at most."""

    sequences: int
    experiments: int

    @staticmethod
    def of(
        sizes: tuple[int, int, int, int],
        scope: SweepScope,
        attention: Attention,
        experiments: int,
        length: int,
        patterns: int,
        most: float,
    ) -> "Cut":
        """Chunks of at most so many multiply-adds.

        Args:
            sizes: of the model: n_layers, d_model, d_value and d_vocab_out.
            scope, attention, experiments: of the sweep.
            length: of a sequence.
            patterns: bytes of a sequence's attention patterns.
            most: multiply-adds.
        """
        layers, d, r, vocabulary = sizes
        width = r if scope in ("path", "direct") and attention == "frozen" else d
        others = 3 * layers + 5  # losses of rows of the residual stream, beside the experiments'
        rerun = 6 * layers * d**2 * (attention == "recomputed")  # half the layers
        each = length * (vocabulary * width + rerun)
        whole = experiments * each + others * length * vocabulary * d
        if whole <= 4 * most:
            at_once = int(min(most // max(whole, 1), PATTERNS // max(patterns, 1)))
            return Cut(max(1, at_once), max(1, experiments))
        return Cut(1, min(experiments, max(ceil(_WIDE * d / width), int(most // each))))

    def for_processes(self, split: Split, size: int, sequences: int | None, experiments: int) -> "Cut":
        """Chunks no larger than these, of which as many processes have as many each."""
        if split == "sequences" and sequences is not None:
            return Cut(_even(sequences, self.sequences, size), self.experiments)
        if split == "experiments":
            return Cut(self.sequences, _even(experiments, self.experiments, size))
        return self

    def chunks(self, sequences: int | None, experiments: int, processes: int = 1) -> Iterator[Chunk]:
        """The chunks of a sweep: all experiments of some sequences before the next.

        Args:
            sequences: how many; None: nobody knows, and the chunks never end.
            experiments: how many; with none there is a chunk for some sequences all the same.
            processes: among which they are dealt out in turn: then so many parts of the sequences come together, so
                that each process goes on with the clean run that it has. The sequences of an experiment stay in order.
        """
        parts = list(slices(experiments, self.experiments)) if experiments else [slice(0, 0)]
        together = 1 if sequences is None else processes
        for first in count(0, together):
            blocks = range(first, first + together)
            for number, some in enumerate(parts):
                for block in blocks:
                    start, stop = block * self.sequences, (block + 1) * self.sequences
                    if sequences is not None:
                        stop = min(stop, sequences)
                    if start < stop:
                        yield Chunk(block * len(parts) + number, slice(start, stop), some)
            if sequences is not None and blocks.stop * self.sequences >= sequences:
                return


@dataclass(frozen=True, eq=False)
class Findings:
    """What a chunk finds of S sequences and P experiments, on the CPU.

    Attributes:
        chunk: the chunk.
        positions: [S], how many positions are measured in each sequence.
        effects: by metric, [S, P]: what each experiment adds to the metric, its mean over a sequence's positions, NaN
            where none is measured.
        clean: [S], fp64: the metric's mean in the clean run.
        losses: fp64 [S, 3 L + 2]: means of the clean loss, of order_losses [L + 1], and of both layer_marginals [L]
            each; empty in the chunks that do not begin with the first experiment.
    """

    chunk: Chunk
    positions: Tensor
    effects: dict[str, Tensor]
    clean: Tensor
    losses: Tensor


@dataclass(frozen=True, eq=False)
class Work:
    """What each chunk of a sweep is run with: a model, and what is done to it and measured. Made by `work`.

    Attributes:
        model: CircuitWeights, or the model of another library.
        weights: its weights.
        scope, mode, attention: as in `sweep`.
        metric: what is measured, beside KL.
        options: the other measurement options.
        first: the clean run of the first sequences, over which means are taken.
    """

    model: Any
    weights: CircuitWeights
    scope: SweepScope
    mode: Mode
    attention: Attention
    metric: MetricSpec
    options: Mapping[str, Any]
    first: FrozenTrace

    @cached_property
    def labels(self) -> list[Label]:
        """The experiments, pairs by their destinations: those of one destination share its product with W_U."""
        every = experiments(self.weights, self.scope)
        return sorted(every, key=_reversed) if self.scope not in ("head", "layer") else every

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics measured."""
        return (self.metric.name,) if self.metric.name == "kl" else (self.metric.name, "kl")

    def cut(self, length: int) -> Cut:
        """The sizes of chunks that take some seconds, by the multiply-adds that sequences of `length` tokens take.

        All experiments of some sequences are a chunk, unless those of one sequence take long already.
        """
        weights = self.weights
        sizes = weights.n_layers, weights.d_model, weights.d_value, weights.d_vocab_out
        most = WORK[weights.device.type if weights.device.type in WORK else "cuda"]
        patterns = pattern_bytes(weights, length)
        return Cut.of(sizes, self.scope, self.attention, len(self.labels), length, patterns, most)

    def trace(self, tokens: Tensor, start: int = 0) -> FrozenTrace:
        """The clean run of sequences that begin with number `start`; errors name them."""
        return _trace(self.model, self.weights, tokens, start)

    def run(
        self,
        chunk: Chunk,
        run: FrozenTrace,
        before: FrozenTrace | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Findings:
        """Run a chunk.

        Args:
            chunk: which sequences and experiments.
            run: the clean run of these sequences.
            before: with mode "resample", the clean run of the sequence before each of these.
            progress: called with the share of the chunk that has been finished since the last call.
        """
        sequences, total = chunk.shape
        first = chunk.experiments.start == 0
        steps = total + first * (3 * self.weights.n_layers + 3)
        options = {**self.options, "metric": self.metric_of(chunk.sequences), "per_sequence": True, "kl": True}
        options |= self.positions_of(chunk.sequences)
        if progress is not None:
            options["progress"] = lambda done: progress(done / steps)
        found = ablate(
            run, self.scope, self.mode, self.attention, options, self.labels[chunk.experiments],
            reference={"zero": None, "mean": self.first, "resample": before}[self.mode],
        )  # fmt: skip
        where = measurement(run, options, self.attention).asked.where
        effects = {found.metric: found.delta, **found.extra}
        losses = self._losses(run, options) if first else torch.empty(sequences, 0, dtype=torch.float64)
        return Findings(
            chunk,
            where.sum(-1).cpu(),
            {name: x.reshape(total, sequences).mT.cpu() for name, x in effects.items()},
            found.baseline.double().cpu(),
            losses.cpu(),
        )

    def _losses(self, run: FrozenTrace, options: Mapping[str, Any]) -> Tensor:
        """See Findings.losses."""
        asked: dict[str, Any] = {
            name: options[name] for name in ("positions", "backend", "progress") if name in options
        }
        asked |= {"targets": options["metric"].targets, "per_token": True}
        orders, marginals = order_losses(run, **asked), layer_marginals(run, **asked)
        one_vocabulary = run.weights.d_vocab_out == run.weights.d_vocab
        clean = run.token_losses[None] if one_vocabulary else orders[-1:]
        return torch.cat([x.double().nanmean(-1) for x in (clean, orders, *marginals)]).mT

    def metric_of(self, sequences: slice) -> MetricSpec:
        """The metric with the tokens that it asks about in some of the sequences."""
        held = {x.name: getattr(self.metric, x.name) for x in fields(self.metric)}
        return replace(self.metric, **{name: _cut(tokens, sequences) for name, tokens in held.items()})

    def positions_of(self, sequences: slice) -> dict[str, Any]:
        """The positions measured in some of the sequences, where each has its own."""
        positions = self.options.get("positions")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            return {"positions": positions[sequences]}
        return {}


def work(
    model: Any,
    weights: CircuitWeights,
    scope: SweepScope,
    mode: Mode,
    attention: Attention,
    options: Mapping[str, Any],
    source: Sequences,
) -> Work:
    """The work of a sweep.

    Raises:
        ValueError, TypeError: an unknown metric; `against` missing or too much; no sequence; as trace.
    """
    metric = metric_spec(options.get("metric", "nll"), options.get("targets"), options.get("against"))
    left_out = ("metric", "targets", "against", "progress", "kl", "per_token", "per_sequence")
    others = {name: value for name, value in {**DEFAULTS, **options}.items() if name not in left_out}
    most = PATTERNS // max(1, pattern_bytes(weights, source.length))
    first = source.read(0, max(2, min(FIRST, most))).to(weights.device)
    if not len(first):
        raise ValueError(f"tokens is {source!r}, which has no sequence")
    return Work(model, weights, scope, mode, attention, metric, others, _trace(model, weights, first, 0))


def experiments(weights: CircuitWeights, scope: SweepScope) -> list[Label]:
    """Everything that a sweep of this scope ablates, in the order of its result."""
    if scope == "layer":
        return list(range(weights.n_layers))
    if scope == "head":
        return list(enumerate_paths(weights.n_layers, weights.n_heads, 1))
    return list(all_pairs(weights, within_layers=scope == "joint"))


def ablate(
    run: FrozenTrace,
    scope: SweepScope,
    mode: Mode,
    attention: Attention,
    options: Mapping[str, Any],
    labels: Iterable[Any] | None,
    reference: FrozenTrace | None = None,
) -> Result:
    """Ablate everything of a scope, or only what some labels of its result say."""
    if scope == "layer" and labels is None:
        return layer_ablation(run, mode, attention, reference=reference, **options)
    if scope == "layer" and labels is not None:
        labels = [[(layer, head) for head in range(run.weights.n_heads)] for layer in labels]
    if scope == "head" or scope == "layer":
        return head_ablation(run, mode, attention, heads=labels, reference=reference, **options)
    return pair_ablation(run, scope, mode, attention, pairs=labels, reference=reference, **options)


def _trace(model: Any, weights: CircuitWeights, tokens: Tensor, start: int) -> FrozenTrace:
    try:
        return trace(model, tokens, weights=weights)
    except (ValueError, IndexError) as error:
        raise type(error)(f"{error} (of sequences {start} to {start + len(tokens) - 1})") from error


def pattern_bytes(weights: CircuitWeights, length: int) -> int:
    """The size of one sequence's attention patterns."""
    return weights.n_layers * weights.n_heads * length**2 * weights.compute_dtype.itemsize


def _even(total: int, most: int, size: int) -> int:
    """The size of equal parts of a total, none larger than `most`, in rounds of `size` parts."""
    rounds = max(1, ceil(total / (most * size)))
    return max(1, ceil(total / (rounds * size)))


def _reversed(pair: Any) -> tuple[Any, ...]:
    return tuple(reversed(pair))


def _cut(tokens: Any, sequences: slice) -> Any:
    """What is asked about some of the sequences, where each has its own."""
    return tokens[sequences] if isinstance(tokens, Tensor) and tokens.dim() else tokens
