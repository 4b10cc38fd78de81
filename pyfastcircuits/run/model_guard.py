"""Which model a run is of, and whether its weights are still the ones that the run was made with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.model.layers import LayerStack
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.forward import Forward


@dataclass(frozen=True, eq=False)
class ModelGuard:
    """A model, with the version counter that torch kept for each of its tensors when the run was made.

    An optimiser step, or any other edit in place, raises the counters. Edits that torch does not see (through `.data`,
    through numpy, of tensors made in inference mode) are noticed by a few entries of every tensor, if those changed.
    """

    weights: CircuitWeights
    forward: Forward
    tensors: tuple[tuple[str, Tensor], ...]
    versions: tuple[int, ...]
    sampled: tuple[Tensor, ...]  # views of a few entries of each tensor
    entries: tuple[Tensor, ...]  # their values when the run was made, joined by device and dtype

    @staticmethod
    def of(weights: CircuitWeights, forward: Forward) -> "ModelGuard":
        """The guard of a model as it is now."""
        every = (*_single(weights), *forward.tensors())
        counted = [(name, x) for name, x in every if not x.is_inference()]
        sampled = tuple(_few(x.detach()) for _, x in every if x.is_floating_point() and not x.is_meta)
        versions = tuple(tensor._version for _, tensor in counted)
        return ModelGuard(weights, forward, tuple(counted), versions, sampled, _joined(sampled))

    def check_unchanged(self) -> None:
        """Compare the counters.

        Raises:
            RuntimeError: a tensor has been edited in place since the run was made.
        """
        for (name, tensor), before in zip(self.tensors, self.versions, strict=True):
            if tensor._version != before:
                raise RuntimeError(
                    f"the weights have been changed in place since this run was made ({name}, by an optimiser step, "
                    "say): what the trace holds no longer belongs to them; trace the model again"
                )

    def check_values(self) -> None:
        """Compare the counters, and a few entries of every tensor.

        Raises:
            RuntimeError: a tensor has been edited in place since the run was made.
        """
        self.check_unchanged()
        if not all(map(torch.equal, self.entries, _joined(self.sampled))):
            raise RuntimeError(
                "the weights have been changed in place since this run was made, past torch's version counters "
                "(through .data, say): what the trace holds no longer belongs to them; trace the model again"
            )

    def check_same(self, other: "ModelGuard", name: str) -> None:
        """Compare two models, by identity or else whole: every option, every layer, every entry.

        Raises:
            ValueError: the run `name` is of another model; the message names a part that differs.
        """
        pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        if self.weights is not other.weights:
            pairs.append((_parts(other.weights), _parts(self.weights)))
        if self.forward is not other.forward and not self.weights.attention_only:
            pairs.append((other.forward.options(), self.forward.options()))
            pairs.append((dict(other.forward.tensors()), dict(self.forward.tensors())))
        for theirs, ours in pairs:
            if difference := _difference(theirs, ours):
                raise ValueError(f"{name} is a run of another model: {difference}")


def _few(tensor: Tensor) -> Tensor:
    """A view of at most three entries along each dimension."""
    return tensor[tuple(slice(None, None, max(1, (size + 2) // 3)) for size in tensor.shape)]


def _joined(sampled: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The entries of all samples, in one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for sample in sampled:
        groups.setdefault((sample.device, sample.dtype), []).append(sample.flatten())
    return tuple(torch.cat(group).nan_to_num() for group in groups.values())


def _single(weights: CircuitWeights) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, layer by layer where layers lie apart."""
    for name, weight in weights.tensors():
        if isinstance(weight, LayerStack):
            yield from ((f"{name}[{layer}]", tensor) for layer, tensor in weight.held_by_layer())
        else:
            yield name, weights.own_W_U if name == "W_U" else weight


def _parts(weights: CircuitWeights) -> dict[str, Any]:
    """Every option, then every tensor, layer by layer where layers lie apart."""
    held = {name for name, _ in weights.tensors()}
    options = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name not in held}
    return options | dict(_single(weights))


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first option or tensor in which two models differ, in words."""
    if theirs.keys() != ours.keys():  # the same tensor, once with its layers in one piece and once apart
        theirs, ours = _by_layer(theirs, ours), _by_layer(ours, theirs)
    for part in (*ours, *theirs):
        mine, other = ours.get(part), theirs.get(part)
        if not isinstance(mine, Tensor) and not isinstance(other, Tensor):
            if mine != other:
                return f"its {part} is {other!r}, ours {mine!r}"
        elif mine is None or other is None:
            return f"only one of the two has {part}"
        elif mine.shape != other.shape:
            return f"its {part} is {list(other.shape)}, ours {list(mine.shape)}"
        elif mine.dtype != other.dtype or mine.device != other.device:
            return f"its {part} is {other.dtype}, ours {mine.dtype}"
        elif not _same_memory(mine, other) and not torch.equal(mine, other):
            return f"its {part} differs"
    return None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr() and a.stride() == b.stride())


def _by_layer(parts: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of all layers cut by layer where those of the other model are."""
    out: dict[str, Any] = {}
    for name, tensor in parts.items():
        apart = name not in like and f"{name}[0]" in like
        out |= {f"{name}[{i}]": layer for i, layer in enumerate(tensor)} if apart else {name: tensor}
    return out
