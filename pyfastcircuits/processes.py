"""The processes that share a computation, under torchrun or in any process group of `torch.distributed`.

Logsumexps are joined in the order of ranks, in one collective, so that no digit depends on who was first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Processes:
    """One dimension of a DeviceMesh; without one, this process alone.

    Attributes:
        rank, size: the number of this process, and how many there are.
        group: of torch.distributed; None: this process alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def of(mesh: Any) -> "Processes":
        """Those of a DeviceMesh of one dimension."""
        return Processes(mesh.get_local_rank(), mesh.size(), mesh.get_group())

    def columns(self, count: int, rank: int | None = None) -> slice:
        """The part of a process, this one or another, of the columns of the vocabulary: as torch.chunk and DTensor cut.

        Raises:
            ValueError: there are too few columns for each process to have some.
        """
        width = ceil(count / self.size)
        if width * (self.size - 1) >= count:
            raise ValueError(f"the vocabulary has {count} tokens, too few for {self.size} processes")
        first = width * (self.rank if rank is None else rank)
        return slice(first, min(first + width, count))

    def joined(self, own: Tensor, count: int) -> Tensor:
        """The whole [..., count] of columns [..., own] that each process has a part of: one collective."""
        if self.group is None:
            return own
        widths = [part.stop - part.start for part in (self.columns(count, rank) for rank in range(self.size))]
        padded = torch.nn.functional.pad(own, (0, widths[0] - own.shape[-1]))
        parts = zip(self.gathered(padded), widths, strict=True)
        return torch.cat([part[..., :width] for (part,), width in parts], -1)

    def gathered(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """What every process has of tensors of one shape and dtype each, in the order of ranks: one collective."""
        if self.group is None:
            return [tensors]
        mine = torch.cat([x.flatten() for x in tensors])
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(rows, mine, group=self.group)
        sizes = [x.numel() for x in tensors]
        return [tuple(x.view(like.shape) for x, like in zip(row.split(sizes), tensors, strict=True)) for row in rows]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes: one all-reduce, in place. It is exact where all but one have zeros."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def told(self, found: Any) -> list[Any]:
        """What every process tells, anything that can be pickled, in the order of ranks."""
        everybody: list[Any] = [found] * self.size
        if self.group is not None:
            torch.distributed.all_gather_object(everybody, found, group=self.group)
        return everybody


ALONE = Processes()
_SHARING: ContextVar[Processes] = ContextVar("sharing", default=ALONE)


def everybody() -> Processes:
    """All processes of the group that the program has initialised; alone where it has not."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return ALONE
    return Processes.of(mesh())


def mesh() -> Any:
    """All processes of the group that the program has initialised, as a DeviceMesh."""
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    return init_device_mesh(kind, (torch.distributed.get_world_size(),), mesh_dim_names=("processes",))


@contextmanager
def sharing_the_vocabulary(processes: Processes) -> Iterator[None]:
    """Inside, each process multiplies its own columns of W_U and of what is made of W_U, and losses are joined."""
    token = _SHARING.set(processes)
    try:
        yield
    finally:
        _SHARING.reset(token)


def vocabulary_shared() -> Processes:
    """The processes that share the vocabulary."""
    return _SHARING.get()


def dealt(sizes: Sequence[float], hands: int) -> list[list[int]]:
    """Pieces of work of such sizes dealt out so that no hand has much more than another: the largest first."""
    out: list[list[int]] = [[] for _ in range(hands)]
    held = [0.0] * hands
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = held.index(min(held))
        out[least].append(piece)
        held[least] += sizes[piece]
    return [sorted(hand) for hand in out]
