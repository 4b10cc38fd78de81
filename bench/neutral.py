"""Is a change of the CPU kernels neutral? This tree against an older revision, op by op.

    python -m bench.neutral --base REV        or        make neutral BASE=REV

Two comparisons, on one thread of the AVX2 tier:
- instructions of the compiled ops by callgrind: within 1%;
- seconds of calls made in turn by two processes, one for each tree, medians of the ratios: within 3%.
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import op_calls

ROOT = Path(__file__).parents[1]
MOST_INSTRUCTIONS, MOST_SECONDS = 1.01, 1.03


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


def paired(trees: list[Path], names: list[str], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each op, for each round those of each tree; which tree is first alternates."""
    workers = [
        subprocess.Popen(
            [sys.executable, op_calls.__file__, "serve"],
            env=op_calls.environment(tree),
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

    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names:
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
    parser.add_argument("--base", required=True, help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=41, help="of paired calls")
    asked = parser.parse_args()
    trees = [built(asked.base), ROOT]
    with ThreadPoolExecutor() as both:  # what is counted does not depend on what else runs
        before, after = both.map(op_calls.instructions, trees)
    times = paired(trees, sorted(before), asked.rounds)
    print(f"| op | instructions, {asked.base} | now | ratio | seconds, {asked.base} | now | median ratio |")
    print("|---|---|---|---|---|---|---|")
    neutral = True
    for name in times:
        old, new = (statistics.median(x) for x in zip(*times[name], strict=True))
        ratio, slower = after[name] / before[name], statistics.median(b / a for a, b in times[name])
        neutral &= ratio <= MOST_INSTRUCTIONS and slower <= MOST_SECONDS
        print(f"| {name} | {before[name]:,} | {after[name]:,} | {ratio:.4f} | {old:.4f} | {new:.4f} | {slower:.3f} |")
    sys.exit(0 if neutral else f"not neutral: at most {MOST_INSTRUCTIONS} and {MOST_SECONDS} are")


if __name__ == "__main__":
    main()
