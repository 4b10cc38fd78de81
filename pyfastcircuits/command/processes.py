"""The command under torchrun: every process runs it, and the first one prints and writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def rank() -> int:
    """The number of this process among those that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def restarted() -> bool:
    """Whether torchrun has started the processes again, because one of them had ended."""
    return _starts() > 0


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def group(device: str) -> Iterator[None]:
    """In which the processes that torchrun has started are a group: by NCCL with a GPU each, by gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(rendezvous("env://"))
    # torchrun keeps its store when it starts processes again, and in it the addresses of those that have ended.
    store = PrefixStore(f"start {_starts()}", store)
    kind = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(kind, store=store, rank=number, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
