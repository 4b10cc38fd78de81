"""A circuit in the forms that other programs read: JSON of circuit-tracer's viewer, networkx, Graphviz, a plot."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyfastcircuits.arguments import describe
from pyfastcircuits.result import label_name
from pyfastcircuits.run.graph import EMBED, LOGITS, MLP, EdgeLabel, NodeLabel, layer_of, reader

Edges = Mapping[EdgeLabel, float]
Setup = Mapping[str, str | int | float]
_KEY = "pyfastcircuits"


def input_of(receiver: Any) -> str:
    """ "Q", "K" or "V" of a head, "" of an MLP and of the logits."""
    return str(receiver[1]) if reader(receiver) != receiver else ""


def _nodes(scores: Edges) -> list[NodeLabel]:
    """Every node at an end of an edge, the logits too, from the embedding up."""
    ends = {source for source, _ in scores} | {reader(receiver) for _, receiver in scores}
    return sorted(ends, key=lambda node: (layer_of(node), node[1] if isinstance(node, tuple) else 0))


def table(scores: Edges, setup: Setup) -> Any:
    """See Circuit.table."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError("tables need pyarrow: pip install 'pyfastcircuits[cli]'") from error
    columns = {
        "source": pa.array([label_name(source) for source, _ in scores], pa.string()),
        "receiver": pa.array([label_name(reader(receiver)) for _, receiver in scores], pa.string()),
        "input": pa.array([input_of(receiver) for _, receiver in scores], pa.string()),
        "score": pa.array(list(scores.values()), pa.float64()),
    }
    return pa.table(columns).replace_schema_metadata({name: str(value) for name, value in setup.items()} or None)


def networkx_graph(scores: Edges) -> Any:
    """See Circuit.to_networkx."""
    try:
        import networkx
    except ImportError as error:
        raise ImportError("graphs need networkx: pip install 'pyfastcircuits[cli]'") from error
    graph = networkx.MultiDiGraph()
    for node in _nodes(scores):
        graph.add_node(node, name=label_name(node), layer=layer_of(node))
    for (source, receiver), score in scores.items():
        graph.add_edge(source, reader(receiver), key=input_of(receiver), input=input_of(receiver), score=score)
    return graph


def graph_json(scores: Edges, candidates: int, setup: Setup, name: str) -> dict[str, Any]:
    """See Circuit.to_json."""
    nodes = _nodes(scores)
    heads = [node for node in nodes if isinstance(node, tuple) and node[0] != MLP]
    layers = 1 + max((int(layer_of(node)) for node in nodes if node not in (EMBED, LOGITS)), default=-1)
    size = 1 + max((head for _, head in heads), default=0)  # the number that a layer's MLP has as a feature
    made = {node: _viewer_node(node, layers, size) for node in nodes}
    links = [
        {
            "source": made[source]["node_id"],
            "target": made[reader(receiver)]["node_id"],
            "weight": score,
            "input": input_of(receiver),
        }
        for (source, receiver), score in scores.items()
    ]
    metadata = {
        "slug": name, "scan": _KEY, "transcoder_list": [], "prompt_tokens": ["all positions"], "prompt": name,
        "node_threshold": None, "schema_version": 1, _KEY: {"candidates": candidates, "setup": dict(setup)},
    }  # fmt: skip
    q_params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": q_params, "nodes": list(made.values()), "links": links}


def _viewer_node(node: NodeLabel, layers: int, size: int) -> dict[str, Any]:
    """A node as the viewer has it: rows are layers, E for the embedding, and one above the last for the logits."""
    if node == EMBED:
        layer, feature, kind = "E", 0, "embedding"
    elif node == LOGITS:
        layer, feature, kind = str(layers + 1), 0, "logit"
    elif node[0] == MLP:
        layer, feature, kind = str(node[1]), size, "mlp"
    else:
        layer, feature, kind = str(node[0]), node[1], "attention head"
    identity = f"{layer}_{feature}_0"
    return {
        "node_id": identity, "jsNodeId": f"{layer}_{feature}-0", "feature": feature, "layer": layer, "ctx_idx": 0,
        "feature_type": kind, "token_prob": 0.0, "is_target_logit": node == LOGITS, "run_idx": 0, "reverse_ctx_idx": 0,
        "clerp": label_name(node), "influence": None, "activation": None,
    }  # fmt: skip


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name the file in errors of the system."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"file is {describe(str(file))}, which cannot be read or written: {reason}") from error


def write_json(graph: dict[str, Any], file: Path) -> None:
    """Write a graph to a file."""
    with _naming(file):
        file.write_text(json.dumps(graph, indent=1, allow_nan=False))


def read_json(file: Path) -> tuple[dict[EdgeLabel, float], int, dict[str, str | int | float]]:
    """The scores, candidates and setup of a circuit in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no circuit.
    """
    try:
        with _naming(file):
            text = file.read_text()
        graph = json.loads(text)
        own = graph["metadata"][_KEY]
        labels = {node["node_id"]: _label_of(node) for node in graph["nodes"]}
        scores: dict[EdgeLabel, float] = {}
        for link in graph["links"]:
            to = labels[link["target"]]
            receiver = (to, link["input"]) if link["input"] else to
            scores[labels[link["source"]], receiver] = float(link["weight"])
        return scores, int(own["candidates"]), dict(own["setup"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"file is {describe(str(file))}, which holds no circuit that was saved: {error!r}") from error


def _label_of(node: Mapping[str, Any]) -> NodeLabel:
    kind = node["feature_type"]
    if kind in ("embedding", "logit"):
        return EMBED if kind == "embedding" else LOGITS
    return (MLP, int(node["layer"])) if kind == "mlp" else (int(node["layer"]), int(node["feature"]))


def dot(scores: Edges) -> str:
    """See Circuit.to_dot."""
    try:
        import graphviz
    except ImportError as error:
        raise ImportError("Graphviz source needs the package graphviz: pip install 'pyfastcircuits[cli]'") from error
    drawn = graphviz.Digraph("circuit", graph_attr={"rankdir": "BT"}, node_attr={"shape": "box", "style": "rounded"})
    rows: dict[float, list[NodeLabel]] = {}
    for node in _nodes(scores):
        rows.setdefault(layer_of(node), []).append(node)
    for nodes in rows.values():
        with drawn.subgraph(graph_attr={"rank": "same"}) as row:
            for node in nodes:
                row.node(label_name(node))
    largest = _largest(scores)
    for (source, receiver), score in scores.items():
        width = f"{0.5 + 3.5 * abs(score) / largest:.2f}"
        ends = label_name(source), label_name(reader(receiver))
        drawn.edge(*ends, label=input_of(receiver), penwidth=width, color=_color(score))
    return str(drawn.source)


def figure(scores: Edges, file: str | Path | None) -> Any:
    """See Circuit.plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyfastcircuits[cli]'") from error
    rows: dict[float, list[NodeLabel]] = {}
    for node in _nodes(scores):
        rows.setdefault(layer_of(node), []).append(node)
    places = {
        node: (i - (len(nodes) - 1) / 2, height)
        for height, (_, nodes) in enumerate(sorted(rows.items()))
        for i, node in enumerate(nodes)
    }
    wide = max(map(len, rows.values()), default=1)
    drawn = Figure(figsize=(min(40, 2 + 0.9 * wide), min(40, 1.5 + 0.9 * len(rows))), layout="constrained")
    axes = drawn.subplots()
    bends = {"Q": -0.12, "K": 0.0, "V": 0.12, "": 0.0}  # so that edges into one head lie apart
    largest = _largest(scores)
    for (source, receiver), score in scores.items():
        arrow = {
            "arrowstyle": "-|>", "color": _color(score), "linewidth": 0.5 + 3 * abs(score) / largest,
            "connectionstyle": f"arc3,rad={bends[input_of(receiver)]}", "shrinkA": 10, "shrinkB": 10,
        }  # fmt: skip
        (x, y), (from_x, from_y) = places[reader(receiver)], places[source]
        axes.annotate("", (x, y), (from_x, from_y), arrowprops=arrow)
        if input_of(receiver):
            axes.text(0.25 * from_x + 0.75 * x, 0.25 * from_y + 0.75 * y, input_of(receiver), fontsize=7)
    for node, (x, y) in places.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.4"}
        axes.text(x, y, label_name(node), ha="center", va="center", bbox=box, fontsize=9)
    axes.set(xlim=(-wide / 2 - 0.2, wide / 2 + 0.2), ylim=(-0.5, len(rows) - 0.5))
    axes.axis("off")
    if file is not None:
        with _naming(Path(file)):
            drawn.savefig(file)
    return drawn


def _largest(scores: Edges) -> float:
    return max((abs(score) for score in scores.values()), default=0.0) or 1.0


def _color(score: float) -> str:
    return "#b2182b" if score > 0 else "#2166ac"
