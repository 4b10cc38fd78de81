"""Is a change of the CPU kernels neutral? This tree against an older revision, op by op.

    python -m bench.neutral --base REV        or        make neutral BASE=REV

Two comparisons, on one thread of the AVX2 tier:
- instructions by callgrind: within 1%;
- seconds of calls made in turn by two processes, one for each tree, medians of the ratios: within 3%.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYFASTCIRCUITS_CPU_TIER": "avx2", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MOST_INSTRUCTIONS, MOST_SECONDS = 1.01, 1.03
CALLS = 5
OPS = ("sweep_nll", "factored_topk", "composition_scores", "frozen_attention")


def calls() -> dict[str, Callable[[], object]]:
    """A call of each op, by public names alone: trees may lay out their packages differently.

    Inputs are large enough that what a kernel does is counted, not the Python of a call (1e6 instructions).
    """
    import torch

    import pyfastcircuits as fc

    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    P, T, V, r, groups = 48, 64, 5003, 64, 4
    base, delta, basis = normal(T, V), normal(P, T, r) / 8, normal(groups, r, V)
    targets, group = torch.randint(0, V, (T,), generator=g), torch.arange(P) % groups
    A, B = normal(1000, 64), normal(64, 4000)
    L, H, d, s, words = 6, 8, 512, 64, 500
    attention = (normal(L, H, d, s) for _ in range(3))
    weights = fc.CircuitWeights(normal(words, d), *attention, normal(L, H, s, d), normal(d, words))
    q, k, values = normal(1, 4, 1024, 64), normal(1, 4, 1024, 64), normal(3, 1, 4, 1024, 64)
    lse = fc.ops.attention_lse(q, k)
    return {
        "sweep_nll": lambda: fc.ops.sweep_nll(base, delta, basis, targets, group=group),
        "factored_topk": lambda: fc.ops.factored_topk(A, B, 100),
        "composition_scores": lambda: fc.composition_scores(weights, "K"),
        "frozen_attention": lambda: fc.ops.frozen_attention(q, k, values, lse),
    }


def count() -> None:
    """Under callgrind: dumps each op's instructions, of CALLS calls after a first that is not counted.

    Several, because talking to valgrind and collecting garbage cost as much as the Python of a call.
    """

    def control(*what: str) -> None:
        process = subprocess.Popen(
            ["callgrind_control", *what, str(os.getpid())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:  # valgrind listens while code runs, not in a system call
            pass

    functions = calls()
    gc.disable()
    control("-i", "on")
    for name in OPS:
        functions[name]()
        control("-z")
        for _ in range(CALLS):
            functions[name]()
        control("-d", name)


def serve() -> None:
    """Answers each op's name on stdin with the seconds of one call."""
    functions = calls()
    for line in sys.stdin:
        start = time.perf_counter()
        functions[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def built(revision: str) -> Path:
    """A clone of a revision with its CPU kernels, kept from run to run."""
    name = subprocess.check_output(["git", "rev-parse", "--short=9", f"{revision}^{{commit}}"], cwd=ROOT, text=True)
    tree = ROOT / "build" / "neutral" / name.strip()
    if not tree.exists():
        subprocess.run(["git", "clone", "-q", "--no-checkout", ROOT, tree], check=True)
        subprocess.run(["git", "checkout", "-q", name.strip()], cwd=tree, check=True)
    if not (tree / "pyfastcircuits" / "_ops.so").exists():
        without_cuda = os.environ | {"CUDACXX": "/bin/false"}
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=without_cuda, check=True
        )
    return tree


def environment(tree: Path) -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree)}


def instructions(tree: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        callgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        subprocess.run([*callgrind, sys.executable, __file__, "--count"], env=environment(tree), check=True)
        dumps = [path.read_text() for path in Path(folder).iterdir()]
    counts = {}
    for dump in dumps:
        trigger = re.search(r"^desc: Trigger: .*?(\w+)$", dump, re.MULTILINE)
        total = re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)
        if trigger and total and trigger[1] in OPS:
            counts[trigger[1]] = int(total[1])
    return counts


def paired(trees: list[Path], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each op, for each round those of each tree; which tree is first alternates."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in trees
    ]

    def seconds(worker: subprocess.Popen[str], name: str) -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(name, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    times: dict[str, list[list[float]]] = {name: [] for name in OPS}
    for i in range(rounds + 1):
        for name in OPS:
            taken = [0.0, 0.0]
            for side in (0, 1) if i % 2 else (1, 0):
                taken[side] = seconds(workers[side], name)
            if i:  # the first call of each is not counted
                times[name].append(taken)
    for worker in workers:
        worker.communicate()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=41, help="of paired calls")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.count:
        return count()
    if asked.serve:
        return serve()
    if asked.base is None:
        parser.error("--base is missing")
    trees = [built(asked.base), ROOT]
    with ThreadPoolExecutor() as both:  # what is counted does not depend on what else runs
        before, after = both.map(instructions, trees)
    times = paired(trees, asked.rounds)
    print(f"| op | instructions, {asked.base} | now | ratio | seconds, {asked.base} | now | median ratio |")
    print("|---|---|---|---|---|---|---|")
    neutral = True
    for name in OPS:
        old, new = (statistics.median(x) for x in zip(*times[name], strict=True))
        ratio, slower = after[name] / before[name], statistics.median(b / a for a, b in times[name])
        neutral &= ratio <= MOST_INSTRUCTIONS and slower <= MOST_SECONDS
        print(f"| {name} | {before[name]:,} | {after[name]:,} | {ratio:.4f} | {old:.4f} | {new:.4f} | {slower:.3f} |")
    sys.exit(0 if neutral else f"not neutral: at most {MOST_INSTRUCTIONS} and {MOST_SECONDS} are")


if __name__ == "__main__":
    main()
