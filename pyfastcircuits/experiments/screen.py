"""The pairs that matter most, certified by second order: exact only in cells that the bounds leave open.

A cell is a pair at a position. Moments of a destination's basis under the clean probabilities are shared by all its
sources; they bound the rise of the loss in every cell (see `second_order`). Cells are evaluated exactly only while the
intervals of pairs that could be among the top n overlap.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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

Screen = Literal["none", "spread", "covariance"]
EXPECTED_EXACT = {"spread": 0.3, "covariance": 0.05}  # the share of cells that are left to evaluate, as work
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
    first, until it is settled. Arithmetic chooses for each destination: the covariance of its basis at each position,
    where it has sources enough to share that; bounds from the columns' mean squared length alone, where not; and no
    screen, where ablating its few sources is less work than either (see `cheapest`).

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
            cells.evaluate(open_cells)
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
        screened=tuple(head for head, screen in cells.screens.items() if screen != "none"),
    )  # fmt: skip


def cheapest(weights: CircuitWeights, sources: int, positions: int) -> Screen:
    """The screen that takes the fewest multiply-adds over the vocabulary (here in units of V) for one destination.

    An ablation is r at each position. Bounds need the mean, r at each position, and the basis' metric, 2 r^2 once; the
    covariances are r (r + 1) / 2 more at each. Then some cells are exact all the same.
    """
    r = weights.d_value
    exact = sources * positions * r
    bounds = positions * r + 2 * r * r
    work: dict[Screen, float] = {
        "none": exact,
        "spread": bounds + EXPECTED_EXACT["spread"] * exact,
        "covariance": bounds + positions * r * (r + 1) / 2 + EXPECTED_EXACT["covariance"] * exact,
    }
    return min(work, key=lambda screen: work[screen])


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
        self.by_values = grouped((to.layer, to.head // self.shared) for _, to in pairs)
        shape, device = (len(pairs), how.asked.count), trace.tokens.device
        self.low = torch.zeros(shape, dtype=torch.float64, device=device)
        self.high = torch.zeros_like(self.low)
        self.exact = torch.zeros(shape, dtype=torch.bool, device=device)
        self.nll = self.low.new_zeros(how.asked.count)
        self.screens = {
            head: cheapest(trace.weights, len(places), how.asked.count) for head, places in self.by_destination.items()
        }
        self.kept: list[tuple[Rows, slice]] = []
        self.bases: dict[Head, Basis] = {}
        for rows, span in self._parts():
            self.nll[span] = rows.nll
            for places in self.by_values.values():
                self._bound(rows, span, places)
                if how.progress is not None:
                    how.progress(len(places) * len(rows.targets) / how.asked.count)

    def _bound(self, rows: Rows, span: slice, places: Sequence[int]) -> None:
        """The intervals of pairs whose destinations share their values."""
        moments: dict[Head, Moments] = {}
        for head in {self.pairs[i][1] for i in places}:
            if self.screens[head] == "none":
                mine = self.by_destination[head]
                self._evaluate(rows, span, self._basis(head), mine, torch.ones_like(self.exact[mine, span]))
            else:
                squares = self.screens[head] == "covariance"
                moments[head] = Moments.of(rows, self._basis(head), squares=squares)
        for some, delta in self._deltas(rows, [i for i in places if self.pairs[i][1] in moments]):
            for head, members in grouped(self.pairs[i][1] for i in some).items():
                mine = [some[i] for i in members]
                self.low[mine, span], self.high[mine, span] = moments[head].interval(delta[members])

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
        count = len(low)
        if not count:
            return self.exact.clone()
        least = low.sort(descending=True).values[min(n, count) - 1]
        near = high >= least
        overlap = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None]) & near[:, None] & near[None, :]
        overlap.fill_diagonal_(False)
        width = self.high - self.low
        left = torch.where(self.exact, 0.0, width)
        unsettled = overlap.any(1) & (left.sum(1) > 0)
        ranked = left.sort(dim=1, descending=True)
        before = ranked.values.cumsum(1) - ranked.values
        wanted = (before < A_ROUND * left.sum(1, keepdim=True)) & (ranked.values > 0)
        chosen = torch.zeros_like(self.exact).scatter_(1, ranked.indices, wanted)
        return chosen & unsettled[:, None]

    def evaluate(self, cells: Tensor) -> None:
        """Ablate these cells [P, N] exactly."""
        for rows, span in self._parts():
            for head, places in self.by_destination.items():
                here = cells[places, span]
                if here.any():
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
