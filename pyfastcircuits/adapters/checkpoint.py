"""A Hugging Face configuration and its named tensors, of a model in memory or of a folder, read alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.model.layers import Layers, LayerStack

__all__ = ["Checkpoint", "by_head", "heads_in", "heads_out"]

_REQUIRED = object()


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is read from it is checked; what is missing or has another shape is named.

    Attributes:
        where: what messages call it.
        config: config.json, or its equal.
        tensors: the tensor of each name, by a call.
        prefix: of the names inside the model body, which a folder may leave out.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], Tensor]]
    prefix: str

    @property
    def n_layers(self) -> int:
        """L.

        Raises:
            ValueError: none, or fewer than one.
        """
        count = int(self.option("num_hidden_layers", self.config.get("n_layer", 0)))
        if count < 1:
            raise ValueError(f"the configuration of {self.where} has no layers")
        return count

    def option(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value of the configuration; null counts as missing.

        Raises:
            ValueError: it is missing and there is no default.
        """
        value = self.config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"the configuration of {self.where} has no {name!r}")
        return default

    def refuse(self, name: str, why: str) -> None:
        """Raise ValueError where an option is on that is not supported."""
        if self.config.get(name):
            raise ValueError(f"{self.where}: {name} is {self.config[name]!r}, and {why}")

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return any(n in self.tensors for n in self._names(name))

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor: a view of what is there (float16 is converted to float32).

        Raises:
            ValueError: no such tensor, or one of another shape.
        """
        for found in self._names(name):
            if found in self.tensors:
                tensor = self.tensors[found]()
                if tuple(tensor.shape) != shape:
                    raise ValueError(
                        f"{self.where}: tensor {found!r} has shape {list(tensor.shape)}, but its configuration says "
                        f"{list(shape)}"
                    )
                return tensor.float() if tensor.dtype == torch.float16 else tensor
        raise ValueError(f"{self.where} has no tensor {name!r}, which its configuration asks for")

    def layers(self, name: str, *shape: int, view: Callable[[Tensor], Tensor]) -> Layers:
        """The tensors of all layers, `{}` in the name being the layer, each through `view`."""
        return LayerStack([view(self.tensor(name.format(i), *shape)) for i in range(self.n_layers)])

    def stack(self, name: str, *shape: int, view: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Small tensors of all layers as one: [L, ...]."""
        each = [self.tensor(name.format(i), *shape) for i in range(self.n_layers)]
        return torch.stack(each if view is None else [view(tensor) for tensor in each])

    def _names(self, name: str) -> tuple[str, ...]:
        return (name, name.removeprefix(self.prefix + "."))


def by_head(count: int) -> Callable[[Tensor], Tensor]:
    """A view of a bias [count * r]: [count, r]."""
    return lambda bias: bias.unflatten(0, (count, -1))


def heads_in(count: int) -> Callable[[Tensor], Tensor]:
    """A view of a torch Linear's weight [count * r, d] that makes queries, keys or values: [count, d, r]."""
    return lambda weight: weight.unflatten(0, (count, -1)).mT


def heads_out(count: int) -> Callable[[Tensor], Tensor]:
    """A view of a torch Linear's weight [d, count * r] that reads all heads: [count, r, d]."""
    return lambda weight: weight.unflatten(1, (count, -1)).permute(1, 2, 0)
