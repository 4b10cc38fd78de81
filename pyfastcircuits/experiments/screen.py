"""The pairs that matter most, certified by second order: exact only in cells that the bounds leave open.

A cell is a pair at a position. Moments of a destination's basis under the clean probabilities are shared by all its
sources; they bound the rise of the loss in every cell (see `second_order`): first those that cost next to nothing.
Where the intervals of pairs that could be among the top n still overlap, cells are evaluated exactly, or all bounded
once more by the covariance of the basis, whichever is less work.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation import all_pairs
from pyfastcircuits.experiments.metrics import Positions
from pyfastcircuits.experiments.options import Measurement, measurement
from pyfastcircuits.experiments.second_order import Basis, Moments, Rows, check_uncapped, parts
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend, sweep_partial
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.result import Result
from pyfastcircuits.run import memory, nodes
from pyfastcircuits.run.losses import Unembedding, slices
from pyfastcircuits.run.nodes import Head, Path, grouped
from pyfastcircuits.run.paths import path_z
from pyfastcircuits.run.trace import FrozenTrace

LEFT_BY_SPREAD = 0.3  # the share of the cells, as work, that is expected to be evaluated after bounds by spread
LEFT_BY_COVARIANCE = 0.05  # and of the cells still open, after bounds by covariance
A_ROUND = 0.75  # of the open width of a pair's interval is closed before intervals are compared again


@dataclass(frozen=True, eq=False, repr=False)
class ScreenedPairs(Result):
    """The top pairs, and how they were found; see `screened_pairs`.

    Attributes:
        error: [n], the most by which each value may miss that of an exhaustive ablation, in nats: 0 where all cells of
            the pair were evaluated exactly.
        exact: how many cells (a pair at a position) were evaluated exactly, of `cells` that there are.
        screened: the destinations whose cells were bounded, because that was less work than ablating them all.
    """

    error: Tensor | None = None
    exact: int = 0
    cells: int = 0
    screened: tuple[Head, ...] = ()

    @property
    def share(self) -> float:
        """The share of cells that were evaluated exactly."""
        return self.exact / max(self.cells, 1)


@public
@torch.no_grad()
def screened_pairs(
    trace: FrozenTrace,
    n: int,
    *,
    pairs: Iterable[Sequence[Sequence[int]]] | None = None,
    targets: Tensor | int | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
    progress: Callable[[float], None] | None = None,
) -> ScreenedPairs:
    """The n pairs that `pair_ablation(trace, "path").top(n)` puts first, in that order, for a part of its work.

    The rise of the loss in a cell, a pair at a position, is bounded from its first and second order. Exact ablations
    are made only of cells of pairs whose intervals overlap where the order of the top n depends on it, the widest cells
    first, until it is settled. Arithmetic chooses for each destination: no screen, where ablating its few sources is
    less work (see `screen_pays`); else bounds from the mean squared length of its basis' columns; and where these leave
    many cells open, bounds from the columns' covariance at each position (see `covariance_pays`).

    Args:
        trace: a frozen run.
        n: how many.
        pairs: [(source, destination), ...]; None: all there are.
        targets, positions, backend: as in head_ablation.
        progress: called with the number of pairs bounded since the last call, times the share of the positions.

    Returns:
        The top pairs with what they add to the loss, each within `error`; `share` says how many cells were exact.

    Raises:
        ValueError: n below 1; pairs that are none; a model whose logits are capped; targets or positions that do not
            fit.
        IndexError: a head, token or position that is out of range.
        RuntimeError: a backend that is not there.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    weights = trace.weights
    every = all_pairs(weights, within_layers=False)
    chosen = list(every) if pairs is None else [nodes.parse_pair(weights, pair) for pair in pairs]
    check_uncapped(trace)
    how = measurement(trace, {"targets": targets, "positions": positions, "backend": backend, "progress": progress})
    with OneDnnMatmul(weights.device):
        cells = _Cells(trace, chosen, how)
        open_cells = cells.to_settle(n)
        while open_cells.any():
            cells.narrow(open_cells)
            open_cells = cells.to_settle(n)
    best = cells.order()[:n]
    low, high = cells.means()
    middle = (low + high)[best] / 2
    dtype = weights.compute_dtype
    baseline = cells.nll.mean()
    return ScreenedPairs(
        [chosen[i] for i in best.tolist()], (baseline + middle).to(dtype), baseline.to(dtype), "nll",
        setup={"scope": "path", "mode": "zero", "attention": "frozen"}, rise=middle.to(dtype),
        error=((high - low)[best] / 2).to(dtype), exact=int(cells.exact.sum()), cells=cells.exact.numel(),
        screened=tuple(head for head, screened in cells.screened.items() if screened),
    )  # fmt: skip


def screen_pays(weights: CircuitWeights, sources: int, positions: int) -> bool:
    """Whether to bound the cells of a destination is less work than to ablate all its sources everywhere.

    In multiply-adds over the vocabulary: an ablation is r at each position; bounds need the mean of the basis, r at
    each position, and its metric, 2 r^2 once. Then some cells are evaluated all the same.
    """
    r = weights.d_value
    exact = sources * positions * r
    return positions * r + 2 * r * r + LEFT_BY_SPREAD * exact < exact


def covariance_pays(weights: CircuitWeights, open_cells: int, positions: int) -> bool:
    """Whether the covariances of a destination's basis, r (r + 1) / 2 a position, are less work than its open cells."""
    r = weights.d_value
    return positions * r * (r + 1) / 2 + LEFT_BY_COVARIANCE * open_cells * r < open_cells * r


class _Cells:
    """Intervals of the rise of the loss of every pair at every position measured, narrowed until they tell enough.

    Attributes:
        low, high: [P, N], fp64.
        exact: [P, N], which cells have been evaluated: there low is high.
        nll: [N], of the clean run.
    """

    def __init__(self, trace: FrozenTrace, pairs: Sequence[Path], how: Measurement) -> None:
        self.trace, self.pairs, self.how = trace, pairs, how
        self.unembedding = Unembedding(trace.weights)
        self.by_destination = grouped(destination for _, destination in pairs)
        self.shared = trace.weights.n_heads // trace.weights.W_V.shape[1]  # query heads that have the same values
        groups = grouped((to.layer, to.head // self.shared) for _, to in pairs)
        # sources in order: destinations with the same values share what is read of a source while it is at hand
        self.by_values = [sorted(places, key=lambda i: pairs[i]) for places in groups.values()]
        shape, device = (len(pairs), how.asked.count), trace.tokens.device
        self.low = torch.zeros(shape, dtype=torch.float64, device=device)
        self.high = torch.zeros_like(self.low)
        self.exact = torch.zeros(shape, dtype=torch.bool, device=device)
        self.nll = self.low.new_zeros(how.asked.count)
        self.screened = {
            head: screen_pays(trace.weights, len(places), how.asked.count)
            for head, places in self.by_destination.items()
        }
        self.by_covariance: set[Head] = set()
        self.kept: list[tuple[Rows, slice]] = []
        self.bases: dict[Head, Basis] = {}
        for rows, span in self._parts():
            self.nll[span] = rows.nll
            for head, places in self.by_destination.items():
                if not self.screened[head]:
                    everywhere = torch.ones_like(self.exact[places, span])
                    self._evaluate(rows, span, self._basis(head), places, everywhere)
            for places in self.by_values:
                self._bound(rows, span, [i for i in places if self.screened[pairs[i][1]]], squares=False)
                if how.progress is not None:
                    how.progress(len(places) * len(rows.targets) / how.asked.count)

    def _bound(self, rows: Rows, span: slice, places: Sequence[int], *, squares: bool) -> None:
        """The intervals of pairs whose destinations share their values."""
        heads = dict.fromkeys(self.pairs[i][1] for i in places)
        moments = {head: Moments.of(rows, self._basis(head), squares=squares) for head in heads}
        for some, delta in self._deltas(rows, places):
            for head, members in grouped(self.pairs[i][1] for i in some).items():
                mine = [some[i] for i in members]
                low, high = moments[head].interval(delta[members])
                if squares:
                    low, high = low.maximum(self.low[mine, span]), high.minimum(self.high[mine, span])
                self.low[mine, span], self.high[mine, span] = low, high

    def _basis(self, head: Head) -> Basis:
        """A destination's basis, of which as many are kept as clean logits may be."""
        found = self.bases.get(head)
        if found is None:
            found = Basis(self.unembedding, head)
            if (len(self.bases) + 1) * found.columns.nbytes <= memory.clean_logits_bytes(found.columns.device):
                self.bases[head] = found
        return found

    def _parts(self) -> Iterator[tuple[Rows, slice]]:
        """The rows of each part, and their places among all positions; those of a single part are kept."""
        if self.kept:
            yield from self.kept
            return
        first, count = 0, self.how.asked.count
        for rows in parts(self.trace, self.how, self.unembedding, more=self.shared * self.trace.weights.d_value**2):
            span = slice(first, first + len(rows.targets))
            if span == slice(0, count):
                self.kept = [(rows, span)]
            yield rows, span
            first = span.stop

    def _deltas(self, rows: Rows, places: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Some of the pairs and their changes [P, N, r], a few at a time."""
        z_bytes = rows.part.tokens.numel() * self.trace.weights.d_value * rows.scale.element_size()
        for some in slices(len(places), max(1, memory.block_bytes(rows.scale.device) // z_bytes)):
            yield list(places[some]), rows.deltas(path_z(rows.part, [self.pairs[i] for i in places[some]]))

    def means(self) -> tuple[Tensor, Tensor]:
        """Bounds of the mean rise of each pair, [P]."""
        return self.low.mean(1), self.high.mean(1)

    def order(self) -> Tensor:
        """The pairs, the largest first; those that cannot be told apart by the middle of their intervals."""
        low, high = self.means()
        return torch.sort(low + high, descending=True, stable=True).indices

    def to_settle(self, n: int) -> Tensor:
        """The cells to evaluate next, [P, N]: the widest of each pair whose place among the top n is open; or none."""
        low, high = self.means()
        chosen = torch.zeros_like(self.exact)
        if not len(low):
            return chosen
        least = low.sort(descending=True).values[min(n, len(low)) - 1]
        near = (high >= least).nonzero()[:, 0]
        near = near[_overlapping(low[near], high[near])]
        left = torch.where(self.exact[near], 0.0, self.high[near] - self.low[near])
        ranked = left.sort(dim=1, descending=True)
        before = ranked.values.cumsum(1) - ranked.values
        wanted = (before < A_ROUND * left.sum(1, keepdim=True)) & (ranked.values > 0)
        chosen[near] = torch.zeros_like(wanted).scatter_(1, ranked.indices, wanted)
        return chosen

    def narrow(self, cells: Tensor) -> None:
        """Ablate these cells [P, N] exactly; of destinations with many, bound their pairs by covariances instead."""
        weights, counts = self.trace.weights, cells.sum(1)
        many = {
            head
            for head, places in self.by_destination.items()
            if head not in self.by_covariance
            and covariance_pays(weights, int(counts[places].sum()), self.how.asked.count)
        }
        self.by_covariance |= many
        for rows, span in self._parts():
            for places in self.by_values:
                again = [i for i in places if self.pairs[i][1] in many and counts[i]]
                self._bound(rows, span, again, squares=True)
            for head, places in self.by_destination.items():
                here = cells[places, span]
                if head not in many and here.any():
                    self._evaluate(rows, span, self._basis(head), places, here)

    def _evaluate(self, rows: Rows, span: slice, basis: Basis, places: Sequence[int], cells: Tensor) -> None:
        """Ablate cells [P, N] of the pairs of one destination exactly."""
        within = cells.any(1).nonzero()[:, 0]
        at = dict(zip((places[i] for i in within.tolist()), within.tolist(), strict=True))
        for some, delta in self._deltas(rows, list(at)):
            chosen = cells[[at[i] for i in some]]
            rise = delta.new_zeros(chosen.shape, dtype=torch.float64)
            rise[chosen] = self._rises(rows, basis, delta, chosen)
            index = torch.tensor(some, device=chosen.device)[:, None]
            columns = torch.arange(span.start, span.stop, device=chosen.device)
            for bound in (self.low, self.high):
                bound[index, columns] = torch.where(chosen, rise, bound[index, columns])
            self.exact[index, columns] |= chosen

    def _rises(self, rows: Rows, basis: Basis, delta: Tensor, chosen: Tensor) -> Tensor:
        """The rises [C] in the chosen cells of changes [P, N, r]."""
        group, backend = torch.zeros(len(delta), dtype=torch.long, device=delta.device), self.how.backend
        tokens, columns = rows.targets[:, None], basis.columns[None]
        if chosen.all():
            sums = sweep_partial(rows.logits, delta, columns, tokens, rows.lse, group=group, backend=backend)
            return sums.nll[chosen]
        out = []
        position, change = chosen.nonzero()[:, 1], delta[chosen]
        at_once = max(1, memory.block_bytes(delta.device) // rows.logits[0].nbytes)
        for some in slices(len(position), at_once):
            at = position[some]
            base, delta, lse = rows.logits[at], change[None, some], rows.lse[at]
            sums = sweep_partial(base, delta, columns, tokens[at], lse, group=group[:1], backend=backend)
            out.append(sums.nll[0])
        return torch.cat(out)


def _overlapping(low: Tensor, high: Tensor) -> Tensor:
    """Which of the intervals [P] have a value in common with another one."""
    order = low.argsort()
    low, furthest = low[order], high[order].cummax(0).values
    touches = low[1:] <= furthest[:-1]  # one that begins earlier
    reached = low[1:] <= high[order][:-1]  # by the next one's beginning
    out = torch.zeros_like(low, dtype=torch.bool)
    out[order[1:]] |= touches
    out[order[:-1]] |= reached
    return out
