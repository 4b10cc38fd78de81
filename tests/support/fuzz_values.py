"""What the fuzz calls with: a small model and all that fits it, and values that belong nowhere."""

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

import pyfastcircuits as fc


class Choices:
    """Numbers that decide what a call is: from hypothesis, or those of an earlier call."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        self.draw, self.made = draw, list[int]()

    def pick(self, *options: Any) -> Any:
        self.made.append(self.draw(len(options)))
        return options[self.made[-1]]

    def chance(self, percent: int) -> bool:
        return self.pick(*range(100)) >= 100 - percent

    @classmethod
    def again(cls, made: Sequence[int]) -> "Choices":
        left = iter(made)
        return cls(lambda count: next(left))


# A small model, and what fits it.

# The tensors of the ops, by their dimensions; integers are below the dimension that comes last.
SHAPES = {
    "base": "T V", "delta": "P T r", "basis": "G r V", "outer": "G r d", "scale": "P T", "clean_lse": "T",
    "thresholds": "P T", "before": "M < N", "left": "N r d", "right": "M d r", "left_outer": "N r r",
    "right_outer": "M r r", "factors": "N d r", "A": "N r", "B": "r M", "shift": "N", "q": "b H T r", "k": "b h T r",
    "values": "S b h T r", "lse": "b H T", "pre": "b T", "post": "b T", "mask": "b T", "columns": "N < M",
    "group": "P < G", "targets": "T < V", "tokens": "T K < V", "pairs": "Q 2 < P",
}  # fmt: skip
DOUBLE = {"clean_lse", "thresholds", "lse"}


class World:
    """A model, runs of it, and every argument that fits them, on a device that tests may change."""

    device = "cpu"

    def __init__(self, choices: Choices, folder: Path) -> None:
        self.pick, self.chance, self.folder = choices.pick, choices.chance, folder
        self.generator = torch.Generator().manual_seed(self.pick(0, 1, 2))
        self.vocabulary, self.layers = self.pick(6, 1, 2, 12, 40), self.pick(2, 2, 3, 3, 1, 0)
        self.heads, self.kv = self.pick((2, 1), (2, 2), (4, 2), (1, 1))
        self.width, self.rank = self.pick(4, 8, 1), self.pick(2, 4)
        self.batch, self.length = self.pick(2, 1), self.pick(5, 2, 9)
        self.dtype = self.pick(torch.float32, torch.float64, torch.float32, torch.bfloat16)
        self.learns, self.masked = self.chance(25), self.chance(30)
        self.store = "qk" if self.chance(20) and not self.learns else "patterns"
        names = "T V P r G d N M b H h S K Q"
        self.sizes = {name: self.pick(2, 3, 1, 5, 17) for name in names.split()} | {"2": 2}
        self.sizes["H"] = self.sizes["h"] * self.pick(1, 2)
        first = self.pick(*range(max(self.layers - 1, 1)))
        last = self.pick(*range(first + 1, self.layers)) if self.layers > first + 1 else first + 1
        self.source, self.destination = ((n, self.pick(*range(self.heads))) for n in (first, last))

    def normal(self, *shape: int, dtype: torch.dtype | None = None, learns: bool = False) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * 0.5
        return numbers.to(self.device, dtype or self.dtype).requires_grad_(learns)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(0, max(end, 1), shape, generator=self.generator, device="cpu").to(self.device)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The arguments of CircuitWeights."""
        V, L, H, kv, d, r = self.vocabulary, self.layers, self.heads, self.kv, self.width, self.rank
        norm = self.pick(None, "rmsnorm", "layernorm")
        positional = self.pick("none", "rotary", "shortformer", "standard")
        shapes = {"W_E": (V, d), "W_Q": (L, H, d, r), "W_K": (L, kv, d, r), "W_V": (L, kv, d, r), "W_O": (L, H, r, d)}
        shapes["W_U"] = (d, V)
        if positional in ("shortformer", "standard"):
            shapes["W_pos"] = (16, d)
        if self.chance(40):
            shapes |= {"b_Q": (L, H, r), "b_K": (L, kv, r), "b_V": (L, kv, r), "b_O": (L, d), "b_U": (V,)}
        if norm and self.chance(40):
            shapes |= {"ln_final_w": (d,), "ln_final_b": (d,)}
            shapes |= {"ln_w": (L, d), "ln_b": (L, d)} if positional != "shortformer" else {}
        tensors = {name: self.normal(*shape, learns=self.learns) for name, shape in shapes.items()}
        cap = {"logit_cap": 5.0} if self.chance(15) else {}
        return tensors | {"norm": norm, "positional": positional} | cap

    @cached_property
    def weights(self) -> fc.CircuitWeights:
        return fc.CircuitWeights(**self.fields)

    @cached_property
    def mask(self) -> Tensor | None:
        if not self.masked:
            return None
        here = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        here[0, : self.pick(0, 1) * (self.length - 2)] = False
        return here

    def run(self) -> fc.FrozenTrace:
        tokens = self.integers(self.vocabulary, self.batch, self.length)
        return fc.trace(self.weights, tokens, self.mask, store=self.store)

    trace = cached_property(run)
    other = cached_property(run)

    def matrix(self) -> fc.FactoredMatrix:
        before = self.pick((), (), (), (2,))
        rows = self.pick(3, 1, 7, 40)
        columns = self.pick(rows, rows, 3, 1, 7, 40)
        return fc.FactoredMatrix(self.normal(*before, rows, self.rank), self.normal(*before, self.rank, columns))

    def head(self) -> tuple[int, int]:
        return self.pick(self.source, self.destination)

    def tokens_asked(self) -> Any:
        shape = self.pick(None, (), (self.batch,), (self.batch, self.length))
        return shape if shape is None else self.integers(self.vocabulary, *shape) if shape else 0

    def pair(self) -> Any:
        return (self.source, self.destination)

    def dictionary(self) -> fc.Dictionary:
        return fc.Dictionary(self.normal(self.width, 5), self.normal(5, self.width), layer=0, top=self.pick(None, 2))

    def finding(self, kinds: Sequence[Any]) -> Any:
        """What a figure is drawn of."""
        made = {
            fc.SkipTrigrams: lambda: fc.skip_trigrams(self.weights, self.head(), k=1),
            fc.LayerMarginals: lambda: fc.layer_marginals(self.trace),
            fc.Sweep: lambda: fc.order_losses(self.trace),
            fc.Result: lambda: self.pick(fc.head_ablation, fc.pair_ablation)(self.trace, kl=True),
        }
        return next(make for kind, make in made.items() if kind in kinds)()

    def operand(self, name: str) -> Tensor:
        """A tensor of an op."""
        shape, _, end = SHAPES[name].partition(" < ")
        sizes = [self.sizes[size] for size in shape.split()]
        if name == "mask":
            return torch.ones(sizes, dtype=torch.bool, device=self.device)
        if end:
            return self.integers(self.sizes[end], *sizes)
        return self.normal(*sizes, dtype=torch.float64 if name in DOUBLE else None, learns=self.learns)

    def fitting(self, name: str, hint: Any) -> Any:
        """A valid argument, by its name and its annotation."""
        V, T, pick = self.vocabulary, self.length, self.pick
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        groups = any(Any in get_args(option) for option in options)  # of heads that go together
        some = lambda end: pick(None, [0], list(range(end)), torch.arange(end, device=self.device))  # noqa: E731
        metrics = (fc.NLL, fc.KL, fc.Probability, fc.Rank, fc.Top1)
        named: dict[str, Callable[[], Any]] = {
            "weights": lambda: self.weights, "model": lambda: self.weights, "cls": lambda: None,
            "trace": lambda: self.trace, "clean": lambda: self.trace, "corrupted": lambda: self.other,
            "reference": lambda: self.other, "matrix": self.matrix, "other": self.matrix,
            "tokens": lambda: self.integers(V, self.batch, pick(T, T, T, T, 1)), "mask": lambda: self.mask,
            "source": lambda: self.source, "destination": lambda: self.destination, "head": self.head,
            "heads": lambda: pick(None, [self.source], [self.head(), [self.source, self.destination] if groups else self.head()]),
            "pairs": lambda: pick([self.pair()], None if NoneType in options else []), "paths": lambda: [(), self.pair(), (self.head(),)],
            "path": lambda: self.corpus() if Path in options else self.pair(), "column": lambda: pick(None, "tokens"),
            "tokenizer": lambda: None if Path in options else pick(None, lambda text: [0]),
            "out": lambda: pick(None, None, self.folder / "out") if NoneType in options else self.folder / "report.html",
            "settle": lambda: pick(None, 1),
            "sources": lambda: [self.source], "destinations": lambda: [self.destination],
            "targets": self.tokens_asked, "against": lambda: pick(0, self.integers(V, self.batch, T)),
            "positions": lambda: pick(None, 0, -1, [0, T - 1], torch.ones(T, dtype=torch.bool, device=self.device)),
            "metric": lambda: pick(*("nll", "kl", "logit_difference", "probability", "rank", "top1"),
                                   *(kind(self.tokens_asked()) for kind in metrics), fc.LogitDifference(0, 0)),
            "scores": lambda: fc.head_scores(self.weights, length=4, batch=2, batches=1) if fc.Result in options else fc.edge_scores(self.trace, self.other),
            "circuit": lambda: fc.circuit(fc.edge_scores(self.trace, self.other), top=3), "sizes": lambda: pick(None, 2, [0, 1]),
            "file": lambda: self.folder / pick("circuit.json", "missing.safetensors"), "threshold": lambda: 0.5,
            "eigenvalues": lambda: self.normal(3, 4, dtype=torch.complex128), "layer": lambda: pick(0, 1),
            "gain": lambda: self.normal(self.layers, self.width), "final_gain": lambda: self.normal(self.width),
            "bias": lambda: self.normal(self.layers, self.width), "final_bias": lambda: self.normal(self.width),
            "direction": lambda: self.normal(self.width), "text": lambda: None if str in options else str,
            "among": lambda: some(V),
            "rows": lambda: some(1), "columns": lambda: some(1), "source_tokens": lambda: some(V),
            "row_weights": lambda: None, "name_or_path": self.saved, "path_to": self.saved, "screen": lambda: "auto",
            "index": lambda: pick(0, ..., slice(1), (0, 0)), "sequences": lambda: pick(1, 5) if int in options else pick(slice(1), slice(0, 2)),
            "machine": lambda: pick("H100", "laptop"),
            "target": lambda: pick(torch.float64, self.device), "args": lambda: torch.float64, "dim": lambda: pick(-1, 0),
            "scalar": lambda: pick(2.0, 3), "shape": lambda: [2, 3, 4], "name": lambda: pick("W_Q", "Q", "W_O", "V"),
            "stream": lambda: self.trace.final, "streams": lambda: self.trace.final[None], "kind": lambda: "Q",
            "losses": lambda: self.trace.token_losses, "values": lambda: self.normal(2, 3), "device": lambda: torch.device(self.device),
            "found": lambda: self.finding(options), "x": lambda: "nll", "y": lambda: "kl", "quantity": lambda: None,
            "title": lambda: pick(None, "$x_1$"), "scale": lambda: "nats", "layers": lambda: pick(None, [0]),
            "dictionary": self.dictionary, "at": lambda: pick(None, -1, [0, 1]), "what": lambda: "z", "sequence": lambda: 0,
            "rows_measured": lambda: None, "logit_difference": lambda: None, "length": lambda: pick(4, 7),
        }  # fmt: skip
        if fc.FrozenTrace in options and name == "model":
            return pick(self.weights, self.trace)
        choices = [x for option in options if get_origin(option) is Literal for x in get_args(option)]
        if "triton" in choices:
            return "auto" if self.chance(70) else pick(*choices)
        if choices and name not in ("metric", "source", "destination", "at", "what"):
            return pick(*choices)
        if name in named and not (name in ("head", "source", "destination") and hint is int):
            return named[name]()
        for option in options:
            if option is bool:
                return pick(False, True)
            if option is int:
                return pick(1, 2, 3, 0) if name not in ("source", "destination") else 0
            if option is float:
                return pick(1.0, 0.5)
            if option is Tensor:
                return self.normal(3, 4)
            if get_origin(option) is not None and issubclass(get_origin(option), Callable):
                return lambda *x: None
        return None

    def corpus(self) -> Any:
        """The path of tokens on disk."""
        name = self.pick("c.npy", "c.jsonl")
        if name == "c.npy":
            np.save(self.folder / name, np.arange(60) % self.vocabulary)
        else:
            (self.folder / name).write_text('{"tokens": [0, 1, 2, 3, 2, 1, 0, 2]}\n' * 9)
        return self.folder / name

    def saved(self) -> Any:
        """A path: of a bundled model, of what is no model, or of what was saved."""
        if self.chance(60):
            return self.pick("bigram-0l", str(self.folder / "saved.safetensors"), self.folder / "new.safetensors")
        kind = self.pick("nested", "no object", "array", "garbage", "empty", "missing")
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        contents = {"nested": b"[" * 100_000, "no object": b"[1]", "garbage": b"{\xff"}
        if kind in contents:
            (folder / "config.json").write_bytes(contents[kind])
        if kind == "array":
            np.save(folder / "model.npy", np.zeros((4, 0)))
            return folder / "model.npy"
        if kind == "garbage":
            (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
            return folder / "model.safetensors"
        return folder if kind != "missing" else folder / "missing"


# What belongs nowhere.


def deep() -> list[Any]:
    """A list in a list, 100,000 times."""
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


OBJECTS: tuple[Callable[[], Any], ...] = (
    lambda: None, list, dict, set, object, deep, lambda: int, lambda: print, lambda: ..., lambda: slice(None),
    lambda: (x for x in ((0, 0), (1, 0))), lambda: range(3), lambda: b"\x1b[31m", lambda: "", lambda: "[bold]\x1b[31m",
    lambda: "a" * 10_000, lambda: 0.9, lambda: 1.5, lambda: float("nan"), lambda: float("inf"), lambda: -1, lambda: 0,
    lambda: True, lambda: complex(1, 2), lambda: complex("inf+nanj"), lambda: 2**63, lambda: -(2**63) - 1,
    lambda: 10**30, lambda: np.int64(1), lambda: np.float64(0.5), lambda: np.bool_(True), lambda: np.array([0, 1]),
    lambda: np.zeros((4, 0)), lambda: np.array(["a"]), lambda: np.array([None, 1]), lambda: [None], lambda: [[]],
    lambda: [(0,)], lambda: [(0, 0, 0)], lambda: [(0, 0.9)], lambda: [(99, 0)], lambda: ((0, 0), (0, 2**70)),
    lambda: (0, True), lambda: [[[(0, 0)]]], lambda: {(0, 0): 1}, lambda: torch.float32, lambda: torch.device("meta"),
    lambda: torch.nn.Linear(2, 2), lambda: [torch.ones(2), None], lambda: torch.tensor(0.5), lambda: torch.tensor(1),
)  # fmt: skip
TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.to_sparse, lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), Tensor.half, Tensor.double,
    lambda x: x.to(torch.float8_e4m3fn), lambda x: x.to(torch.complex64), Tensor.int, Tensor.bool, Tensor.long,
    lambda x: x.to("meta"), lambda x: x.float().numpy(), lambda x: x.float().tolist(), lambda x: x.new_empty(0),
    lambda x: x.new_ones(()), lambda x: x[(None,) * 12], lambda x: torch.stack([x, x], -1)[..., 0], lambda x: x.mT,
    lambda x: torch.full_like(x, torch.nan), lambda x: torch.full_like(x, -torch.inf), lambda x: torch.cat([x, x]), lambda x: -1 - x,
    lambda x: torch.full(x.shape, 2**63, dtype=torch.uint64), lambda x: x + 1000, lambda x: x[:0], lambda x: x[None],
    lambda x: x.float().requires_grad_(), lambda x: x.expand(2, *x.shape), lambda x: x.to(torch.float16).to_sparse(),
)  # fmt: skip


def hostile(choices: Choices, value: Any) -> Any:
    """Something in a valid argument's place: made of it, or any object."""
    if isinstance(value, Tensor) and choices.chance(65):
        change = choices.pick(*TENSORS)
        with contextlib.suppress(Exception):  # not every tensor can become every other
            return change(value.detach())
    if isinstance(value, (tuple, list)) and value and choices.chance(40):
        place, strange = choices.pick(*range(len(value))), choices.pick(*OBJECTS)()
        return [*value[:place], strange, *value[place + 1 :]]
    return choices.pick(*OBJECTS)()


def shown(value: Any, depth: int = 3) -> str:
    """A value, in short."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        inside = ", ".join(shown(x, depth - 1) for x in value[:4]) if depth else "..."
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if value is None or isinstance(value, (int, float, complex, str, bytes)):
        return repr(value)[:40]
    return value.__name__ if isinstance(value, type) else type(value).__name__
