"""Runs the chunks of a sweep in their order: what is stored already is read, the rest is run and stored."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from pyfastcircuits.run.trace import FrozenTrace
from pyfastcircuits.sweeps.corpus import Sequences
from pyfastcircuits.sweeps.moments import Moments
from pyfastcircuits.sweeps.ranking import Ranking
from pyfastcircuits.sweeps.store import Store
from pyfastcircuits.sweeps.work import Chunk, Cut, Findings, Work

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "bad_alloc", "out of memory", "Cannot allocate memory")


@dataclass(eq=False)
class Runner:
    """Runs a sweep.

    Attributes:
        work: what is done to each chunk.
        source: the sequences.
        progress: called with the number of sequences finished since the last call.
        warn: called with what the user should know.
        most: how many sequences and experiments are run at a time; less when memory runs out.
    """

    work: Work
    source: Sequences
    progress: Callable[[float], None]
    warn: Callable[[str], None]
    most: Cut

    def run(self, cut: Cut, store: Store | None = None, ranking: Ranking | None = None) -> Moments:
        """Run all chunks, or those up to where the ranking is settled; the sums over them."""
        total, count = Moments.of(self.work), len(self.work.labels)
        chunks = cut.chunks(self.source.count, count)
        if store is not None:  # at once, so that it does not count as fast
            self.progress(sum(shape[0] * self._share(shape) for shape in store.shapes.values()))
        for start, group in groupby(chunks, key=lambda chunk: chunk.sequences.start):
            block: _Block | None = None
            effects: list[Tensor] = []
            for chunk in group:
                if store is not None and chunk.index in store:
                    found = store.find(chunk.index)
                else:
                    block = block or _Block.read(self.work, self.source, start, chunk.sequences.stop)
                    if not len(block.tokens):
                        return total
                    found = self._found(replace(chunk, sequences=slice(start, start + len(block.tokens))), block)
                    if store is not None:
                        store.add(found)
                total.add(found)
                effects.append(found.effects[self.work.metric.name])
            if ranking is not None:
                ranking.add(torch.cat(effects, 1))
                if ranking.settled:
                    return total
            if found.chunk.shape[0] < cut.sequences:
                return total
        return total

    def _share(self, shape: tuple[int, int]) -> float:
        """The part of a sequence's work that a chunk does."""
        return shape[1] / len(self.work.labels) if self.work.labels else 1.0

    def _found(self, chunk: Chunk, block: "_Block") -> Findings:
        """The findings of a chunk, whole or in parts that fit into memory.

        Raises:
            MemoryError: one experiment on one sequence does not.
        """
        sequences, count = chunk.shape
        if sequences <= self.most.sequences and count <= self.most.experiments:
            done = 0.0

            def progress(share: float) -> None:
                nonlocal done
                done += (step := share * sequences * self._share(chunk.shape))
                self.progress(step)

            try:
                return self.work.run(chunk, *block.runs(chunk.sequences), progress)
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not any(x in str(error) for x in _OUT_OF_MEMORY):
                    raise
            self.progress(-done)
            self._take_less(chunk, block)
        first, second = _halves(chunk, sequences > self.most.sequences)
        return _joined(self._found(first, block), self._found(second, block))

    def _take_less(self, chunk: Chunk, block: "_Block") -> None:
        sequences, count = chunk.shape
        block.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if sequences == 1 and count <= 1:
            raise MemoryError(f"one experiment on one sequence of {self.source.length} tokens does not fit into memory")
        half = ((sequences + 1) // 2, count) if sequences > 1 else (1, (count + 1) // 2)
        self.most = Cut(min(self.most.sequences, half[0]), min(self.most.experiments, half[1]))
        self.warn(
            f"out of memory with {sequences} sequences and {count} ablations at a time: going on with {half[0]} and "
            f"{half[1]}"
        )


@dataclass(eq=False)
class _Block:
    """The tokens of some sequences, and of the one before each where that is asked for; and their clean runs."""

    work: Work
    start: int
    tokens: Tensor
    before: Tensor | None
    made: slice | None = None
    kept: tuple[FrozenTrace, FrozenTrace | None] | None = None

    @staticmethod
    def read(work: Work, source: Sequences, start: int, stop: int) -> "_Block":
        """Read them.

        Before the first sequence comes the last, or where nobody knows which that is, the second.

        Raises:
            ValueError: there is one sequence, and what comes before it is asked for.
        """
        if work.mode != "resample":
            return _Block(work, start, source.read(start, stop).to(work.weights.device), None)
        tokens = source.read(max(0, start - 1), stop).to(work.weights.device)
        if start:
            return _Block(work, start, tokens[1:], tokens[:-1])
        other = tokens[1:2] if source.count is None else source.read(source.count - 1, source.count)
        if not len(other) or source.count == 1:
            raise ValueError("mode is 'resample', but the run has one sequence: give several")
        return _Block(work, 0, tokens, torch.cat((other.to(tokens), tokens[:-1])))

    def runs(self, sequences: slice) -> tuple[FrozenTrace, FrozenTrace | None]:
        """The clean runs of some of the sequences, and of those before them."""
        if self.kept is None or self.made != sequences:
            self.forget()
            here = slice(sequences.start - self.start, sequences.stop - self.start)
            run = self.work.trace(self.tokens[here], sequences.start)
            before = None if self.before is None else self.work.trace(self.before[here], sequences.start - 1)
            self.made, self.kept = sequences, (run, before)
        return self.kept

    def forget(self) -> None:
        """Let go of the runs."""
        self.made = self.kept = None


def _halves(chunk: Chunk, sequences: bool) -> tuple[Chunk, Chunk]:
    """Both halves, of the sequences or of the experiments."""
    whole = chunk.sequences if sequences else chunk.experiments
    middle = (whole.start + whole.stop + 1) // 2
    first, second = slice(whole.start, middle), slice(middle, whole.stop)
    if sequences:
        return replace(chunk, sequences=first), replace(chunk, sequences=second)
    return replace(chunk, experiments=first), replace(chunk, experiments=second)


def _joined(first: Findings, second: Findings) -> Findings:
    """What both halves of a chunk have found."""
    one, other = first.chunk, second.chunk
    if one.sequences == other.sequences:
        chunk = replace(one, experiments=slice(one.experiments.start, other.experiments.stop))
        effects = {name: torch.cat((x, second.effects[name]), 1) for name, x in first.effects.items()}
        return replace(first, chunk=chunk, effects=effects)
    chunk = replace(one, sequences=slice(one.sequences.start, other.sequences.stop))
    effects = {name: torch.cat((x, second.effects[name])) for name, x in first.effects.items()}
    joined = (
        torch.cat(pair)
        for pair in ((first.positions, second.positions), (first.clean, second.clean), (first.losses, second.losses))
    )
    positions, clean, losses = joined
    return Findings(chunk, positions, effects, clean, losses)
