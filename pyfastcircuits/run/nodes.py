"""The parts of a run: nodes write to the residual stream, receivers read it, an edge joins a node to a receiver.

Every experiment takes nodes, edges or paths out of a run, or puts those of another run in. Heads are written
(layer, head) by users; heads and paths are parsed here, once for all experiments, and other nodes in `node_names`.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from pyfastcircuits.arguments import as_integer, describe
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.result import Label
from pyfastcircuits.run.trace import FrozenTrace

Kind = Literal["Q", "K", "V"]  # of composition: by queries, keys or values
KINDS: tuple[Kind, ...] = get_args(Kind)
Inputs = Literal["Q", "K", "V", "QKV"]
Key = TypeVar("Key", bound=Hashable)


class Outputs(Protocol):
    """The outputs of all nodes of one kind in one layer, computed at once; hashable."""

    def __call__(self, run: FrozenTrace) -> Tensor:
        """[n, B, T, x]."""


class Node(Protocol):
    """Something that writes to the residual stream, once in a run."""

    @property
    def layer(self) -> int:
        """The layer it belongs to: heads of later layers read it."""

    @property
    def label(self) -> Label:
        """Its label in results."""

    @property
    def outputs(self) -> Outputs:
        """The outputs among which its own is number `index`: what an ablation replaces."""

    @property
    def index(self) -> int:
        """See outputs."""

    def write(self, run: FrozenTrace, output: Tensor) -> Tensor:
        """The gain of the residual stream [..., B, T, d] from an output [..., B, T, x]: linear."""


@dataclass(frozen=True)
class HeadOutputs:
    """z of all heads of a layer: the values that each has mixed, before its W_O, [H, B, T, r]."""

    layer: int

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs."""
        return run.z(self.layer)


class Head(NamedTuple):
    """An attention head."""

    layer: int
    head: int

    def __repr__(self) -> str:
        """The head as users write it."""
        return f"({self.layer}, {self.head})"

    @property
    def label(self) -> Label:
        """See Node: the path through this head alone."""
        return ((self.layer, self.head),)

    @property
    def outputs(self) -> HeadOutputs:
        """See Node."""
        return HeadOutputs(self.layer)

    @property
    def index(self) -> int:  # type: ignore[override]  # of a tuple, whose method it hides
        """See Node."""
        return self.head

    def write(self, run: FrozenTrace, output: Tensor) -> Tensor:
        """See Node: z through W_O, and through the norm after the heads where there is one."""
        return run.apply_post_norm(output @ run.weights.head("W_O", *self), self.layer)


class _Alone:
    """A node without siblings, which writes its output to the residual stream as it is."""

    index: ClassVar[int] = 0

    @property
    def outputs(self) -> Outputs:
        """See Node."""
        return self

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs: [1, B, T, d]."""
        raise NotImplementedError

    def write(self, run: FrozenTrace, output: Tensor) -> Tensor:
        """See Node."""
        return output


@dataclass(frozen=True)
class Embedding(_Alone):
    """The node that writes the embeddings, with positions where those are added to the residual stream."""

    layer: ClassVar[int] = -1
    label: ClassVar[Label] = "embed"

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs."""
        return run.embedded[None]


@dataclass(frozen=True)
class MLP(_Alone):
    """A layer's MLP. As a receiver it reads the residual stream, too."""

    layer: int

    @property
    def label(self) -> Label:
        """See Node."""
        return ("mlp", self.layer)

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs: the layer's write less that of its heads and their bias, so that all nodes sum to the stream."""
        return (non_heads_written(run, self.layer) - written(run, Bias(self.layer)))[None]


@dataclass(frozen=True)
class Bias(_Alone):
    """What a layer's heads add whatever they read: the bias after their W_O. Value biases are the heads' own."""

    layer: int

    @property
    def label(self) -> Label:
        """See Node."""
        return ("bias", self.layer)

    def __call__(self, run: FrozenTrace) -> Tensor:
        """See Outputs: before a norm after the heads. In a layer without an MLP, all that its heads do not write."""
        weights = run.weights
        if not has_mlp(run, self.layer) and weights.gain("W_O", self.layer) is None:
            return non_heads_written(run, self.layer)[None]
        if weights.b_O is None:
            return torch.zeros_like(run.embedded[None])
        return weights.b_O[self.layer].to(run.embedded.dtype).expand_as(run.embedded[None])

    def write(self, run: FrozenTrace, output: Tensor) -> Tensor:
        """See Node."""
        gain = run.weights.gain("W_O", self.layer)
        return output if gain is None else run.apply_post_norm(output * gain, self.layer)


class HeadInput(NamedTuple):
    """A reader of the residual stream: the queries, keys or values of a head, or all three."""

    head: Head
    inputs: Inputs

    @property
    def layer(self) -> int:
        """The layer it belongs to."""
        return self.head.layer

    @property
    def label(self) -> Label:
        """As users write it."""
        return (tuple(self.head), self.inputs)


@dataclass(frozen=True)
class Logits:
    """The final norm and the unembedding, as the reader of the whole residual stream."""

    label: ClassVar[Label] = "logits"


Receiver = HeadInput | MLP | Logits


class Edge(NamedTuple):
    """A node's output on its direct way to one receiver, through the residual stream alone."""

    source: Node
    receiver: Receiver


Path = tuple[Head, ...]  # a chain of edges, written as its heads in the order information flows; (): the direct path


def written(run: FrozenTrace, node: Node) -> Tensor:
    """The write of a node to the residual stream in the clean run, [B, T, d]."""
    return node.write(run, node.outputs(run)[node.index])


def heads_written(run: FrozenTrace, layer: int) -> Tensor:
    """The sum of the writes of all heads of a layer, value biases included, [B, T, d]."""
    written = torch.einsum("hbtr,hrd->btd", run.z(layer), run.weights.heads("W_O", layer))
    return run.apply_post_norm(written, layer)


def non_heads_written(run: FrozenTrace, layer: int) -> Tensor:
    """What a layer adds to the residual stream and none of its heads writes, [B, T, d]: its MLP's output, biases."""
    return run.streams[layer + 1] - run.streams[layer] - heads_written(run, layer)


def has_mlp(run: FrozenTrace, layer: int) -> bool:
    """Whether a layer has an MLP."""
    return run.forward.mlp_reads(layer) is not None


def nodes_of(run: FrozenTrace, layer: int) -> Iterator[Node]:
    """Every node of a layer: its heads, its MLP, and the bias of its heads where there is one."""
    yield from (Head(layer, head) for head in range(run.weights.n_heads))
    if has_mlp(run, layer):
        yield MLP(layer)
    if run.weights.b_O is not None or not has_mlp(run, layer):
        yield Bias(layer)


def nodes_before(run: FrozenTrace, layer: int) -> Iterator[Node]:
    """Every node that writes before `layer` reads, in the order of layers: their writes sum to the residual stream."""
    yield Embedding()
    for earlier in range(layer):
        yield from nodes_of(run, earlier)


def writes_before(run: FrozenTrace, source: Node, receiver: Receiver) -> bool:
    """Whether a node has written when a receiver reads: an MLP reads its layer's heads unless it runs beside them."""
    if isinstance(receiver, Logits) or source.layer < receiver.layer:
        return True
    within = source.layer == receiver.layer and isinstance(receiver, MLP) and not isinstance(source, MLP)
    return within and run.forward.mlp_reads(receiver.layer) == "after heads"


def parse_head(weights: CircuitWeights, head: Sequence[int], name: str = "head") -> Head:
    """(layer, head) as a Head.

    Raises:
        ValueError: something else than a pair of integers.
        IndexError: a head that the model does not have.
    """
    try:
        layer, number = (as_integer(x) for x in head)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {describe(head, entries=True)}, expected (layer, head)") from None
    return _head_there_is(weights, layer, number, f"{name} is")


def parse_path(weights: CircuitWeights, path: Iterable[Sequence[int]], name: str = "path") -> Path:
    """A path as a tuple of Heads.

    Raises:
        ValueError: something else than (layer, head) pairs, or layers that do not increase.
        IndexError: a layer or head that the model does not have.
    """
    try:
        given = [tuple(as_integer(x) for x in head) for head in path]
    except TypeError:
        given = [()]
    if any(len(head) != 2 for head in given):
        raise ValueError(f"{name} is {describe(path, entries=True)}, expected a tuple of (layer, head)")
    through = f"{name} {tuple(given)} goes through head"
    heads = tuple(_head_there_is(weights, layer, head, through) for layer, head in given)
    if any(a.layer >= b.layer for a, b in pairwise(heads)):
        raise ValueError(f"{name} {heads}: layers must increase from one head to the next")
    return heads


def _head_there_is(weights: CircuitWeights, layer: int, head: int, what: str) -> Head:
    """The head, or IndexError that `what` is (or goes through) none."""
    if not weights.n_layers:
        raise IndexError(f"{what} {layer}.{head}, but the model has no layers")
    if not (0 <= layer < weights.n_layers and 0 <= head < weights.n_heads):
        raise IndexError(
            f"{what} {layer}.{head}; the model has layers 0 to {weights.n_layers - 1} "
            f"and heads 0 to {weights.n_heads - 1}"
        )
    return Head(layer, head)


def parse_ends(weights: CircuitWeights, source: Sequence[int], destination: Sequence[int]) -> tuple[Head, Head]:
    """A source and a destination in a later layer.

    Raises:
        ValueError: one of them is no pair of integers; the layers do not increase.
        IndexError: a head that the model does not have.
    """
    first, second = parse_head(weights, source, "source"), parse_head(weights, destination, "destination")
    if first.layer >= second.layer:
        raise ValueError(f"source {tuple(first)} is not in a layer before destination {tuple(second)}")
    return first, second


def parse_pair(weights: CircuitWeights, pair: Iterable[Sequence[int]]) -> Path:
    """Two heads in two layers, source and destination; errors as parse_path."""
    path = parse_path(weights, pair, "pair")
    if len(path) != 2:
        raise ValueError(f"pairs holds {path}, expected (source, destination), a (layer, head) each")
    return path


def grouped(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The places of each key, in the order in which keys first come."""
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def span(places: list[int]) -> slice | list[int]:
    """The same places as a slice, whose view needs no copy and no index on the device, if they follow one another."""
    first, last = places[0], places[-1] + 1
    return slice(first, last) if places == list(range(first, last)) else places


def _is_path(entry: Any) -> bool:
    """Whether it is a sequence of heads, and not a head, which is a sequence of numbers."""
    return isinstance(entry, (tuple, list)) and all(isinstance(head, (tuple, list)) for head in entry)


def one_or_several(entry: Any, is_one: Callable[[Any], bool] = _is_path) -> tuple[list[Any], bool]:
    """The members of an entry in an experiment's list: one head, pair or path, or several that go together.

    A set always names several; a sequence does if its first member is itself one. `is_one` tells; the default knows
    pairs and paths.
    """
    if isinstance(entry, (set, frozenset)):
        return list(entry), True
    if not isinstance(entry, Iterable):
        return [entry], False
    members = list(entry)
    several = len(members) > 0 and is_one(members[0])
    return (members, True) if several else ([tuple(members)], False)
