"""How processes share a sweep: by sequences, by experiments or by the vocabulary, as `plan` or the user has it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.processes import ALONE, Processes, mesh, sharing_the_vocabulary
from pyfastcircuits.sweeps.corpus import Sequences
from pyfastcircuits.sweeps.plan import plan
from pyfastcircuits.sweeps.store import Store
from pyfastcircuits.sweeps.work import Cut, Split, SweepScope, Work


@dataclass(frozen=True)
class Sharing:
    """A split of a sweep over processes.

    Attributes:
        split: by what.
        processes: that share it.
    """

    split: Split
    processes: Processes

    @staticmethod
    def of(work: Work, source: Sequences, processes: Processes, split: Split | Literal["auto"]) -> "Sharing":
        """The split that is asked for, or that which the plan for a machine of this kind chooses."""
        if processes is ALONE or split == "none":
            return Sharing("none", ALONE)
        if split == "auto":
            what = work.scope, work.mode, work.attention
            split = fastest(work.weights, what, source, processes, low_memory=work.options["low_memory"])
        return Sharing(split, processes)

    @property
    def dealt(self) -> Processes:
        """The processes that chunks are dealt out to: with a shared vocabulary all run every chunk."""
        return ALONE if self.split == "vocabulary" else self.processes

    @property
    def writes(self) -> bool:
        """Whether this process stores what it finds, which with a shared vocabulary all find."""
        return self.dealt is not ALONE or self.processes.rank == 0

    @property
    def vocabulary(self) -> AbstractContextManager[None]:
        """In which the sweep runs."""
        return sharing_the_vocabulary(self.processes) if self.split == "vocabulary" else nullcontext()

    def cut(self, cut: Cut, sequences: int | None, experiments: int) -> Cut:
        """Chunks no larger than these, of which all processes have as many."""
        return cut.for_processes(self.split, self.processes.size, sequences, experiments)

    @contextmanager
    def opened(self, store: Callable[[bool], Store]) -> Iterator[Store]:
        """The store of all processes: the first one opens it, then the others join; all have the first one's error."""
        found: Store | None = None
        error: Exception | None = None
        if self.processes.rank == 0:
            try:
                found = store(True)
            except (ValueError, OSError) as refused:
                error = refused
        first, *_ = self.processes.told(error)
        if first is not None:
            raise first
        with found or store(False) as joined:
            self.processes.told(None)  # nothing is written before all have looked
            yield joined
        self.processes.told(None)  # nobody looks again before all have written


def fastest(
    weights: CircuitWeights,
    what: tuple[SweepScope, Mode, Attention],
    source: Sequences,
    processes: Processes,
    *,
    low_memory: bool,
) -> Split:
    """The split that the plan for a machine of this kind chooses; by sequences, if nobody knows how many there are."""
    if not source.count:
        return "sequences"
    machine = "H100" if weights.device.type == "cuda" else "laptop"
    found = plan(
        weights, *what, sequences=source.count, length=source.length, processes=processes.size, machine=machine,
        low_memory=low_memory,
    )  # fmt: skip
    return found.chosen.split


def sharded(weights: CircuitWeights) -> CircuitWeights:
    """The weights of which all processes hold their own columns of W_U each, copied.

    They are returned as they are where W_U is a view of W_E, which stays whole.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    if weights.tied:
        return weights
    return replace(weights, W_U=distribute_tensor(weights.W_U, mesh(), [Shard(1)], src_data_rank=None))
