"""A call of every CPU op, on one thread at the AVX2 tier: counted by callgrind, or timed by a process that serves them.

This file is also what those processes run, on the library of any tree: it imports nothing of its own.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

TIER = "avx2"  # valgrind knows no AVX-512
CALLS = 20  # that are timed together


class Call(NamedTuple):
    """A call of an op, and how much it works out."""

    function: Callable[[], object]
    units: int
    unit: str


def calls() -> dict[str, Call]:
    """A call of each op, by names that trees have in common.

    They take about a millisecond, and a thousand times as long under callgrind, which emulates multiply-adds lane by lane.
    """
    import torch

    import pyfastcircuits as fc

    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    ops, raw = fc.ops, torch.ops.pyfastcircuits
    P, T, V, r = 8, 40, 803, 64
    base, delta, basis, targets = normal(T, V), normal(P, T, r) / 8, normal(2, r, V), torch.arange(T)
    sweep, group, pairs = (base, delta, basis, targets), torch.arange(P) % 2, torch.combinations(torch.arange(P))
    A, B, square = normal(403, r), normal(r, 1003), normal(r, 403)
    N, M, d = 10, 7, 90
    left, right, factors = normal(N, r, d), normal(M, d, r), normal(N, 2 * d, r)
    H, n, streams = 4, 149, 3
    q, k, values = normal(1, H, n, r), normal(1, H, n, r), normal(streams, 1, H, n, r)
    scores, lse = H * n * (n + 1) // 2, ops.attention_lse(q, k)
    transposed = (q, k, values, lse, None, None, None, r**-0.5, None, None, True, "ieee")
    return {
        "sweep_nll": Call(lambda: ops.sweep_nll(*sweep, group=group), P * T * V, "logit"),
        "logits_lse": Call(lambda: ops.logits_lse(*sweep[:3], group=group), P * T * V, "logit"),
        "joint_nll": Call(lambda: ops.joint_nll(*sweep, pairs, group=group), len(pairs) * T * V, "logit"),
        "target_ranks": Call(lambda: ops.target_ranks(*sweep, group=group), P * T * V, "logit"),
        "pair_norms": Call(lambda: ops.pair_norms(left, right, route="products"), N * M, "pair"),
        "pair_grams": Call(lambda: ops.pair_norms(left, right, route="gram"), N * M, "pair"),
        "triangles": Call(lambda: raw.triangles(factors), N, "factor"),
        "factored_topk": Call(lambda: ops.factored_topk(A, B, 100), len(A) * B.shape[1], "entry"),
        "diagonal_ranks": Call(lambda: ops.diagonal_ranks(A, square), len(A) ** 2, "entry"),
        "attention_lse": Call(lambda: ops.attention_lse(q, k), scores, "score"),
        "frozen_attention": Call(lambda: ops.frozen_attention(q, k, values, lse), scores, "score"),
        "frozen_attention_transposed": Call(lambda: raw.frozen_attention(*transposed), scores, "score"),
    }


def dump() -> None:
    """Under callgrind: makes every call once, and dumps what it took under the op's name."""

    def control(*what: str) -> None:
        process = subprocess.Popen(
            ["callgrind_control", *what, str(os.getpid())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:  # valgrind listens while code runs, not in a system call
            time.sleep(0.01)

    every = calls()
    control("-i", "on")
    for name, call in every.items():
        call.function()
        control("-d", name)


def serve() -> None:
    """Answers each op's name on stdin with the seconds of a few calls."""
    every = calls()
    for line in sys.stdin:
        function = every[line.strip()].function
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        print(time.perf_counter() - start, flush=True)


def environment(tree: Path) -> dict[str, str]:
    """Of a process that makes the calls on a tree's library."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return os.environ | one_thread | {"PYFASTCIRCUITS_CPU_TIER": TIER, "PYTHONPATH": str(tree)}


def instructions(tree: Path) -> dict[str, int]:
    """Instructions of each call in the library of a tree's ops alone.

    What Python, torch and the C library do is left out: it differs between machines, and from run to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        callgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        subprocess.run([*callgrind, sys.executable, __file__, "dump"], env=environment(tree), check=True)
        dumps = [path.read_text() for path in Path(folder).glob("out.*")]
    return {name[1]: in_library(x.splitlines()) for x in dumps if (name := re.search(r"Trigger: .*?(\w+)$", x, re.M))}


def in_library(lines: Iterable[str]) -> int:
    """The instructions of `_ops.so` in a dump of callgrind.

    A line of costs belongs to the object named last, but the one after "calls=" has the costs of what is called. Names
    are written once, with a number in brackets that stands for them later.
    """
    count, counted, libraries = 0, False, set()
    lines = iter(lines)
    for line in lines:
        if match := re.match(r"(c?)ob=(\(\d+\))(.*)", line):
            if match[3].endswith("/_ops.so"):
                libraries.add(match[2])
            if not match[1]:
                counted = match[2] in libraries
        elif line.startswith("calls="):
            next(lines)
        elif counted and re.match(r"[+*\d-]", line):
            count += int(line.split()[-1])
    return count


if __name__ == "__main__":
    {"dump": dump, "serve": serve}[sys.argv[1]]()
