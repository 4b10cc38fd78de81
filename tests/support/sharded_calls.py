"""Everything public is called with weights of which each process holds its own columns of W_U, and with whole ones."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import pyfastcircuits as fc
from support.fuzz_calls import ENTRIES, Call
from support.fuzz_values import Choices, World

OWNERS = (None, fc.CircuitWeights, fc.FrozenTrace, fc.Sweep)
APART = ("CircuitWeights.own_W_U", "CircuitWeights.holders", "CircuitWeights.sharded", "FrozenTrace.sharded")
OF_FILES = ("load_weights", "corpus")
NAMES = [
    name
    for name, entry in ENTRIES.items()
    if name in fc.__all__ or (entry.owner in OWNERS and not name.startswith(("ops", "plot", "torch")))
    if name not in (*APART, *OF_FILES) and not name.endswith("__repr__")
]


def outcomes(folder: Path, mesh: Any) -> dict[str, str | float]:
    """By name, of what is called with sharded weights: how far it is from what whole ones give, or its error."""
    found: dict[str, str | float] = {}
    own = folder / f"files of {mesh.get_rank()}"  # which all write at once
    own.mkdir()
    for name in NAMES:
        whole, ours = _outcome(name, own, None), _outcome(name, own, mesh)
        found[name] = ours if isinstance(ours, str) and ours != whole else _apart(ours, whole)
    return found


def _outcome(name: str, folder: Path, mesh: Any) -> Any:
    def weights(world: World) -> fc.CircuitWeights:
        final = {"ln_final_w": world.normal(world.width), "ln_final_b": world.normal(world.width)}
        whole = fc.CircuitWeights(**{**world.fields, "norm": "layernorm"}, **final)
        return whole if mesh is None else replace(whole, W_U=distribute_tensor(whole.W_U, mesh, [Shard(1)]))

    kept = cached_property(weights)
    kept.__set_name__(World, "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "weights", kept)
        try:
            return Call(Choices(lambda count: 0), [name], folder)("")
        except Exception as error:  # whatever it is, the test looks at it
            return f"{type(error).__name__}: {error}"


def _apart(one: Any, other: Any) -> float:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return max((float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs if a.numel()), default=0.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a value but weights, and its numbers."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, (bool, int, float)):
        yield torch.tensor(float(value))
    elif is_dataclass(value) and not isinstance(value, (type, fc.CircuitWeights)):
        for field in fields(value):
            if field.name not in ("guard", "forward", "seconds"):
                yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
