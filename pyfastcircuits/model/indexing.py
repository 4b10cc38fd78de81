"""Entries of an index of a FactoredMatrix, brought into the forms that torch knows."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import as_integers


def _is_mask(entry: Any) -> bool:
    """Whether an index entry is a tensor that selects where it is true."""
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def axes_of(entry: Any) -> int:
    """How many dimensions an index entry consumes."""
    if entry is None:
        return 0
    return entry.ndim if _is_mask(entry) else 1


def _integers(entry: Any) -> Any:
    if isinstance(entry, (slice, type(None), type(...))) or (
        isinstance(entry, Integral) and not isinstance(entry, bool)
    ):
        return entry
    device = entry.device if isinstance(entry, Tensor) else torch.device("cpu")
    given = as_integers("index", entry, device, masks=True)
    if given.dtype == torch.bool and not given.ndim:
        raise TypeError(f"index is {bool(given)}, expected integers or a mask of an axis")
    return given


def expanded(index: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Sequences and arrays as tensors, and `...` as the slices it stands for.

    Raises:
        TypeError: an entry of something else than integers, or a bool alone.
    """
    entries = [_integers(entry) for entry in index]
    dots = [i for i, entry in enumerate(entries) if entry is ...]
    used = sum(axes_of(entry) for entry in entries) - len(dots)
    if used > len(shape):
        raise ValueError(f"{tuple(index)} is too long an index for a FactoredMatrix with shape {shape}")
    if len(dots) > 1:
        raise IndexError(f"{tuple(index)}: an index can have only one '...'")
    for i in dots:
        entries[i : i + 1] = [slice(None)] * (len(shape) - used)
    return entries


def kept_axis(entry: Any, size: int) -> Any:
    """An integer index of a matrix axis as a slice of length 1."""
    single = isinstance(entry, Integral) or (isinstance(entry, Tensor) and entry.ndim == 0 and not _is_mask(entry))
    if not single:
        return entry
    value = int(entry)
    if not -size <= value < size:
        raise IndexError(f"index {value} is out of range for a matrix axis of size {size}")
    return slice(value, value + 1 or None)
