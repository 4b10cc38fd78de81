"""What groups of paths do together: exact sums by order, by layers, by heads, refined where the mass is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb, prod
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public
from pyfastcircuits.experiments.intervention import Intervention
from pyfastcircuits.experiments.measure import measure
from pyfastcircuits.experiments.metrics import Positions
from pyfastcircuits.experiments.options import Measurement, measurement
from pyfastcircuits.experiments.second_order import LEAST_ROUNDING, ROUNDING
from pyfastcircuits.ops import Backend
from pyfastcircuits.ops.sweep_nll import longest
from pyfastcircuits.result import Label, Result
from pyfastcircuits.run.losses import Unembedding, slices
from pyfastcircuits.run.nodes import grouped
from pyfastcircuits.run.paths import order_streams
from pyfastcircuits.run.patterns import apply_pattern, head_pattern
from pyfastcircuits.run.trace import FrozenTrace

By = Literal["order", "layers", "heads"]


@dataclass(frozen=True, order=True)
class Step:
    """One step of a group's paths: through any one of these heads of a layer."""

    layer: int
    heads: tuple[int, ...]

    def __str__(self) -> str:
        """The head, or the layer whose heads these are."""
        return f"{self.layer}.{self.heads[0]}" if len(self.heads) == 1 else f"layer {self.layer}"


Group = int | tuple[Step, ...]  # all paths of an order, or all that go through one head of each step


@dataclass(frozen=True, eq=False, repr=False)
class PathGroups(Result):
    """Groups that each path is in exactly one of, and what taking each group away does; see `path_groups`.

    Attributes:
        paths: [G], how many paths each group has.
        error: [G], by how much the measured effect of each may be off by rounding, in nats: a bound.
        refined: of each group that was split, its label: what taking it away does, and by how much the effects of its
            parts, added up, miss that. Effects on a loss do not add up, and this is what reading them as if they did
            leaves out.
    """

    paths: Tensor | None = None
    error: Tensor | None = None
    refined: dict[Label, tuple[float, float]] = field(default_factory=dict)


@public
@torch.no_grad()
def path_groups(
    trace: FrozenTrace,
    by: By = "layers",
    *,
    budget: int = 64,
    targets: Tensor | int | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
) -> PathGroups:
    """Take whole groups of paths out of the logits: by order, and finer where they matter most.

    What all paths of a group write is one stream: each layer attends to what the last has written, with some of its
    heads (the graded recursion of order_losses), so a group costs as many passes through a layer as it has heads in a
    row, however many paths it has. The groups are those of all orders at first. Then the group that moves the loss most
    is split, again and again: an order into the sets of layers that its paths go through; a set of layers into the
    heads of one of them, down to single paths. A group that is not split stays whole, and no path is lost.

    Args:
        trace: a frozen run.
        by: how fine groups may become: "order"; "layers"; "heads".
        budget: the most groups to measure, beyond the orders themselves; a group is not split where its parts are more
            than what is left.
        targets, positions, backend: as in head_ablation.

    Returns:
        values [G], the loss without each group. Labels are "order 2", or a tuple of steps, each with its `layer` and
        the `heads` of it that the group's paths go through. The direct path is order 0.

    Raises:
        ValueError: a negative budget; targets or positions that do not fit.
        IndexError: a token or position that is out of range.
        RuntimeError: a backend that is not there.

    Source: "Term importance analysis", Elhage et al. 2021, whose order-k terms these groups split.
    """
    if budget < 0:
        raise ValueError(f"budget is {budget}, expected at least 0")
    weights = trace.weights
    how = measurement(trace, {"targets": targets, "positions": positions, "backend": backend})
    layers, heads = weights.n_layers, weights.n_heads
    groups = _Groups(trace, how)
    groups.measure(list(range(layers + 1)))
    left, refined = budget, dict[Label, tuple[float, float]]()
    while splits := {g: split for g in groups.effects if 0 < (split := _parts(g, by, layers, heads))[0] <= left}:
        group = max(splits, key=lambda group: abs(groups.effects[group]))
        count, make = splits[group]
        left -= count
        parts = make()
        groups.measure(parts)
        effect, _ = groups.effects.pop(group), groups.errors.pop(group)
        refined[_label(group)] = effect, sum(groups.effects[part] for part in parts) - effect
    labels = sorted(groups.effects, key=_place)
    rise = torch.tensor([groups.effects[group] for group in labels], dtype=torch.float64, device=weights.device)
    error = torch.tensor([groups.errors[group] for group in labels], dtype=torch.float64, device=weights.device)
    paths = torch.tensor([_count(group, layers, heads) for group in labels], dtype=torch.float64)
    dtype = weights.compute_dtype
    return PathGroups(
        [_label(group) for group in labels],
        (groups.baseline + rise).to(dtype),
        groups.baseline.to(dtype),
        "nll",
        setup={"by": by},
        harm="size",
        rise=rise.to(dtype),
        paths=paths,
        error=error.to(dtype),
        refined=refined,
    )


def _parts(group: Group, by: By, layers: int, heads: int) -> tuple[int, Callable[[], list[Group]]]:
    """How many parts a group can be split into, 0 for none, and a function that makes them."""
    if isinstance(group, int):
        every = tuple(range(heads))
        sets = combinations(range(layers), group)
        count = comb(layers, group) if group and by != "order" else 0
        return count, lambda: [tuple(Step(layer, every) for layer in chosen) for chosen in sets]
    wide = next((i for i, step in enumerate(group) if len(step.heads) > 1), None)
    if by != "heads" or wide is None:
        return 0, list
    step, before, behind = group[wide], group[:wide], group[wide + 1 :]
    return len(step.heads), lambda: [(*before, Step(step.layer, (head,)), *behind) for head in step.heads]


class _Groups:
    """The effects of groups of paths, and by how much rounding may put them off."""

    def __init__(self, trace: FrozenTrace, how: Measurement) -> None:
        self.trace, self.how = trace, how
        self.effects: dict[Group, float] = {}
        self.errors: dict[Group, float] = {}
        unembedding = Unembedding(trace.weights)
        columns = (unembedding.centered(part) for part in unembedding.slices(0, multiplied=False))
        self.longest = max(map(longest, columns))
        self.baseline = torch.zeros(())

    def measure(self, groups: Sequence[Group]) -> None:
        """Take each of some groups away, all of which are orders, or none."""
        interventions = [
            Intervention(
                places=places,
                items=[groups[i] for i in places],
                remove=self.written,
                removes_unembed_bias=direct,
                extra_floats_per_position=self.trace.weights.d_model * (self.trace.weights.n_layers + 1),
            )
            for direct, places in grouped(group == 0 for group in groups).items()
        ]
        found = measure(self.trace, interventions, self.how, groups)
        self.baseline = found.baseline.double()
        self.effects |= zip(groups, found.means().tolist(), strict=True)
        sums = torch.zeros(len(groups), dtype=torch.float64)
        for some in slices(len(self.trace.tokens), 1):
            part, asked = self.trace[some], self.how.asked[some]
            for i, group in enumerate(groups):
                rows = asked.rows(part.normed(self.written(part, [group])[0], part.weights.n_layers))
                sums[i] += torch.linalg.vector_norm(rows, dim=-1).double().sum().cpu()
        changes = 2 * self.longest * sums / self.how.asked.count
        errors = ROUNDING[self.trace.embedded.dtype] * changes + LEAST_ROUNDING
        self.errors |= zip(groups, errors.tolist(), strict=True)

    def written(self, part: FrozenTrace, groups: Sequence[Group]) -> Tensor:
        """What the paths of each group write to the final residual stream of a part of the run, [G, B, T, d]."""
        most = max((group for group in groups if isinstance(group, int)), default=0)
        streams = order_streams(part, most)
        return torch.stack([streams[g] if isinstance(g, int) else self._through(part, g) for g in groups])

    def _through(self, part: FrozenTrace, steps: tuple[Step, ...]) -> Tensor:
        stream = part.non_head_stream(steps[0].layer)
        for step in steps:
            stream = heads_of(part, stream, step)
        return stream


def heads_of(part: FrozenTrace, stream: Tensor, step: Step) -> Tensor:
    """What some heads of a layer write that read a stream [B, T, d] under their frozen patterns."""
    weights, layer = part.weights, step.layer
    if len(step.heads) == weights.n_heads:
        return part.attend(stream, layer)
    read, written = part.read_by_values(stream, layer), torch.zeros_like(stream)
    for head in step.heads:
        values = read @ weights.head("W_V", layer, head)
        z = apply_pattern(head_pattern(part.patterns[layer], head), values[None, :, None])[0, :, 0]
        written = written + part.apply_post_norm(z @ weights.head("W_O", layer, head), layer)
    return written


def _count(group: Group, layers: int, heads: int) -> int:
    """The number of a group's paths."""
    return comb(layers, group) * heads**group if isinstance(group, int) else prod(len(step.heads) for step in group)


def _label(group: Group) -> Label:
    return f"order {group}" if isinstance(group, int) else group


def _place(group: Group) -> tuple[int, tuple[Step, ...]]:
    """The place of a group among the results: by order, then by layers and heads."""
    return (group, ()) if isinstance(group, int) else (len(group), group)
