"""Two processes that share a sweep on two cores, beside one process on one core."""

import multiprocessing
import statistics
import time

import pytest
import torch

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


def _process(rank, meeting, asked, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    weights, tokens, shape = None, None, None
    while (task := asked.get()) is not None:
        split, sizes = task
        if sizes != shape:
            shape = sizes
            weights = _weights(*sizes[0])
            tokens = torch.randint(0, sizes[0][-1], sizes[1], generator=torch.Generator().manual_seed(1))
        start, used = time.perf_counter(), time.process_time()
        fc.sweep(weights, tokens, split=split)
        answers.put((time.perf_counter() - start, time.process_time() - used))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A function of a split and sizes: seconds, and CPU seconds of all processes; with "none" of one process alone."""
    context = multiprocessing.get_context("spawn")
    asked, answers = [context.Queue() for _ in range(2)], context.Queue()
    meeting = f"file://{tmp_path_factory.mktemp('processes') / 'meeting'}"
    workers = [context.Process(target=_process, args=(rank, meeting, asked[rank], answers)) for rank in range(2)]
    for worker in workers:
        worker.start()

    def run(split, sizes):
        busy = asked[:1] if split == "none" else asked
        for queue in busy:
            queue.put((split, sizes))
        times, used = zip(*(answers.get() for _ in busy), strict=True)
        return max(times), sum(used)

    yield run
    for queue in asked:
        queue.put(None)
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("split", SHAPES)
def test_two_processes(split, timed, found):
    sizes = SHAPES[split]
    (layers, heads, d, r, vocabulary), (sequences, length) = sizes
    speed, overhead = [], []
    for i in range(ROUNDS + 1):
        alone, shared = timed("none", sizes), timed(split, sizes)
        if i:
            speed.append(alone[0] / shared[0])
            overhead.append(shared[1] / alone[1])
    shape = f"sweep of {layers}x{heads} heads, d={d} r={r} V={vocabulary}, {sequences} sequences of {length}"
    goal = ">= 1.7" if split == "sequences" else ""
    found(f"{shape}: one process on one core / two, split by {split}", f"{statistics.median(speed):.2f}", goal)
    most = "<= 1.05" if split == "vocabulary" else ""
    found(f"  CPU time of both / of one, split by {split}", f"{statistics.median(overhead):.3f}", most)
