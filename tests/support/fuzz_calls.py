"""What the fuzz calls: everything public, and one call of it, as some choices have it."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

import pyfastcircuits as fc
from support.fuzz_values import SHAPES, Choices, World, hostile, shown

OPERATORS = {
    "__getitem__",
    "__matmul__",
    "__rmatmul__",
    "__mul__",
    "__add__",
    "__sub__",
    "__neg__",
    "__repr__",
    "__len__",
}
WITH_METHODS = (
    fc.CircuitWeights, fc.FrozenTrace, fc.FactoredMatrix, fc.Result, fc.QKTerms, fc.Subspaces, fc.Sweep,
    fc.PathSample, fc.SkipTrigrams, fc.Corpus, fc.Dictionary, fc.Circuit, fc.Faithfulness, fc.Task, fc.NLL, fc.KL,
    fc.LogitDifference, fc.Probability, fc.Rank, fc.Top1, fc.LayerMarginals,
)  # fmt: skip
TYPES = {"Tensor": Tensor, "int": int, "float": float, "bool": bool, "str": str, "List[Tensor]": list}
STRINGS = {
    "precision": ("ieee", "bf16", "tf32", "tf32x3"),
    "screen": ("auto", "none", "bf16"),
    "kind": ("fma", "bf16", "exp"),
}
OPTION_NAMES = {*inspect.signature(fc.CircuitWeights).parameters, *inspect.signature(fc.trace).parameters}


TASK = {"clean": [[0, 1], [1, 0]], "corrupted": [[1, 1], [1, 1]], "answers": [0, 1], "against": [1, [0, 1]]}
TASK_OPTIONS = {"tokenizer": list, "start": 0, "padding": "left", "name": "task"}
OF_ROWS = ("of_clean", "rise")  # of a metric: what they ask of rows is ours to make


class Entry(NamedTuple):
    """Something to call: a function, an op, a class, or a method or property of an instance."""

    name: str
    function: Callable[..., Any] | None  # None: a property
    parameters: tuple[inspect.Parameter, ...] = ()
    owner: type | None = None

    @property
    def names(self) -> set[str]:
        """What an error of this may name."""
        own = {p.name for p in self.parameters} | OPTION_NAMES
        own |= {name[:-1] for name in own if len(name) > 4 and name.endswith("s")}  # "path is ..." of paths
        static = {} if self.owner is None else {x: inspect.getattr_static(self.owner, x) for x in dir(self.owner)}
        fields = {x for x, value in static.items() if not x.startswith("_") and not callable(value)}
        operands = {"shape", "index"} if self.name.rpartition(".")[2] in OPERATORS else set()  # which have no names
        return own | fields | operands | set(getattr(self.owner, "__annotations__", ()))

    @property
    def called(self) -> str:
        """The public name of it in Python's own errors, as a regular expression."""
        bare = self.name.rpartition(".")[2]
        if self.owner is None:
            return bare
        return rf"{bare}\.(?:__init__|__new__)" if bare == self.owner.__name__ else rf"(?:\w+\.)?{bare}"


def signature(function: Any) -> tuple[inspect.Parameter, ...]:
    kept = (p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD)
    return tuple(p for p in kept if p.name not in ("self", "cls"))


def entries() -> Iterator[Entry]:
    """Everything public."""
    for name in fc.__all__:
        found = getattr(fc, name)
        if callable(found):
            yield Entry(name, found, signature(found), found if isinstance(found, type) else None)
    for name in fc.ops.__all__:
        found = getattr(fc.ops, name)
        if inspect.isfunction(found) or isinstance(found, type):
            yield Entry(f"ops.{name}", found, signature(found), found if isinstance(found, type) else None)
    for name in fc.plot.__all__:
        found = getattr(fc.plot, name)
        yield Entry(f"plot.{name}", found, signature(found))
    for owner in WITH_METHODS:
        for name in dir(owner):
            found, whole = inspect.getattr_static(owner, name), f"{owner.__name__}.{name}"
            if not name.startswith("_") and isinstance(found, classmethod):
                yield Entry(whole, getattr(owner, name), signature(getattr(owner, name)), owner)
            elif inspect.isfunction(found):
                if name in OPERATORS or not name.startswith("_"):
                    yield Entry(whole, found, signature(found), owner)
            elif not name.startswith("_") and hasattr(found, "__get__") and not callable(found):
                yield Entry(whole, None, (), owner)
    yield from raw_entries()


def raw_entries() -> Iterator[Entry]:
    """The ops as torch knows them."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("pyfastcircuits::"):
            parameters = []
            for argument in schema.arguments:
                plain = (
                    str(argument.type)
                    .removeprefix("Optional[")
                    .removesuffix("]" if "Optional" in str(argument.type) else "")
                )
                hint = TYPES.get(plain, int)
                hint = hint | None if "Optional" in str(argument.type) else hint
                default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                parameters.append(inspect.Parameter(argument.name, kind, default=default, annotation=hint))
            name = schema.name.removeprefix("pyfastcircuits::")
            if name.endswith("_triton"):  # there only where another test has loaded Triton
                continue
            yield Entry(f"torch.ops.pyfastcircuits.{name}", getattr(torch.ops.pyfastcircuits, name), tuple(parameters))


ENTRIES = {entry.name: entry for entry in sorted(entries(), key=lambda entry: entry.name)}
OFTEN = [  # functions and ops, in the main
    name for name in ENTRIES for _ in range(1 if ENTRIES[name].owner or name.startswith("plot.") else 3)
]
RAW = [name for name in ENTRIES if name.startswith("torch.ops")]


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "a default dtype": float64_by_default,
}


class Call:
    """One call, as the choices have it; `valid` if nothing in it is hostile."""

    def __init__(self, choices: Choices, names: Sequence[str], folder: Path) -> None:
        name = names[choices.draw(len(names))]
        choices.made.append([*ENTRIES].index(name))  # whatever `names` are
        self.entry, self.choices = ENTRIES[name], choices
        self.mode = choices.pick(*MODES) if choices.chance(40) else ""
        self.valid, self.replaced = True, list[str]()
        self.world = World(choices, folder)
        self.arguments = self._arguments()
        entry, bare = self.entry, self.entry.name.rpartition(".")[2]
        bound = entry.owner is not None and bare != entry.owner.__name__ and bare != "from_model"
        self.instance = [instance(entry.owner, self.world)] if bound else []
        hostiles = choices.pick(0, 0, 1, 1, 2) if self.arguments and bare not in OF_ROWS else 0  # whose rows we make
        for _ in range(hostiles):
            name = choices.pick(*self.arguments)
            if name in ("seconds", "out"):  # it would last as long, or write there
                continue
            self.arguments[name] = hostile(choices, self.arguments[name])
            self.valid, self.replaced = False, [*self.replaced, name]
        if entry.function is not None and bare not in OPERATORS and choices.chance(3):
            self.arguments[choices.pick("wrong", "mask_", "Backend")] = 1
            self.valid = False
        self.first = self._leading() if choices.chance(40) else []  # those that come without their names

    def _leading(self) -> list[str]:
        leading = itertools.takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD, self.entry.parameters)
        return [p.name for p in itertools.takewhile(lambda p: p.name in self.arguments, leading)]

    def _arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        world, entry = self.world, self.entry
        for p in entry.parameters:
            if p.default is not p.empty and not self.choices.chance(40):
                continue
            found[p.name] = self._argument(p)
        if found.get("by") != "path":
            found.pop("paths", None) if "by" in {p.name for p in entry.parameters} else None
        if "mode" in found:
            found["reference"] = world.other if found["mode"] == "resample" else None
        if found.get("metric") == "logit_difference":
            found["against"] = 0
        elif "against" in found and entry.name != "LogitDifference":
            found["against"] = None
        if not isinstance(found.get("metric", ""), str):
            found["targets"] = None
        if found.get("outer") is not None and "basis" in found:
            found["basis"] = world.normal(1, world.sizes["d"], world.sizes["V"])
        names = {p.name for p in entry.parameters}
        return {name: value for name, value in found.items() if name in names}

    def _argument(self, p: inspect.Parameter) -> Any:
        world, entry = self.world, self.entry
        if entry.name.rpartition(".")[0].endswith(("ops", "pyfastcircuits")):
            optional = NoneType in get_args(p.annotation) and self.choices.chance(50)
            if optional or p.name in STRINGS:
                return None if optional else self.choices.pick(*STRINGS[p.name])
            if p.name == "values" and entry.name.endswith("_range"):
                return world.integers(4, 3)
            if p.name in SHAPES and (Tensor in (p.annotation, *get_args(p.annotation)) or p.annotation is list):
                ranks = p.name == "tokens" and "rank" in entry.name
                operand = world.operand("targets" if ranks else p.name)
                return [operand] if p.annotation is list else operand
            if p.annotation is float:
                return 0.001
        if entry.name == "Task":
            return (TASK | TASK_OPTIONS)[p.name]
        if entry.owner is fc.CircuitWeights and entry.name == "CircuitWeights" and p.name in world.fields:
            return world.fields[p.name]
        whole = entry.owner is not None and entry.name == entry.owner.__name__
        if (
            whole
            and entry.owner not in (fc.CircuitWeights, fc.FactoredMatrix)
            and not issubclass(entry.owner, fc.NLL.__base__)
        ):
            return getattr(instance(entry.owner, world), p.name)
        if p.name == "rows" and entry.name.endswith(OF_ROWS):
            one, several = world.normal(3, dtype=torch.float64), world.normal(2, 3, dtype=torch.float64)
            clean = SimpleNamespace(nll=one, rank=one, token_logits=(one, one), token_shares=(one, -one))
            changed = SimpleNamespace(
                clean=clean, nll_rise=several, divergence=several, rank=several, token_changes=(several, several)
            )
            return clean if entry.name.endswith("of_clean") else changed
        return world.fitting("path_to" if entry.name.endswith("save") else p.name, p.annotation)

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        first = f"{shown(self.instance[0])}, " if self.instance else ""
        return f"{self.entry.name}({first}{listed}){' in ' + self.mode if self.mode else ''}"[:600]

    def __call__(self, mode: str) -> Any:
        with MODES[mode]():
            if self.entry.function is None:
                return getattr(self.instance[0], self.entry.name.rpartition(".")[2])
            named = {name: value for name, value in self.arguments.items() if name not in [*self.first, "args"]}
            several = [self.arguments["args"]] if "args" in self.arguments else []
            return self.entry.function(*self.instance, *(self.arguments[x] for x in self.first), *several, **named)


def of_result(owner: type, world: World) -> Any:
    result = fc.head_ablation(world.trace)
    return owner(result.labels, result.values, result.baseline, result.metric)


def instance(owner: type, world: World) -> Any:
    """A valid instance of a public class."""
    made = {fc.CircuitWeights: lambda: world.weights, fc.FrozenTrace: lambda: world.trace}
    made |= {fc.FactoredMatrix: world.matrix, fc.Result: lambda: fc.head_ablation(world.trace, kl=True)}
    made |= {fc.Dictionary: world.dictionary}
    made |= {found: lambda: of_result(owner, world) for found in (fc.PathSearch, fc.PathGroups, fc.ScreenedPairs)}
    one = torch.ones(1, dtype=torch.float64, device=world.device)
    made |= {fc.PathSample: lambda: fc.PathSample([((0, 0),)], one, one, 1, "rise")}
    scores = lambda: fc.edge_scores(world.trace, world.other)  # noqa: E731
    circuit = lambda: fc.circuit(scores(), top=3)  # noqa: E731
    explained = lambda: fc.faithfulness(circuit(), world.trace, world.other, sizes=2, minimality=True)  # noqa: E731
    made |= {fc.EdgeScores: scores, fc.Circuit: circuit, fc.Faithfulness: explained}
    made |= {fc.Curve: lambda: explained().curve, fc.Task: lambda: fc.Task(**TASK)}
    made |= {fc.Overlap: lambda: fc.Overlap((), (), ()), fc.WrongScore: lambda: fc.WrongScore("embed", 0.0, 0.0, 0.0)}
    made |= {fc.SkipTrigram: lambda: fc.SkipTrigram(0, 0, 0, 1.0, 1.0)}
    if owner in made:
        return made[owner]()
    if issubclass(owner, fc.NLL.__base__):
        return owner(0, 0) if owner is fc.LogitDifference else owner(0)
    functions = filter(inspect.isfunction, map(fc.__dict__.get, fc.__all__))
    maker = next(f for f in functions if inspect.signature(f).return_annotation is owner)
    needed = [p.name for p in signature(maker) if p.default is p.empty or p.name == "k"]
    hints = {p.name: p.annotation for p in signature(maker)}
    square = fc.FactoredMatrix(world.normal(4, 2), world.normal(2, 4))
    fixed = {"matrix": square, "k": 1, "tokens": world.integers(world.vocabulary, world.batch, world.length)}
    return maker(**{x: fixed[x] if x in fixed else world.fitting(x, hints[x]) for x in needed})
