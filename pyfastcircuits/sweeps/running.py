"""Runs the chunks of a sweep in their order: what is stored already is read, the rest is run and stored."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfastcircuits.processes import ALONE, Processes
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
        processes: that share the chunks.
        writes: whether this one stores what it finds.
    """

    work: Work
    source: Sequences
    progress: Callable[[float], None]
    warn: Callable[[str], None]
    most: Cut
    processes: Processes = ALONE
    writes: bool = True
    _block: "_Block | None" = None  # the last one read

    def run(self, cut: Cut, store: Store | None = None, ranking: Ranking | None = None) -> Moments:
        """Run all chunks, or those up to where the ranking is settled; the sums over them.

        Each process runs one of the next chunks that are not stored, and then all tell the others what they have found:
        so all have the same sums, those of one process alone, and end together.
        """
        total, count = Moments.of(self.work), len(self.work.labels)
        if store is not None:  # at once, so that it does not count as fast
            self.progress(sum(shape[0] * self._share(shape) for shape in store.shapes.values()))
        effects: dict[int, list[Tensor]] = {}  # of the sequences whose chunks have not all been seen, by the first
        every = cut.chunks(self.source.count, count, self.processes.size)
        for chunks, found in self._rounds(every, store):
            for chunk in chunks:
                here = found.get(chunk.index) or (store.find(chunk.index) if store and chunk.index in store else None)
                if here is None or not here.chunk.shape[0]:
                    return total
                total.add(here)
                start = chunk.sequences.start
                effects.setdefault(start, []).append(here.effects[self.work.metric.name])
                if chunk.experiments.stop < count:
                    continue
                all_of_them = torch.cat(effects.pop(start), 1)
                if ranking is not None:
                    ranking.add(all_of_them)
                    if ranking.settled:
                        return total
                if here.chunk.shape[0] < cut.sequences:
                    return total
        return total

    def _rounds(
        self, chunks: Iterator[Chunk], store: Store | None
    ) -> Iterator[tuple[list[Chunk], dict[int, Findings]]]:
        """The next chunks, and what processes have found of those that are not stored, of which each runs one."""
        following: list[Chunk] = []
        new: list[Chunk] = []
        for chunk in chunks:
            following.append(chunk)
            if store is None or chunk.index not in store:
                new.append(chunk)
            if len(new) == self.processes.size or not new:
                yield following, self._round(new, store)
                following, new = [], []
        yield following, self._round(new, store)

    def _round(self, new: Sequence[Chunk], store: Store | None) -> dict[int, Findings]:
        if not new:
            return {}
        mine = self._of_source(new[self.processes.rank]) if self.processes.rank < len(new) else None
        if mine is not None and store is not None and self.writes:
            store.add(mine)
        told = self.processes.told(mine)
        others = (x.chunk.shape for rank, x in enumerate(told) if x is not None and rank != self.processes.rank)
        self.progress(sum(shape[0] * self._share(shape) for shape in others))
        return {x.chunk.index: x for x in told if x is not None}

    def _of_source(self, chunk: Chunk) -> Findings | None:
        """The findings of a chunk; None where the source has ended before it."""
        start = chunk.sequences.start
        if self._block is None or self._block.start != start:
            self._block = None  # before the next one is there
            self._block = _Block.read(self.work, self.source, start, chunk.sequences.stop)
        count = len(self._block.tokens)
        return self._found(replace(chunk, sequences=slice(start, start + count)), self._block) if count else None

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
