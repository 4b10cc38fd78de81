"""The way into every public function: each argument is checked once, against the function's own annotations.

An error names the argument, what came and what was expected. What goes beyond types (shapes, ranges, heads that a model
has) is checked where it is known: `shapes`, `run.nodes`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from math import isfinite
from operator import index
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import torch
from torch import Tensor

from pyfastcircuits.modes import in_plain_modes

Function = TypeVar("Function", bound=Callable[..., Any])


class Allowed:
    """The values that an annotation allows."""

    def __init__(self, hint: Any) -> None:
        self.alternatives = _alternatives(hint)
        self.types = {kind for kind in self.alternatives if isinstance(kind, type)} - {float, Tensor}
        self.choices = {x for kind in self.alternatives if get_origin(kind) is Literal for x in get_args(kind)}

    def checked(self, name: str, value: Any) -> Any:
        """The value, as the first alternative that it fits; errors as `public`."""
        if type(value) in self.types or (type(value) is str and value in self.choices):  # nearly always
            return value if type(value) is not int else _short(name, value)
        if isinstance(value, Tensor) and Tensor in self.alternatives:
            check_dense(name, value)
            return value
        for kind in self.alternatives:
            fits, fitted = _fit(name, value, kind)
            if fits:
                return fitted
        expected = " or ".join(_expected(kind) for kind in self.alternatives if kind is not type(None))
        error = ValueError if self.choices and isinstance(value, str) else TypeError
        raise error(f"{name} is {describe(value)}, expected {expected}")


def public(function: Function) -> Function:
    """Check the function's arguments, and run it in plain modes.

    Integers come as whatever has `__index__` (bools are none), numbers as whatever `float` takes and is finite; they
    arrive as int and float.

    Raises:
        TypeError: an argument of another type, or of no such name.
        ValueError: a string that is no choice, a number that is not finite or an integer of more than 64 bits, a tensor
            that is sparse or quantised.
    """
    parameters = inspect.signature(function).parameters
    names = tuple(name for name, x in parameters.items() if x.kind is not x.KEYWORD_ONLY)
    closed = all(x.kind is not x.VAR_KEYWORD for x in parameters.values())
    kinds = _kinds({name: x.annotation for name, x in parameters.items()})
    whole = () if getattr(function, "takes_sharded", False) else _may_be_sharded(parameters)
    run = in_plain_modes(function)

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        checked = [
            kinds[name].checked(name, value) if name in kinds else value
            for name, value in zip(names, args, strict=False)
        ]
        for name, value in keywords.items():
            if name in kinds:
                keywords[name] = kinds[name].checked(name, value)
            elif name not in parameters and closed:
                called = function.__qualname__ if function.__name__ == "__init__" else function.__name__
                raise TypeError(f"{called}() got an unexpected keyword argument {name!r}")
        for name, place in whole:
            given: Any = args[place] if place < len(args) else keywords.get(name)
            if hasattr(type(given), "sharded") and given.sharded:
                refuse_sharded(name, function)
        return run(*checked, *args[len(names) :], **keywords)

    return cast("Function", call)


def takes_sharded(function: Function) -> Function:
    """Let a public function take weights, or a run of weights, whose W_U is sharded; all others refuse them."""
    function.takes_sharded = True  # type: ignore[attr-defined]
    return function


def refuse_sharded(name: str, function: Callable[..., Any]) -> NoReturn:
    """Raise ValueError: an argument has a sharded W_U."""
    raise ValueError(
        f"{name} has a sharded W_U, of which each process holds its own columns, but {function.__name__}() takes "
        "weights that are whole: give them W_U.full_tensor()"
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor of torch, of which this process holds a part."""
    return hasattr(type(tensor), "to_local")


def check_fields(instance: Any, *, sharded: str = "") -> None:
    """Check the fields of a dataclass against their annotations, but for one that is sharded; errors as `public`."""
    for name, kind in _kinds({field.name: field.type for field in fields(instance)}).items():
        value = getattr(instance, name)
        if name == sharded and is_sharded(value):
            continue
        checked = kind.checked(name, value)
        if checked is not value:
            object.__setattr__(instance, name, checked)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor is sparse, quantised or sharded."""
    if is_sharded(tensor):
        raise ValueError(f"{name} is {describe(tensor)}, expected a whole tensor: its full_tensor()")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"{name} is {describe(tensor)}, expected a dense tensor")


def _kinds(hints: dict[str, Any]) -> dict[str, Allowed]:
    """By parameter or field; left out are those that may be anything, classes that their own methods name, and heads,
    which `run.nodes` knows better.
    """
    free = (Any, inspect.Parameter.empty)
    return {
        name: Allowed(hint)
        for name, hint in hints.items()
        if not isinstance(hint, str) and hint != Sequence[int] and not set(free) & set(_alternatives(hint))
    }


def _may_be_sharded(parameters: Mapping[str, inspect.Parameter]) -> tuple[tuple[str, int], ...]:
    """Name and place of the parameters that may be weights or a run, `self` apart."""
    found = []
    for place, (name, x) in enumerate(parameters.items()):
        several = x.kind in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        kinds = _alternatives(x.annotation)
        if name not in ("self", "cls") and not several and (Any in kinds or any(hasattr(k, "sharded") for k in kinds)):
            found.append((name, len(parameters) if x.kind is x.KEYWORD_ONLY else place))
    return tuple(found)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _alternatives(part))
    return (hint,)


def _fit(name: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether the value is of a kind, and the value as that kind."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if origin is int:
        try:
            return True, _short(name, as_integer(value))
        except (TypeError, RuntimeError):
            return False, value
    if origin is float:
        return _number(name, value)
    if origin is Callable:
        return callable(value), value
    if origin in (Iterable, Sequence, list, tuple):
        scalar = isinstance(value, Tensor) and value.dim() == 0
        return hasattr(value, "__iter__") and not scalar and not isinstance(value, (str, bytes, Mapping)), value
    return isinstance(value, origin) if isinstance(origin, type) else True, value


def as_integer(value: Any) -> int:
    """Whatever has `__index__`; bools, and tensors of them, are no integers.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError("a bool is no integer")
    return index(value)


def as_integers(name: str, values: Any, device: torch.device, *, masks: bool = False) -> Tensor:
    """An integer, or a tensor or a list of them, as a tensor of integers; with `masks`, or of bools.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(values, Tensor) and values.is_meta:
        raise ValueError(f"{name} is on meta, expected a device that holds values")
    try:
        given = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a list of strings, of lists of different lengths
        raise TypeError(f"{name} is {describe(values)}, expected integers of at most 64 bits") from None
    if not isinstance(values, Tensor) and not given.numel():  # torch takes an empty list for floats
        return given.long()
    if given.is_floating_point() or given.is_complex() or (given.dtype == torch.bool and not masks):
        expected = "integers or a mask" if masks else "integers"
        raise TypeError(f"{name} has dtype {given.dtype}, expected {expected}")
    return given


def _short(name: str, number: int) -> int:
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} is {describe(number)}, expected an integer of at most 64 bits")
    return number


def _number(name: str, value: Any) -> tuple[bool, Any]:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return False, value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False, value
    if not isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number")
    return True, number


_EXPECTED = {int: "an integer", float: "a number", bool: "True or False", str: "a string", Tensor: "a tensor"}


def _expected(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is Callable:
        return "a function"
    if origin in (Iterable, Sequence, list, tuple):
        return "a sequence of integers" if kind == Sequence[int] else "a sequence"
    return _EXPECTED.get(origin) or str(origin.__name__)


def describe(value: Any, *, entries: bool = False) -> str:
    """A value for an error message, short and on one line; `entries` shows those of lists and tuples."""
    plain = (bool, int, float, complex, str, bytes, *((list, tuple) if entries else ()))
    if value is None or isinstance(value, plain):
        try:
            text = repr(value)
        except RecursionError:
            text = "a deeply nested sequence"
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        layout = "sharded " if is_sharded(value) else layout
        return f"a {layout}tensor of {value.dtype} and shape {list(value.shape)}"
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    article = "the class" if isinstance(value, type) else "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}"
