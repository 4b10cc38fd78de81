"""What a sweep costs, counted from its algorithm: the steps of experiments.measure, with sizes in place of tensors.

Work is counted by kind, because a machine does each kind at a rate of its own (see machines). Nothing here knows of
time, and nothing is fitted to a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil

from pyfastcircuits.experiments import cuts
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.sweeps.architectures import Architecture
from pyfastcircuits.sweeps.work import SweepScope

FLOAT = 4  # bytes: weights may be narrower, all else is computed in fp32
EFFECT = 7  # multiply-adds on a changed logit beside its product: a polynomial of degree 5, and two sums
PAIR = 9  # on one of a pair of heads, whose products are there already
SHARED = 16  # experiments in a task of the kernel, which makes a position's clean probabilities once


@dataclass(frozen=True)
class Work:
    """Amounts of work, by kind."""

    products: float = 0.0  # multiply-adds of matrix products
    plain_products: float = 0.0  # of those outside `measure`, which torch's own library makes
    patterns: float = 0.0  # multiply-adds of patterns with values, and of queries with keys
    changes: float = 0.0  # logits that an experiment changes
    scaled_changes: float = 0.0  # and of these, the ones that another norm scale changes too
    change_products: float = 0.0  # multiply-adds in the kernel that makes and consumes those changes
    pair_changes: float = 0.0  # logits that two heads change together
    logits: float = 0.0  # clean logits, of which an exponential is made
    scores: float = 0.0  # attention scores that become patterns
    moved: float = 0.0  # bytes that elementwise work reads and writes
    calls: float = 0.0  # of torch

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(*(getattr(self, x.name) + getattr(other, x.name) for x in fields(self)))

    def __mul__(self, times: float) -> "Work":
        """So many times."""
        return Work(*(getattr(self, x.name) * times for x in fields(self)))

    @property
    def flops(self) -> float:
        """Floating-point operations, two to a multiply-add."""
        multiply_adds = self.products + self.plain_products + self.patterns + self.change_products
        return 2 * (multiply_adds + EFFECT * self.changes + PAIR * self.pair_changes)

    @property
    def exponentials(self) -> float:
        """Exponentials, of attention scores and of clean logits; those of changes are polynomials."""
        return self.logits + self.scores


@dataclass(frozen=True)
class Task:
    """One process' part of a sweep.

    Attributes:
        architecture, scope, mode, attention, low_memory: as of the sweep.
        sequences, length: B and T, of the sequences that this process runs.
        share: the part of the experiments that it makes.
        columns: of the vocabulary, that it multiplies.
        orders: the part of term importance that it computes.
        block, clean_block: the bytes of run.memory's bounds on the device.
    """

    architecture: Architecture
    scope: SweepScope
    mode: Mode
    attention: Attention
    low_memory: bool
    sequences: int
    length: int
    share: float
    columns: int
    orders: float
    block: int
    clean_block: int

    @property
    def steps(self) -> dict[str, Work]:
        """The work of each phase of the sweep."""
        return {"clean run": _clean_run(self), "orders": _orders(self) * self.orders, "ablations": _ablations(self)}

    @property
    def experiments(self) -> int:
        """The number of experiments of the sweep, of all processes."""
        a = self.architecture
        heads, across = a.layers * a.heads, a.layers * (a.layers - 1) // 2 * a.heads**2
        return {"layer": a.layers, "head": heads, "joint": heads * (heads - 1) // 2}.get(self.scope, across)

    @property
    def at_once(self) -> int:
        """The number of sequences measured at once: removals of theirs fill a block."""
        a = self.architecture
        width = a.d_head if self.scope in ("path", "direct") else a.d_model
        if self.attention == "recomputed" and self.scope in ("direct", "edge"):
            width = max(width, (a.layers - 1) * a.heads * a.heads * a.d_head)  # z of a layer's heads, for each source
        elif self.scope == "joint" and self.attention == "frozen":
            width = a.heads * a.d_model
        clean = 0 if self.low_memory else FLOAT * self.columns
        at_once = cuts.sequences_at_once(self.length, FLOAT * width, clean, self.block, self.clean_block)
        return min(at_once, max(self.sequences, 1))


class _Layers:
    """The work of a model's layers on some sequences of one stream."""

    def __init__(self, task: Task, sequences: int) -> None:
        self.a, self.positions = task.architecture, sequences * task.length
        self.pattern = sequences * self.a.heads * task.length**2  # entries
        self.stream = FLOAT * self.positions * self.a.d_model  # bytes
        self.z = FLOAT * self.positions * self.a.d_head  # bytes, of one head

    @property
    def read_by_one(self) -> Work:
        """One head's values of a stream, and their mixture."""
        a = self.a
        mixed = self.pattern / a.heads * a.d_head
        return Work(products=self.positions * a.d_model * a.d_head, patterns=mixed, moved=4 * self.z, calls=12)

    @property
    def mixed(self) -> Work:
        """The values of all heads of a stream, and their mixtures."""
        a = self.a
        values = self.positions * a.d_model * a.kv_heads * a.d_head
        moved = 3 * self.stream + 4 * self.z * (a.heads + a.kv_heads) / 2
        return Work(products=values, patterns=self.pattern * a.d_head, moved=moved, calls=10)

    @property
    def written(self) -> Work:
        """What all heads write of their mixtures."""
        a = self.a
        return Work(products=self.positions * a.heads * a.d_head * a.d_model, moved=3 * self.stream, calls=4)

    @property
    def attended(self) -> Work:
        """See FrozenTrace.attend."""
        return self.mixed + self.written

    @property
    def recomputed(self) -> Work:
        """Queries, keys and values of a stream, patterns and mixtures anew."""
        a = self.a
        made = self.positions * a.d_model * (a.heads + a.kv_heads) * a.d_head
        return self.mixed + Work(
            products=made, patterns=self.pattern * a.d_head, scores=self.pattern, moved=4 * self.stream, calls=25
        )

    @property
    def block(self) -> Work:
        """See Forward.block: heads and MLP."""
        return self.recomputed + self.written + self.mlp

    @property
    def mlp(self) -> Work:
        """The MLP, where there is one."""
        a = self.a
        products = (2 + a.gated) * a.d_model * a.d_mlp * self.positions
        return Work(products=products, moved=FLOAT * 4 * a.d_mlp * self.positions, calls=15 if a.d_mlp else 0)


def _clean_run(task: Task) -> Work:
    """See adapters.tracing: the model's own forward pass, and of another library's model what its heads write."""
    layers = _Layers(task, task.sequences)
    each = layers.block + (layers.attended if task.architecture.d_mlp else Work())
    return _plain(each * task.architecture.layers)


def _orders(task: Task) -> Work:
    """See experiments.orders: one graded pass, each layer's heads alone, and 3 L + 3 losses beside the clean one."""
    a, layers = task.architecture, _Layers(task, task.sequences)
    attended = layers.attended * (a.layers * (a.layers + 1) // 2 + a.layers)
    return _plain(attended + _losses(task, task.sequences * (task.length - 1)) * (3 * a.layers + 4))


def _losses(task: Task, rows: int) -> Work:
    """See run.losses.row_losses: logits that are not held."""
    logits = rows * task.columns
    return Work(products=logits * task.architecture.d_model, logits=logits, calls=20)


def _plain(work: Work) -> Work:
    """The same where torch multiplies: outside of ops.onednn."""
    return replace(work, products=0.0, plain_products=work.products + work.plain_products)


def _ablations(task: Task) -> Work:
    """Of all parts of the sequences (see experiments.measure)."""
    whole, rest = divmod(task.sequences, task.at_once)
    sizes = {task.at_once: whole, rest: 1} if rest else {task.at_once: whole}
    centered = Work(moved=FLOAT * 5 * task.architecture.d_model * task.columns, calls=20)
    return sum((_Part(task, size).work * count for size, count in sizes.items()), centered)


class _Part:
    """The ablations of some sequences, measured together."""

    def __init__(self, task: Task, sequences: int) -> None:
        self.task, self.layers = task, _Layers(task, sequences)
        self.a, self.sequences, self.rows = task.architecture, sequences, sequences * (task.length - 1)

    @property
    def work(self) -> Work:
        """All of it."""
        a, logits = self.a, self.rows * self.task.columns
        clean = 1 if self.task.low_memory else 2  # low memory makes them again at every use
        work = Work(products=logits * a.d_model, logits=logits, moved=FLOAT * logits * (clean - 1), calls=60)
        if self.task.scope == "path":
            heads = min(self._kept, (a.layers - 1) * a.heads)
            work += self.layers.read_by_one * (heads * self._ways) + self._read * ceil(heads / a.heads)
        else:  # see FrozenTrace.streams and z
            work += (self.layers.attended + self.layers.mixed) * a.layers
        return sum((group * (count * self.task.share) for count, group in self._groups()), work)

    def _groups(self) -> Iterator[tuple[float, Work]]:
        """Numbers of equal interventions, and the work of one."""
        a, scope = self.a, self.task.scope
        for layer in range(a.layers):
            sources, behind = layer * a.heads, a.layers - 1 - layer
            if scope == "head" or scope == "layer":
                together = a.heads if scope == "layer" else 1
                yield a.heads / together, self._removed([layer] * together, behind)
            elif scope == "joint":
                yield from self._joint(layer)
            elif layer and scope == "edge":
                yield a.heads, self._edge(layer, sources, behind)
                yield 1, self._choices(sources)
            elif layer:
                yield a.heads, self._to_one(layer, sources)
                yield 1, self._choices(sources)

    def _to_one(self, layer: int, sources: int) -> Work:
        """Paths, or direct edges, from all sources to one destination: narrow changes."""
        a, z, frozen = self.a, self.layers.z, self.task.attention == "frozen"
        narrow = cuts.narrow(a.d_head, a.d_model, 1, sources * self.rows)
        depth = a.d_head if narrow else a.d_model
        recomputed = not frozen and a.normed
        blocks = self._blocks(sources, a.d_model if recomputed or not narrow else a.d_head)
        basis = narrow * a.d_head * a.d_model * self.task.columns
        work = Work(products=basis, moved=FLOAT * 3 * narrow * a.d_head * self.task.columns, calls=40 * blocks)
        if frozen:
            gone = Work(products=a.d_head**2 * a.d_model, moved=14 * z, calls=4) + Work(
                products=self.layers.positions * a.d_head**2, patterns=self.layers.pattern / a.heads * a.d_head
            )
            gone = gone * self._ways
            work += gone * sources + self._sources(sources)
        if recomputed or not narrow:
            wide = (6 * recomputed + 3) * FLOAT * self.rows * a.d_model
            work += Work(products=self.rows * a.d_head * a.d_model, moved=wide, calls=20) * sources
        scaled = sources * self.rows * self.task.columns * (recomputed and narrow)
        return work + self._measured(sources, blocks, depth) + Work(scaled_changes=scaled)

    def _sources(self, sources: int) -> Work:
        """What the sources of one destination have mixed."""
        if self.task.scope != "path":  # z of a layer's heads, less the value that takes its place, for each source
            return Work(moved=2 * self.a.heads * self.layers.z, calls=8) * sources
        again = max(0, sources - self._kept)
        return (self.layers.read_by_one * again + self._read * ceil(again / self.a.heads)) * self._ways

    @property
    def _read(self) -> Work:
        """What a layer reads of everything that is no head: what the layers before it write."""
        layers = self.a.layers // 2
        return Work(moved=(3 * layers * (self.a.d_mlp > 0) + 8) * self.layers.stream, calls=10 + layers)

    @property
    def _kept(self) -> int:
        """The number of prefixes that a part of the trace keeps, which are made once."""
        return int(self.task.block // self.layers.z)

    @property
    def _ways(self) -> int:
        """How often outputs are made: a value that takes their place is made of outputs too."""
        return 1 if self.task.mode == "zero" else 2

    def _edge(self, layer: int, sources: int, behind: int) -> Work:
        """Edges from all sources to one destination, and on through all layers behind: changes as wide as the model."""
        a, one = self.a, self.layers
        written = Work(products=one.positions * a.d_head * a.d_model, moved=2 * one.stream, calls=5)
        blocks = self._blocks(sources, a.d_model)
        if self.task.attention == "frozen":
            gone = Work(products=a.d_head**2 * a.d_model + one.positions * a.d_head**2, moved=14 * one.z, calls=4)
            gone += Work(patterns=one.pattern / a.heads * a.d_head, moved=2 * a.heads * one.z, calls=8)
            gone += (one.attended + Work(moved=3 * one.stream)) * behind
        else:
            gone = one.mlp + one.block * behind + Work(moved=6 * one.stream, calls=15)
        return (gone + written) * sources + self._measured(sources, blocks, a.d_model)

    def _choices(self, sources: int) -> Work:
        """See edges._z_changes: all heads of a layer, for each source that they do without."""
        if self.task.attention == "frozen":
            return Work()
        written = Work(products=self.layers.positions * self.a.d_head * self.a.d_model, moved=5 * self.layers.stream)
        return (self.layers.recomputed + written) * sources

    def _removed(self, at: list[int], behind: int) -> Work:
        """A set of heads taken out, and all that follows from them."""
        at_once = cuts.experiments_at_once(self.rows, FLOAT * self.a.d_model, self.task.block)
        share = 1 / min(at_once, max(self.task.experiments, 1))
        return self._gone(at, behind) + self._measured(1, share, self.a.d_model)

    def _gone(self, at: list[int], behind: int) -> Work:
        """See edges.frozen_removal and rerun.rerun_removal: a layer whose heads are out keeps its clean patterns."""
        a, one = self.a, self.layers
        write = Work(products=one.positions * a.d_head * a.d_model, moved=4 * one.stream, calls=8)
        if self.task.attention == "frozen":
            outputs = Work(moved=2 * a.heads * one.z, calls=4) * len(set(at))
            late = one.read_by_one * sum(layer != min(at) for layer in at)
            passed = (one.attended + Work(moved=4 * one.stream, calls=4)) * behind
            return write * len(at) + outputs + late + passed + Work(moved=2 * one.stream, calls=20)
        return write * len(at) + one.mlp + one.block * behind + Work(moved=6 * one.stream, calls=20)

    def _joint(self, layer: int) -> Iterator[tuple[float, Work]]:
        """The pairs whose first head is in a layer."""
        a = self.a
        behind, within = a.layers - 1 - layer, a.heads * (a.heads - 1) // 2
        if self.task.attention == "frozen" and a.heads > 1:  # singles of a layer share their products
            singles, logits = self._gone([layer], behind) * a.heads, self.rows * self.task.columns
            pairs = Work(change_products=a.heads * logits * a.d_model, pair_changes=within * logits)
            yield 1, singles + pairs + Work(logits=logits, calls=60)
        else:
            yield within, self._removed([layer, layer], behind)
        for second in range(layer + 1, a.layers):
            yield a.heads**2, self._removed([layer, second], behind)

    def _blocks(self, experiments: int, width: int) -> int:
        """How many times experiments fill a block."""
        return ceil(experiments / cuts.experiments_at_once(self.rows, FLOAT * width, self.task.block))

    def _measured(self, experiments: int, blocks: float, depth: int) -> Work:
        """Changes of the logits, made and consumed by the kernel."""
        logits = self.rows * self.task.columns
        tasks = max(blocks, experiments / SHARED)
        again = blocks * logits * self.a.d_model * self.task.low_memory  # clean logits that are not held
        return Work(
            products=again,
            changes=experiments * logits,
            change_products=experiments * logits * depth,
            logits=tasks * logits,
            moved=4 * FLOAT * experiments * self.rows * depth,
            calls=60 * blocks,
        )
