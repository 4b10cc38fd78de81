"""The paths whose removal moves the loss most, found without removing all of them: branch and bound over prefixes."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.ablation import path_ablation
from pyfastcircuits.experiments.metrics import Positions
from pyfastcircuits.experiments.options import MeasureOptions, measurement
from pyfastcircuits.experiments.path_reach import Reach
from pyfastcircuits.experiments.second_order import check_uncapped
from pyfastcircuits.ops import Backend
from pyfastcircuits.result import Result
from pyfastcircuits.run import memory
from pyfastcircuits.run.nodes import Head, Path
from pyfastcircuits.run.paths import count_paths, path_z
from pyfastcircuits.run.trace import FrozenTrace

AT_ONCE = 32  # prefixes that are lengthened, or paths that are evaluated, before bounds are compared again
BOUNDS_AN_EVALUATION = 64  # a bound needs no vocabulary: so many may be made for each evaluation of the budget


@dataclass(frozen=True, eq=False, repr=False)
class PathSearch(Result):
    """The largest paths that a search has found, and what it knows of all others; see `top_paths`.

    Attributes:
        evaluated: how many paths were ablated, of `total` that there are.
        bounded: how many prefixes and paths were bounded one by one, without the vocabulary.
        bound: the largest size that the effect of any other path can have, in nats.
        gap: how far `bound` lies above the size of the last path found: 0 where the search is finished.
    """

    evaluated: int = 0
    total: int = 0
    bounded: int = 0
    bound: float = 0.0
    gap: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether no other path can be larger."""
        return self.gap == 0

    @property
    def share(self) -> float:
        """The share of all paths that were evaluated."""
        return self.evaluated / self.total


@public
@torch.no_grad()
def top_paths(
    trace: FrozenTrace,
    n: int,
    *,
    order: int | None = None,
    budget: int | None = None,
    targets: torch.Tensor | int | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
) -> PathSearch:
    """The n paths whose ablation moves the loss most, up or down, by branch and bound: few of the paths are evaluated.

    The effect of a path is that of path_ablation: the rise of the mean loss when the path is taken out under frozen
    attention. The search goes from heads to longer prefixes of paths, the largest bound first. A prefix is bounded by
    the norms of what it has written times the norms of what the gradient of the loss can be through any heads that
    follow, and by a bound of all beyond the first order; a whole path by its first order and that bound. What is
    bounded below the n-th largest effect found is left alone. Bounds are true, rounding included: a search that
    finishes has found the same paths as an evaluation of all.

    Args:
        trace: a frozen run.
        n: how many, at most as many as there are.
        order: of the paths; None: of all orders, the direct path included.
        budget: the most paths to evaluate (and 64 times as many to bound); None: until the result is certified. A
            search that the budget stops says by `gap` what it does not know.
        targets, positions, backend: as in head_ablation.

    Returns:
        The paths found, the largest first, and `certified`, `gap`, `bound`, `evaluated`, `total`, `share`.

    Raises:
        ValueError: n below 1; an order that the model does not have; a budget below 1; a model whose logits are capped;
            targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend that is not there.

    Source: paths are those of "Path Expansion", Elhage et al. 2021.
    """
    weights = trace.weights
    counts = count_paths(weights.n_layers, weights.n_heads)
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    if budget is not None and budget < 1:
        raise ValueError(f"budget is {budget}, expected at least 1, or None")
    orders = range(weights.n_layers + 1) if order is None else range(order, order + 1)
    if not 0 <= orders[0] <= weights.n_layers:
        raise ValueError(f"order is {order}, expected 0 to {weights.n_layers} (the number of layers)")
    check_uncapped(trace)
    options: MeasureOptions = {"targets": targets, "positions": positions, "backend": backend}
    search = _Search(trace, Reach(trace, measurement(trace, options)), orders)
    total = sum(counts[k] for k in orders)
    most = total if budget is None else budget
    found: dict[Path, float] = {}
    while search.queue and len(found) < most and (budget is None or search.bounded < most * BOUNDS_AN_EVALUATION):
        wanted = sorted(found.values(), key=abs)[-n:]
        enough = abs(wanted[0]) if len(found) >= n else -1.0
        if search.bound <= enough:
            break
        whole = search.advance(min(AT_ONCE, most - len(found)), enough)
        if whole:
            rise = path_ablation(trace, whole, **options).means()
            found |= zip(whole, rise.tolist(), strict=True)
    best = sorted(found, key=lambda path: (-abs(found[path]), path))[:n]
    least = abs(found[best[-1]]) if len(best) == min(n, total) else 0.0
    bound = max([abs(found[path]) for path in found.keys() - best] + [search.bound])
    shown: Result = path_ablation(trace, best, **options)
    return PathSearch(
        best, shown.values, shown.baseline, "nll", setup={"order": "all" if order is None else order}, harm="size",
        rise=shown.delta, evaluated=len(found), total=total, bounded=search.bounded, bound=max(bound, 0.0),
        gap=max(search.bound - least, 0.0),
    )  # fmt: skip


class _Search:
    """The paths and prefixes that have been bounded and not yet been looked into, the largest bound first."""

    def __init__(self, trace: FrozenTrace, reach: Reach, orders: range) -> None:
        self.trace, self.reach, self.orders = trace, reach, orders
        self.queue: list[tuple[float, bool, Path]] = []  # minus the bound; whether it is the whole path; the path
        self.bounded = 0
        if 0 in orders:
            heapq.heappush(self.queue, (-torch.inf, True, ()))
        self._lengthen([()])

    @property
    def bound(self) -> float:
        """Of all that is in the queue."""
        return -self.queue[0][0] if self.queue else 0.0

    def advance(self, most: int, enough: float) -> list[Path]:
        """Look into the largest few that are above `enough`: prefixes are lengthened, whole paths are returned."""
        taken: list[tuple[float, bool, Path]] = []
        while self.queue and len(taken) < most and self.bound > enough:
            taken.append(heapq.heappop(self.queue))
        self._lengthen([path for _, whole, path in taken if not whole])
        return [path for _, whole, path in taken if whole]

    def _lengthen(self, prefixes: Sequence[Path]) -> None:
        """Bound each prefix with one more head behind it: as a whole path, and for all that begin with it."""
        bytes_a_path = self.trace.tokens.numel() * self.trace.weights.d_model * self.trace.embedded.element_size()
        at_once = max(1, memory.block_bytes(self.trace.tokens.device) // bytes_a_path)
        longer = iter(self._longer(prefixes))
        while paths := list(itertools.islice(longer, at_once)):
            z = path_z(self.trace, paths)
            ends = [i for i, path in enumerate(paths) if len(path) in self.orders]
            self._push(True, [paths[i] for i in ends], self.reach.sizes([paths[i] for i in ends], z[ends]))
            self._push(False, paths, self.reach.sizes_beyond(paths, z, self.orders))

    def _longer(self, prefixes: Sequence[Path]) -> Iterator[Path]:
        weights, last = self.trace.weights, self.orders[-1]
        for prefix in prefixes:
            first = prefix[-1].layer + 1 if prefix else 0
            still = max(self.orders[0] - len(prefix) - 1, 0)  # heads that must come behind the next one
            for layer in range(first, weights.n_layers - still if len(prefix) < last else first):
                yield from ((*prefix, Head(layer, head)) for head in range(weights.n_heads))

    def _push(self, whole: bool, paths: Sequence[Path], bounds: Sequence[float]) -> None:
        for path, bound in zip(paths, bounds, strict=True):
            if bound > -torch.inf:
                self.bounded += 1
                heapq.heappush(self.queue, (-bound, whole, path))
