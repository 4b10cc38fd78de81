"""The memory that a sweep, or the scores of all edges, hold at their peak, counted as costs counts work."""

from pyfastcircuits.experiments import edge_gradients, edge_scores, outside
from pyfastcircuits.experiments.edges import SCORES
from pyfastcircuits.run import memory
from pyfastcircuits.sweeps.architectures import Architecture
from pyfastcircuits.sweeps.costs import FLOAT, Task

LABEL = 300  # bytes of the label of an experiment and of its values


def footprint(task: Task, weight_bytes: int) -> dict[str, int]:
    """Bytes of what is there at once when most is: while the model runs, or while its ablations are measured.

    Of the blocks of scratch that run.memory allows, half count: rarely are more of them full at once.
    """
    a, positions = task.architecture, task.sequences * task.length
    pattern = FLOAT * a.heads * task.sequences * task.length**2
    stream = FLOAT * positions * a.d_model
    streams = 2 * a.layers + 2 if a.d_mlp else 2
    held = {
        "weights": weight_bytes * (a.parameters - _of_others(task)),
        "clean run": a.layers * pattern + streams * stream + FLOAT * positions * (a.layers + 1),
        "results": LABEL * task.experiments,
    }
    running = {"clean logits": 0, "scratch": 2 * pattern + 4 * FLOAT * positions * a.heads * a.d_head + 4 * stream}
    return held | max(running, _measuring(task), key=lambda x: sum(x.values()))


def _of_others(task: Task) -> int:
    """The weights in columns of W_U that other processes hold: where circuits are all of the model, and W_U its own."""
    a = task.architecture
    return 0 if a.d_mlp or a.tied else a.d_model * (a.vocabulary - task.columns)


def _measuring(task: Task) -> dict[str, int]:
    a, rows = task.architecture, task.at_once * (task.length - 1)
    scratch = memory.BLOCKS * task.block // 2
    if task.scope != "path":  # see FrozenTrace.streams and z
        scratch += FLOAT * rows * (a.d_model + a.d_head * a.heads) * a.layers
    if task.attention == "recomputed":  # of scores, scaled ones, hidden ones and patterns
        sources = (a.layers - 1) * a.heads if task.scope in ("direct", "edge") else 1
        scratch += 4 * min(max(SCORES, (one := FLOAT * a.heads * task.at_once * task.length**2)), sources * one)
    return {"clean logits": 0 if task.low_memory else FLOAT * rows * task.columns, "scratch": scratch}


def scores_footprint(a: Architecture, sequences: int, length: int) -> dict[str, int]:
    """Bytes beyond the weights that `edge_scores` of two runs with `store="qk"` holds at its peak, in fp32.

    Of a part of the sequences the streams and the changes of all layers are held, and of one layer at a time its folded
    weights, what its heads and its MLP make and their gradients.
    """
    positions = sequences * length
    part = length * min(sequences, max(1, edge_scores.ROWS // length))
    mlps, z = a.layers * (a.d_mlp > 0), FLOAT * a.heads * a.d_head
    stream, keys, nodes = FLOAT * a.d_model, FLOAT * a.kv_heads * a.d_head, 1 + a.layers * a.heads + mlps
    holds = nodes * part * stream <= outside.HELD
    run = a.layers * (z + keys + FLOAT * (a.heads + 1)) + (2 + mlps) * stream
    gradients = max(min(part * 3 * a.heads * stream, edge_gradients.GRADIENTS), part // length * 3 * a.heads * stream)
    layer = {
        "weights": FLOAT * a.d_model * a.d_head * (2 * a.heads + 2 * a.kv_heads),
        "gradients": gradients * 5 // 3,  # of queries, keys and values, of one of them, and the changes that they meet
        "heads": part * (10 * z + 4 * stream) + 4 * FLOAT * a.heads * part * length,
        "mlp": 4 * FLOAT * part * a.d_mlp,
    }
    return {
        "runs": 2 * positions * run,
        "streams": part * a.layers * stream,
        "changes": part * (nodes * stream if holds else (1 + mlps) * stream + a.layers * z),
        "one layer": max(sum(layer.values()), part * a.layers * stream),  # or the streams of the corrupted run
    }
