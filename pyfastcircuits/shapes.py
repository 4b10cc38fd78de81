"""Shapes, dtypes and ranges of the ops' arguments and results, in one place below the typed ops and the Triton kernels.

`check_shapes` reads shapes in the letters of the docstrings: `check_shapes(q=(q, "B H T r"), k=(k, "B Hkv T r"))` gives
the sizes by letter. The functions named `*_outputs` allocate an op's results from its own arguments, not initialised:
the kernels fill them, and torch.compile takes their shapes.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.arguments import public

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = {int: "integers", float: "floating point", bool: "torch.bool"}
SCREENS = ("auto", "none", "bf16")
MOST = {"cpu": 1 << 24, "triton": 1 << 16, "cuda": 1 << 16}  # k of a whole matrix, in factored_topk
MOST_PER_ROW = {"cpu": 1 << 16, "triton": 1024, "cuda": 1024}

Argument = tuple[Tensor | None, str] | tuple[Tensor | None, str, type]


def check_shapes(**arguments: Argument) -> dict[str, int]:
    """The sizes by letter of `name=(tensor, "T V")`, or of `name=(tensor, "T", int)` for what is no factor.

    A letter is bound by the first tensor that has it; a number in its place is that size. The first tensor has one of
    DTYPES, and all others are on its device. The third entry says which dtypes the tensor may have: `int` any integers,
    `float` any floating point, `bool` that one; without it, that of the first tensor. A tensor that is None is skipped.

    Raises:
        ValueError: a shape or device that does not fit, with both.
        TypeError: a dtype that does not fit.
    """
    sizes: dict[str, int] = {}
    start = next(iter(arguments))
    first = arguments[start][0]
    assert first is not None
    device, dtype = first.device, first.dtype
    for name, (tensor, shape, *kind) in arguments.items():
        if tensor is None:
            continue
        letters, found = shape.split(), tensor.shape
        fits = len(letters) == len(found)
        if fits:
            for letter, size in zip(letters, found, strict=True):
                known = sizes.get(letter)
                if known is None:
                    known = sizes[letter] = int(letter) if letter.isdigit() else size
                if known != size:
                    fits = False
        if not fits:
            expected = [sizes[x] for x in letters] if sizes.keys() >= set(letters) else letters
            raise ValueError(f"{name} has shape {list(found)}, expected [{', '.join(map(str, expected))}]")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {start} is on {device}")
        if not kind:
            if tensor.dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}, but {start} has {dtype}")
            if dtype not in DTYPES:
                raise TypeError(f"{name} has dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        elif kind_of(tensor.dtype) is not kind[0]:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {KINDS[kind[0]]}")
    return sizes


def kind_of(dtype: torch.dtype) -> type:
    """The Python type of a tensor's entries: bool, int, float or complex."""
    return bool if dtype == torch.bool else float if dtype.is_floating_point else complex if dtype.is_complex else int


def check_sweep(base: Tensor, delta: Tensor, basis: Tensor, group: Tensor | None, **others: Argument) -> dict[str, int]:
    """`check_shapes` of what every sweep has (ablations P, groups of them G), and of others."""
    factors: dict[str, Argument] = {"base": (base, "T V"), "delta": (delta, "P T r"), "basis": (basis, "G r V")}
    return check_shapes(**factors, group=(group, "P", int), **others)


def check_product(**arguments: Argument) -> dict[str, int]:
    """`check_shapes`, where the first two are factors: if their inner sizes differ, the error shows both."""
    (name, (left, rows, *_)), (other, (right, *_)) = islice(arguments.items(), 2)
    assert left is not None
    assert right is not None
    if right.dim() == left.dim() == len(rows.split()) and left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"{name} has shape {list(left.shape)} and {other} {list(right.shape)}: "
            f"their inner dimensions {rows.split()[-1]} differ"
        )
    return check_shapes(**arguments)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is positive or None."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value}, expected a positive number")


@public
def check_range(name: str, values: Tensor, end: int) -> None:
    """Raise IndexError, with the first offender and its place, unless all values are in [0, end)."""
    signed = values.long()  # ids beyond int64 turn negative
    if signed.numel() == 0 or (signed.min() >= 0 and signed.max() < end):
        return
    place = ((signed < 0) | (signed >= end)).nonzero()[0].tolist()
    expected = f"expected 0 to {end - 1}" if end else "but there is nothing to index"
    raise IndexError(f"{name}{place or ''} is {values[tuple(place)].item()}, {expected}")


def in_range(name: str, values: Tensor, end: int) -> Tensor:
    """The values, after `check_range`, which is made in compiled code too."""
    if torch.compiler.is_compiling():
        checked: Tensor = torch.ops.pyfastcircuits.in_range(name, values, end)
        return checked
    check_range(name, values, end)
    return values


@torch.library.custom_op("pyfastcircuits::in_range", mutates_args=())
def _in_range(name: str, values: Tensor, end: int) -> Tensor:
    check_range(name, values, end)
    return values.clone()


@_in_range.register_fake
def _(name: str, values: Tensor, end: int) -> Tensor:
    return torch.empty_like(values)


def check_positive_entries(name: str, values: Tensor | None) -> None:
    """Raise ValueError, with the first offender and its place, unless all are positive; torch.compile skips this."""
    if values is None or torch.compiler.is_compiling() or values.device.type != "cpu":
        return
    bad = ~((values > 0) & values.isfinite())
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {values[tuple(place)].item()}, expected a positive number")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise ValueError, with the first offender and its place, unless all are finite; torch.compile skips this."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_meta:
            raise ValueError(f"{name} is on meta, expected a device that holds values")
        if tensor is not None and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            place = (~tensor.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}{place} is {tensor[tuple(place)].item()}, expected finite values")


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and of results: the tensor's own, and float32 for bfloat16."""
    return torch.promote_types(tensor.dtype, torch.float32)


def register_outputs(op: str, outputs: Callable[..., Any]) -> None:
    """Tell torch.compile the shapes of an op's results: those that `outputs` allocates.

    Torch runs this too where a tensor of device "meta" is among others: then it raises, as any other op of torch does.
    """

    def fake(*arguments: Any) -> Any:
        schema = getattr(torch.ops.pyfastcircuits, op).default._schema.arguments
        first: tuple[str, torch.device] | None = None
        for parameter, argument in zip(schema, arguments, strict=False):
            for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(tensor, Tensor):
                    first = first or (parameter.name, tensor.device)
                    if tensor.device != first[1]:
                        raise ValueError(f"{parameter.name} is on {tensor.device}, but {first[0]} is on {first[1]}")
        return outputs(*arguments)

    torch.library.register_fake(f"pyfastcircuits::{op}", fake)


Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def sweep_nll_outputs(base: Tensor, delta: Tensor, basis: Tensor, tokens: Tensor, *others: Any) -> Four:
    """Gain and log total [P, T], changes of the tokens' logits [P, T, K], mean change [P, T] (or [0, T]); fp64."""
    _group, _scale, _clean_lse, expected, *_options = others
    return _changes(len(delta), base, tokens, expected)


def joint_nll_outputs(base: Tensor, delta: Tensor, basis: Tensor, tokens: Tensor, *others: Any) -> Four:
    """The same of pairs of ablations."""
    _group, pairs, _clean_lse, expected, *_options = others
    return _changes(len(pairs), base, tokens, expected)


def _changes(count: int, base: Tensor, tokens: Tensor, expected: bool) -> Four:
    shape = (count, len(base))
    gain, log_total, picked, mean = (
        base.new_empty(s, dtype=torch.float64)
        for s in (shape, shape, (*shape, tokens.shape[1]), shape if expected else (0, len(base)))
    )
    return gain, log_total, picked, mean


def logits_lse_outputs(base: Tensor, delta: Tensor, *others: object) -> Tensor:
    """Logsumexps [P, T] in fp64."""
    return base.new_empty(delta.shape[:2], dtype=torch.float64)


def target_ranks_outputs(base: Tensor, delta: Tensor, *others: object) -> Tensor:
    """Ranks [P, T] int64."""
    return base.new_empty(delta.shape[:2], dtype=torch.long)


def diagonal_ranks_outputs(A: Tensor, B: Tensor, columns: Tensor) -> Tensor:
    """Ranks [N] int64."""
    return A.new_empty(len(A), dtype=torch.long)


def factored_topk_outputs(A: Tensor, B: Tensor, k: int, largest: bool, per_row: bool, *others: object) -> Three:
    """Values, rows and columns of the entries, [k] or [N, k]."""
    values = A.new_empty((len(A), k) if per_row else (k,), dtype=work_dtype(A))
    return values, torch.empty_like(values, dtype=torch.long), torch.empty_like(values, dtype=torch.long)


def pair_norms_outputs(left: Tensor, right: Tensor, *others: object) -> Tensor:
    """Norms [N, M]."""
    return left.new_empty(len(left), len(right), dtype=work_dtype(left))


def frozen_attention_outputs(
    q: Tensor, k: Tensor, values: Tensor, lse: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """Results [S, B, H, T, s] (transposed [S, B, Hkv, T, s]), and logsumexp [B, H, T] in fp64 or [0, H, T] if given."""
    *_options, transposed, _precision = others
    streams, batches, _, positions, width = values.shape
    heads = (k if transposed else q).shape[1]
    out = values.new_empty(streams, batches, heads, positions, width, dtype=work_dtype(q))
    return out, q.new_empty(batches if lse is None else 0, q.shape[1], positions, dtype=torch.float64)
