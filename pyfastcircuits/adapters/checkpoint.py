"""The configuration and the named tensors of a Hugging Face model, in memory or in a folder: both are read alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyfastcircuits.model.layers import Deferred, Layers, LayerStack

_REQUIRED = object()


@dataclass(frozen=True)
class Entry:
    """A named tensor, which `make` gives; with a shape, dtype and device, making it takes work."""

    make: Callable[[], Tensor]
    shape: torch.Size | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that checks what is read from it: errors name an option or tensor that is missing or does not fit.

    Attributes:
        where: the name of the checkpoint in messages.
        config: the content of config.json, or of the model's configuration.
        tensors: by name.
        prefix: the name of the model body, with which tensor names start; a folder may leave it out.
        model: the model, if it is in memory: its modules know better than its configuration.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    prefix: str
    model: nn.Module | None = None

    @property
    def n_layers(self) -> int:
        """The number of layers.

        Raises:
            ValueError: the configuration has none, or fewer than one.
        """
        count = int(self.option("num_hidden_layers", self.option("n_layer", self.option("num_layers", 0))))
        if count < 1:
            raise ValueError(f"the configuration of {self.where} has no layers")
        return count

    def option(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value of the configuration; null counts as missing.

        Raises:
            ValueError: the value is missing and has no default.
        """
        value = self.config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"the configuration of {self.where} has no {name!r}")
        return default

    def first_option(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of several names of a value that the configuration has; errors as `option`."""
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        return self.option(names[0], default)

    def refuse(self, name: str, why: str) -> None:
        """Raise ValueError if this option, which is not supported, is on."""
        if self.config.get(name):
            raise ValueError(f"{self.where}: {name} is {self.config[name]!r}, and {why}")

    def module(self, name: str) -> Any:
        """The module of this name; None if the model is not in memory, or has none."""
        try:
            return None if self.model is None else self.model.get_submodule(name)
        except AttributeError:
            return None

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return any(n in self.tensors for n in self._names(name))

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name as a view (float16 is converted to float32), of any shape if none is given.

        Raises:
            ValueError: there is no such tensor, or it has another shape.
        """
        found, entry = self._entry(name)
        tensor = entry.make()
        self._check_shape(found, tensor.shape, shape)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def shape(self, name: str) -> torch.Size:
        """The shape of the tensor of this name; errors as `tensor`."""
        entry = self._entry(name)[1]
        return entry.make().shape if entry.shape is None else entry.shape

    def layers(self, name: str, *shape: int, view: Callable[[Tensor], Tensor]) -> Layers:
        """The tensors of all layers, `{}` in the name being the layer, each through `view`."""
        return LayerStack([self._layer(name.format(i), shape, view) for i in range(self.n_layers)])

    def stack(self, name: str, *shape: int, view: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Small tensors of all layers as one: [L, ...]; zeros where a model in memory has some only in other layers."""
        names = [name.format(i) for i in range(self.n_layers)]
        here = next((i for i in names if self.has(i)), names[0])
        like = self.tensor(here, *shape)
        missing = [self.model is not None and not self.has(i) for i in names]
        each = [
            torch.zeros_like(like) if gone else self.tensor(i, *shape) for i, gone in zip(names, missing, strict=True)
        ]
        return torch.stack(each if view is None else [view(tensor) for tensor in each])

    def _layer(self, name: str, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor | Deferred:
        found, entry = self._entry(name)
        if entry.shape is None or entry.device is None:
            return view(self.tensor(name, *shape))
        self._check_shape(found, entry.shape, shape)
        viewed = view(torch.empty(entry.shape, device="meta")).shape
        dtype = torch.float32 if entry.dtype == torch.float16 else entry.dtype
        return Deferred(lambda: view(self.tensor(name, *shape)), viewed, dtype, entry.device)

    def _entry(self, name: str) -> tuple[str, Entry]:
        for found in self._names(name):
            if found in self.tensors:
                return found, self.tensors[found]
        raise ValueError(f"{self.where} has no tensor {name!r}, which its configuration asks for")

    def _check_shape(self, name: str, found: torch.Size, expected: tuple[int, ...]) -> None:
        if expected and tuple(found) != expected:
            raise ValueError(
                f"{self.where}: tensor {name!r} has shape {list(found)}, but its configuration says {list(expected)}"
            )

    def _names(self, name: str) -> tuple[str, ...]:
        return (name, name.removeprefix(self.prefix + "."))


def by_head(count: int) -> Callable[[Tensor], Tensor]:
    """How to view a bias [count * r] by heads: [count, r]."""
    return lambda bias: bias.unflatten(0, (count, -1))


def heads_in(count: int) -> Callable[[Tensor], Tensor]:
    """How to view the weight [count * r, d] of a Linear that makes queries, keys or values, by heads: [count, d, r]."""
    return lambda weight: weight.unflatten(0, (count, -1)).mT


def heads_out(count: int) -> Callable[[Tensor], Tensor]:
    """How to view the weight [d, count * r] of a Linear that reads all heads, by heads: [count, r, d]."""
    return lambda weight: weight.unflatten(1, (count, -1)).permute(1, 2, 0)
