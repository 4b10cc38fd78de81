"""Nodes and receivers as users write them.

A head is (layer, head), an MLP ("mlp", layer), the bias of a layer's heads ("bias", layer), the embedding "embed"; a
receiver is ((layer, head), "Q"), ("mlp", layer) or "logits".
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pyfastcircuits.arguments import as_integer, describe
from pyfastcircuits.result import Label
from pyfastcircuits.run.dictionary import Feature
from pyfastcircuits.run.nodes import (
    KINDS,
    MLP,
    Bias,
    Edge,
    Embedding,
    Head,
    HeadInput,
    Kind,
    Logits,
    Node,
    Receiver,
    has_mlp,
    one_or_several,
    parse_head,
    writes_before,
)
from pyfastcircuits.run.trace import FrozenTrace


def parse_node(run: FrozenTrace, entry: Any, name: str = "node") -> Node:
    """A node as users write it: (layer, head), ("mlp", layer), ("bias", layer), "embed", or a feature of a Dictionary.

    Raises:
        ValueError: something else.
        IndexError: a layer or head that the model does not have.
    """
    if isinstance(entry, str) and entry == Embedding.label:
        return Embedding()
    if isinstance(entry, Feature):
        entry.dictionary.check(run.weights)
        return entry
    kinds: dict[str, type[MLP] | type[Bias]] = {"mlp": MLP, "bias": Bias}
    if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str) and entry[0] in kinds:
        try:
            layer = as_integer(entry[1])
        except TypeError:
            raise ValueError(f"{name} is {describe(entry, entries=True)}, expected ({entry[0]!r}, layer)") from None
        if not 0 <= layer < run.weights.n_layers:
            raise IndexError(f"{name} is {tuple(entry)}, but the model has {run.weights.n_layers} layers")
        if entry[0] == "mlp" and not has_mlp(run, layer):
            raise ValueError(f"{name} is {tuple(entry)}, but that layer has no MLP")
        return kinds[entry[0]](layer)
    try:
        return parse_head(run.weights, entry, name)
    except ValueError:
        raise ValueError(
            f"{name} is {describe(entry, entries=True)}, expected (layer, head), ('mlp', layer), ('bias', layer) or "
            "'embed'"
        ) from None


def parse_nodes(run: FrozenTrace, entry: Any, name: str = "head") -> tuple[Node, ...]:
    """One node, or several that go together, in the order of layers and each once; errors as parse_node."""
    if isinstance(entry, (str, Feature)):
        return (parse_node(run, entry, name),)
    if not isinstance(entry, Iterable):
        raise ValueError(f"{name} is {describe(entry)}, expected (layer, head) or several of them")
    nodes, _ = one_or_several(entry, _is_node)
    found = {parse_node(run, node, name) for node in nodes}
    return tuple(sorted(found, key=lambda node: (node.layer, not isinstance(node, Head), node.index, str(node.label))))


def parse_receiver(run: FrozenTrace, entry: Any, name: str = "receiver") -> Receiver:
    """A receiver as users write it: ((layer, head), "Q"), ("mlp", layer) or "logits".

    Raises:
        ValueError: something else.
        IndexError: a layer or head that the model does not have.
    """
    if isinstance(entry, str) and entry == Logits.label:
        return Logits()
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        if isinstance(entry[1], str) and entry[1] in KINDS:
            return HeadInput(parse_head(run.weights, entry[0], name), entry[1])
        if entry[0] == "mlp" and isinstance(node := parse_node(run, entry, name), MLP):
            return node
    raise ValueError(
        f"{name} is {describe(entry, entries=True)}, expected ((layer, head), 'Q', 'K' or 'V'), ('mlp', layer) or "
        "'logits'"
    )


def parse_edge(run: FrozenTrace, pair: Any, kind: Kind) -> Edge:
    """(source, destination): a node, and a receiver; of a head that is no receiver, the input that `kind` says.

    Raises:
        ValueError: something else; a source that has not written when the destination reads.
        IndexError: a layer or head that the model does not have.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"pairs holds {describe(pair, entries=True)}, expected (source, destination)")
    source, to = parse_node(run, pair[0], "pair"), pair[1]
    named = to == Logits.label or (isinstance(to, (tuple, list)) and any(isinstance(part, str) for part in to))
    receiver = parse_receiver(run, to, "pair") if named else HeadInput(parse_head(run.weights, to, "pair"), kind)
    if not writes_before(run, source, receiver):
        raise ValueError(f"pair {tuple(pair)}: layers must increase from the source to the destination")
    return Edge(source, receiver)


def edge_label(edge: Edge, kind: Kind) -> Label:
    """(source, destination) as users write them; the input of a head where it is not that of `kind`."""
    to: Label = edge.receiver.label
    if isinstance(edge.receiver, HeadInput) and edge.receiver.inputs == kind:
        to = edge.receiver.head
    return (_name(edge.source), to)


def is_pair(entry: Any) -> bool:
    """Whether it is a source and a destination, and not a node, whose first part is a number or the name of a kind."""
    return isinstance(entry, (tuple, list)) and len(entry) > 0 and _is_node(entry[0])


def set_label(nodes: Sequence[Node]) -> Label:
    """The label of nodes that go together: one node's own, or a frozenset of them as users write them."""
    return nodes[0].label if len(nodes) == 1 else frozenset(_name(node) for node in nodes)


def _name(node: Node) -> Label:
    """As users write it."""
    return node if isinstance(node, Head) else node.label


def _is_node(entry: Any) -> bool:
    return isinstance(entry, (tuple, list, Feature)) or (isinstance(entry, str) and entry == Embedding.label)
