"""Bounds of scratch memory, in one place: what runs and experiments take beyond weights, a trace and their results."""

import torch
from torch import Tensor

from pyfastcircuits.ops.backend import room
from pyfastcircuits.ops.library import give_back_memory

SCRATCH_BYTES = 128 << 20  # the promise for an experiment on a CPU, whatever the number of ablations
BLOCKS = 12  # are alive at most: of deltas and their copies, of bases, of packing
BLOCK_BYTES = SCRATCH_BYTES // BLOCKS
CLEAN_LOGITS_BYTES = 4 * SCRATCH_BYTES  # clean logits held at a time beside the scratch, at least one sequence's
ROWS = 4096  # positions worked on at a time, at least one sequence's: enough for products to run at their full rate
LARGE = 1 << 20  # bytes of a layer's stream, from which on memory is given back after each layer


def block_bytes(device: torch.device) -> int:
    """The bytes of one block on a device."""
    return room(device, BLOCKS * BLOCK_BYTES) // BLOCKS


def clean_logits_bytes(device: torch.device) -> int:
    """The bytes of clean logits that are held at a time on a device."""
    return room(device, CLEAN_LOGITS_BYTES)


def give_back(stream: Tensor) -> None:
    """Give the memory that a layer is done with back to the system, if its streams are large and on the CPU.

    The C library keeps it, in gaps between the tensors that stay, which the next layer's tensors may not fit: then the
    process grows with every layer by several times what is kept of it.
    """
    if stream.device.type == "cpu" and stream.nbytes >= LARGE:
        give_back_memory()
