"""One weight of all layers as a tensor [L, ...], or as a stack of tensors where a model keeps its layers apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is read: of a layer that is quantised, or kept on another device.

    Attributes:
        make: makes it.
        shape, dtype, device: what it will have.
    """

    make: Callable[[], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class LayerStack:
    """L tensors of one shape [...], one for each layer, that index like one tensor [L, ...]; none is copied.

    Raises:
        ValueError: there is no tensor, or shapes or devices differ (the message names the layer).
        TypeError: dtypes differ.
    """

    def __init__(self, layers: Sequence[Tensor | Deferred]) -> None:
        if not layers:
            raise ValueError("layers is empty: a LayerStack needs at least one tensor")
        first = layers[0]
        for i, layer in enumerate(layers):
            if layer.shape != first.shape:
                raise ValueError(f"layers[{i}] has shape {list(layer.shape)}, but layers[0] has {list(first.shape)}")
            if layer.device != first.device:
                raise ValueError(f"layers[{i}] is on {layer.device}, but layers[0] is on {first.device}")
            if layer.dtype != first.dtype:
                raise TypeError(f"layers[{i}] has dtype {layer.dtype}, but layers[0] has {first.dtype}")
        self._layers = tuple(layers)
        self.shape = torch.Size((len(layers), *first.shape))
        self.dtype, self.device = first.dtype, first.device

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)

    def __iter__(self) -> Iterator[Tensor]:
        """Layer by layer."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | tuple[int, ...]) -> Tensor:
        """The tensor of a layer, or with more indices a part of it, as a view."""
        if isinstance(index, int):
            layer = self._layers[index]
            return layer if isinstance(layer, Tensor) else layer.make()
        return self[index[0]][index[1:]]

    def held_by_layer(self) -> Iterator[tuple[int, Tensor]]:
        """Number and tensor of each layer that is not deferred."""
        return ((i, layer) for i, layer in enumerate(self._layers) if isinstance(layer, Tensor))

    @property
    def held(self) -> list[Tensor]:
        """The tensors of the layers that are not deferred."""
        return [layer for _, layer in self.held_by_layer()]

    def dim(self) -> int:
        """The number of dimensions, with that of the layers."""
        return len(self.shape)

    def to(self, target: torch.device | torch.dtype | str) -> "LayerStack":
        """The same stack on another device or in another dtype."""
        return LayerStack([layer.to(target) for layer in self])


Layers = Tensor | LayerStack  # [L, ...]


def stacked(layers: Layers) -> Tensor:
    """One tensor [L, ...]: a copy only where the layers lie apart."""
    return layers if isinstance(layers, Tensor) else torch.stack(list(layers))
