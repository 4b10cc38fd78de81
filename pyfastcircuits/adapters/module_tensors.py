"""The tensors of a model in memory by name, as its modules apply them: also quantised, adapted and offloaded ones."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyfastcircuits.adapters.checkpoint import Entry

AT_ONCE = 1024  # rows of the identity that a module is applied to


class ModuleTensors(Mapping[str, Entry]):
    """What `Checkpoint` reads tensors from, of a model in memory.

    A weight that lies in a module as it is applied is given as a view. Of any other module that is affine (one with an
    adapter, a quantised or an offloaded one) the weight is what the module makes of the identity, a layer at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def __getitem__(self, name: str) -> Entry:
        """The tensor of this name."""
        path, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            raise KeyError(name) from None
        if leaf in ("weight", "bias") and _is_changed(module):
            return self._applied(module, leaf, name)
        held = getattr(module, leaf, None)
        if not isinstance(held, Tensor):
            raise KeyError(name)
        return Entry(lambda: held.detach())

    def __iter__(self) -> Iterator[str]:
        """The names in the model's own state."""
        return iter(self.model.state_dict())

    def __len__(self) -> int:
        """The number of names in the model's own state."""
        return len(self.model.state_dict())

    def _applied(self, module: nn.Module, leaf: str, name: str) -> Entry:
        base = _base(module)
        if leaf == "bias" and getattr(base, "bias", None) is None:
            raise KeyError(name)
        if isinstance(base, nn.Embedding) or not hasattr(base, "in_features"):
            return Entry(lambda: _looked_up(module, base, leaf, name))
        size, device = int(base.in_features), _device(module)  # type: ignore[arg-type]
        if leaf == "bias":
            return Entry(lambda: self._at_zero(module, size, device)[0])
        out = int(base.out_features)  # type: ignore[arg-type]
        return Entry(lambda: self._of_identity(module, size, device), torch.Size((out, size)), self.dtype, device)

    @torch.no_grad()
    def _at_zero(self, module: nn.Module, size: int, device: torch.device) -> Tensor:
        at_zero: Tensor = module(torch.zeros(1, size, dtype=self.dtype, device=device))
        return at_zero

    @torch.no_grad()
    def _of_identity(self, module: nn.Module, size: int, device: torch.device) -> Tensor:
        """The weight [out, in] of an affine module."""
        shift, parts = self._at_zero(module, size, device), []
        for first in range(0, size, AT_ONCE):
            rows = torch.zeros(min(AT_ONCE, size - first), size, dtype=self.dtype, device=device)
            rows.diagonal(first).fill_(1)
            parts.append(module(rows) - shift)
        return torch.cat(parts).mT


def _looked_up(module: nn.Module, base: nn.Module, leaf: str, name: str) -> Tensor:
    """The weight of an embedding, by looking all tokens up; of any other module on no device, what it holds."""
    with torch.no_grad():
        if leaf == "weight" and isinstance(base, nn.Embedding):
            device = _device(module)
            table: Tensor = module(torch.arange(base.num_embeddings, device=device))
            return table
    held = getattr(base, leaf)
    hook = getattr(base, "_hf_hook", None)
    if held.is_meta and hook is not None:
        hook.pre_forward(base)
        try:
            return getattr(base, leaf).detach().clone()  # type: ignore[no-any-return]
        finally:
            hook.post_forward(base, None)
    if held.is_meta:
        raise ValueError(f"{name} is on meta, and nothing loads it: expected a device that holds values")
    detached: Tensor = held.detach()
    return detached


def _is_changed(module: nn.Module) -> bool:
    """Whether the module applies something else than the weight it holds."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return hasattr(module, "in_features") or hasattr(module, "base_layer")
    made_by_hook = any(hasattr(hook, "compute_weight") for hook in module._forward_pre_hooks.values())
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return not plain or made_by_hook or hasattr(module, "base_layer")


def _base(module: nn.Module) -> nn.Module:
    """The module that an adapter stands in for."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _device(module: nn.Module) -> torch.device:
    """The device that the module computes on."""
    hook = getattr(module, "_hf_hook", None)
    own = getattr(hook, "execution_device", None)
    if own is not None:
        return torch.device(own)
    return next((x.device for x in module.state_dict().values() if isinstance(x, Tensor)), torch.device("cpu"))
