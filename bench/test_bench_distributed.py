"""Two processes that share a sweep on two cores, beside one process on one core.

And two that share nothing, with half of the sequences or of the vocabulary each: by what these fall short of twice the speed,
or take more CPU time, the machine's cores are in each other's way, and no split does better.
"""

import multiprocessing
import statistics
import time
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pyfastcircuits as fc

ROUNDS = 3
SHAPES = {  # layers, heads, d_model, d_head, vocabulary; sequences, length
    "sequences": ((2, 8, 768, 64, 20_000), (8, 128)),
    "experiments": ((2, 8, 768, 64, 20_000), (8, 128)),
    "vocabulary": ((2, 8, 1024, 128, 128_256), (1, 65)),
}


def _weights(layers, heads, d, r, vocabulary):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * shape[-2] ** -0.5

    inner = (layers, heads, d, r)
    return fc.CircuitWeights(
        normal(vocabulary, d) * vocabulary**0.5, normal(*inner), normal(*inner), normal(*inner),
        normal(layers, heads, r, d), normal(d, vocabulary), norm="rmsnorm",
    )  # fmt: skip


def _sweeps(split, mesh, weights, shape):
    """What this process sweeps: alone, as one of two that share it, and as one of two that share nothing."""
    half = weights.d_vocab // 2  # tokens that half of the vocabulary has too
    tokens = torch.randint(0, half, shape, generator=torch.Generator().manual_seed(1))
    if split != "vocabulary":
        part = tokens.chunk(mesh.size())[mesh.get_local_rank()]
        return {
            "alone": (weights, tokens, "none"),
            "shared": (weights, tokens, split),
            "apart": (weights, part, "none"),
        }
    sharded = replace(weights, W_U=distribute_tensor(weights.W_U, mesh, [Shard(1)]))
    own = replace(weights, W_E=weights.W_E[:half], W_U=sharded.own_W_U)
    return {"alone": (weights, tokens, "none"), "shared": (sharded, tokens, split), "apart": (own, tokens, "none")}


def _process(rank, meeting, asked, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sweeps, made = {}, None
    while (task := asked.get()) is not None:
        split, kind = task
        if split != made:
            sweeps = {}
            sweeps, made = _sweeps(split, mesh, _weights(*SHAPES[split][0]), SHAPES[split][1]), split
            torch.distributed.barrier()
        weights, tokens, way = sweeps[kind]
        start, used = time.perf_counter(), time.process_time()
        fc.sweep(weights, tokens, split=way)
        answers.put((time.perf_counter() - start, time.process_time() - used))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A function of a split and of who sweeps: seconds, and CPU seconds of all processes."""
    context = multiprocessing.get_context("spawn")
    asked, answers = [context.Queue() for _ in range(2)], context.Queue()
    meeting = f"file://{tmp_path_factory.mktemp('processes') / 'meeting'}"
    workers = [context.Process(target=_process, args=(rank, meeting, asked[rank], answers)) for rank in range(2)]
    for worker in workers:
        worker.start()

    def run(split, kind):
        busy = asked[:1] if kind == "alone" else asked
        for queue in busy:
            queue.put((split, kind))
        times, used = zip(*(answers.get() for _ in busy), strict=True)
        return max(times), sum(used)

    yield run
    for queue in asked:
        queue.put(None)
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("split", SHAPES)
def test_two_processes(split, timed, found):
    (layers, heads, d, r, vocabulary), (sequences, length) = SHAPES[split]
    kinds = ("shared", "apart", "alone") if split != "experiments" else ("shared", "alone")  # the first makes weights
    rounds = [{kind: timed(split, kind) for kind in kinds} for _ in range(ROUNDS + 1)][1:]

    def ratio(what, over, of):
        """Median over the rounds; `of` 0: of seconds, 1: of CPU seconds."""
        return statistics.median(times[what][of] / times[over][of] for times in rounds)

    shape = f"sweep of {layers}x{heads} heads, d={d} r={r} V={vocabulary}, {sequences} sequences of {length}"
    goal = ">= 1.7" if split == "sequences" else ""
    found(f"{shape}: one process on one core / two, split by {split}", f"{ratio('alone', 'shared', 0):.2f}", goal)
    found(f"  CPU time of both / of one, split by {split}", f"{ratio('shared', 'alone', 1):.3f}")
    if "apart" in kinds:
        apart = f"two processes with half of the {split} each, which share nothing"
        found(f"  one process on one core / {apart}", f"{ratio('alone', 'apart', 0):.2f}")
        found(f"  CPU time of {apart}, / of one", f"{ratio('apart', 'alone', 1):.3f}")
        # What the split adds to what two busy cores take of each other.
        most = "<= 1.05" if split == "vocabulary" else ""
        found(f"  CPU time of both / of {apart}", f"{ratio('shared', 'apart', 1):.3f}", most)
