"""The caller's modes end where the library begins: autocast, inference mode and a default device change no result.

Gradient modes do count, as in torch itself: what is computed under `torch.no_grad()` has no graph. So whatever an
object keeps is kept for each of the two, see `derived`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Generic, TypeVar, cast, overload

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


def caller_has_modes() -> bool:
    """Whether autocast, inference mode or a default device is on."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    if torch.compiler.is_compiling():  # it compiles for the other two as they are
        return False
    return torch.is_inference_mode_enabled() or torch.empty(0).device.type != "cpu"  # faster than get_default_device()


@contextmanager
def plain_modes() -> Iterator[None]:
    """Without autocast, inference mode and default device; what was in inference mode has no gradients either."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not torch.compiler.is_compiling():
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.no_grad())
            if torch.empty(0).device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
        yield


def in_plain_modes(function: Function) -> Function:
    """Run the function in `plain_modes`: for backward passes, which run in the modes of whoever calls backward()."""

    @wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        if not caller_has_modes():
            return function(*args, **keywords)
        with plain_modes():
            return function(*args, **keywords)

    return cast("Function", run)


def kept_for_backward() -> AbstractContextManager[object]:
    """For values that are kept: what backward() needs of their making is saved with them.

    Within a checkpoint of torch it would be made again, and there the values are found instead of made.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor._version), _unchanged)


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """A saved tensor; torch itself looks for changes in place only where it saves without hooks."""
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that backward() needs has been changed in place since it was used"
        )
    return tensor


class derived(Generic[T]):
    """A property of an object that is computed once and kept, in plain modes.

    It is kept with and without gradients apart, where the object `learns` (has tensors that require them): a read
    under `torch.no_grad()` must not leave a detached value to a differentiable call.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        """Take the function that computes the value."""
        self.compute, self.__doc__ = in_plain_modes(compute), compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        """The name that the value is kept under."""
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "derived[T]": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        """The value, computed if it is not there yet."""
        if instance is None:
            return self
        key = self.name, torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and instance.learns
        kept = instance.__dict__.setdefault("_derived", {})
        if key not in kept:
            with kept_for_backward():
                kept[key] = self.compute(instance)
        return kept[key]
