"""The memory that a sweep holds at its peak, counted as costs counts its work."""

from pyfastcircuits.experiments.edges import SCORES
from pyfastcircuits.run import memory
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
        "weights": weight_bytes * a.parameters,
        "clean run": a.layers * pattern + streams * stream + FLOAT * positions * (a.layers + 1),
        "results": LABEL * task.experiments,
    }
    running = {"clean logits": 0, "scratch": 2 * pattern + 4 * FLOAT * positions * a.heads * a.d_head + 4 * stream}
    return held | max(running, _measuring(task), key=lambda x: sum(x.values()))


def _measuring(task: Task) -> dict[str, int]:
    a, rows = task.architecture, task.at_once * (task.length - 1)
    scratch = memory.BLOCKS * task.block // 2
    if task.scope != "path":  # see FrozenTrace.streams and z
        scratch += FLOAT * rows * (a.d_model + a.d_head * a.heads) * a.layers
    if task.attention == "recomputed":  # of scores, scaled ones, hidden ones and patterns
        sources = (a.layers - 1) * a.heads if task.scope in ("direct", "edge") else 1
        scratch += 4 * min(max(SCORES, (one := FLOAT * a.heads * task.at_once * task.length**2)), sources * one)
    return {"clean logits": 0 if task.low_memory else FLOAT * rows * task.columns, "scratch": scratch}
