"""What an experiment does to a run: it takes something out of the final residual stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.trace import FrozenTrace


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """Experiments of one kind: each takes something out of the final residual stream.

    Attributes:
        places: the places of these experiments among all results.
        items: what each experiment takes out: a head, a set of heads or paths, a layer, ...
        remove: a function of a part of the run and some of the items: the part of the final residual stream that each
            takes out, [P, B, T, d]; with write_heads before their W_O, [P, B, T, r].
        of_rows: `remove` is given the positions measured [B, T] too, and its result is of those alone, [P, N, d].
        write_heads: the heads through whose W_O what is taken out was written: one for all experiments, or each
            experiment's own; none: it is given as it lies in the residual stream.
        removes_unembed_bias: whether the bias of the logits is taken out too.
        pairs: each experiment takes out two items at once, and these are their numbers: `remove` is asked for all
            single ones, and experiments that share one share its product with the vocabulary. Only for measurements
            that are `from_sums` under a frozen final norm, where what two items change adds up.
        extra_floats_per_position: numbers per position that `remove` keeps beside what it returns.
    """

    places: Sequence[int]
    items: Sequence[Any]
    remove: Callable[..., Tensor]
    of_rows: bool = False
    write_heads: Sequence[Head] = ()
    removes_unembed_bias: bool = False
    pairs: Sequence[tuple[int, int]] | None = None
    extra_floats_per_position: int = 0

    def removal(self, part: FrozenTrace, members: Sequence[int], where: Tensor) -> Tensor:
        """What some of the experiments take out at positions `where` [B, T] of a part of the run, [P, N, d or r]."""
        items = [self.items[i] for i in members]
        if self.of_rows:
            return self.remove(part, items, where)
        return self.remove(part, items)[..., where, :]

    @property
    def has_own_heads(self) -> bool:
        """Whether each experiment has a write head of its own."""
        return len(self.write_heads) > 1

    def W_O(self, weights: CircuitWeights, members: Sequence[int]) -> Tensor | None:
        """W_O of the experiments' write heads, [P, r, d], or [1, r, d] where one serves all."""
        heads = [self.write_heads[i] for i in members] if self.has_own_heads else self.write_heads
        return torch.stack([weights.head("W_O", *head) for head in heads]) if heads else None
