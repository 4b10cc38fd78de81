"""Whether the tests catch what they must: the code is made wrong in one place at a time, and they must fail.

`python tests/mutations.py [NAME ...]` works on a copy of this tree in a temporary folder and ends with a table of what
was caught and what survived; the exit status is 1 if a mutation survived, if its place was not found once, or if the
tests fail without any. `--tree FOLDER` takes another tree, `--find` only looks the places up.

A mutation is a regular expression that must match in one place of the files it names, what stands there instead, and
the tests that are expected to notice: none of them may need more than the built library. C++ is built anew in the copy
(`_ops` alone, at -O1, by ccache if there is one); Triton kernels run interpreted.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv*", "build", "out", "__pycache__", ".*_cache", ".hypothesis", ".benchmarks", "*.egg-info")
LIMIT = 1200  # seconds of one run of tests: a mutation may loop for ever


class Mutation(NamedTuple):
    """One place made wrong."""

    files: str  # a pattern; the text must stand once in all of them together
    text: str
    instead: str
    tests: str  # pytest's arguments


MUTATIONS = {
    # A lane past the vocabulary counts.
    "padding of a sweep": Mutation(
        "csrc/cpu/*.h",
        r"for \(int64_t j = here; (j < kColumns<T>; \+\+j\) scratch\[j\] = -)",
        r"for (int64_t j = here + 1; \1",
        "tests/test_logits_lse.py",
    ),
    "coefficient of exp": Mutation(
        "csrc/cpu/*.h",
        r"0\.041664776f",
        "0.0411f",
        "tests/test_logits_lse.py tests/test_frozen_attention.py -k 'fp64 or edge or huge'",
    ),
    "coefficient of exp - 1": Mutation(
        "csrc/cpu/*.h",
        r"0\.16666828f",
        "0.16664f",
        "tests/test_effects.py",
    ),
    # Rows are taken for small whose changes may be twice what the polynomial is made for.
    "limit of the small form": Mutation(
        "csrc/cpu/*.h",
        r"kSmall = 0\.3466",
        "kSmall = 0.9",
        "tests/test_effects.py",
    ),
    # Of exp(d) - 1 = (2^n - 1) + 2^n (exp(rest) - 1) the first is left out.
    "powers of two of large changes": Mutation(
        "csrc/cpu/*.h",
        r"lanes\.direct \+= more \+ steps;",
        "lanes.direct += more;",
        "tests/test_effects.py",
    ),
    # A token of little probability that an ablation raises is summed with the others.
    "tokens that are raised": Mutation(
        "csrc/cpu/*.h",
        r"kRaised = 16;",
        "kRaised = 1e30;",
        "tests/test_effects.py",
    ),
    # The first products of deep sums are left out.
    "inner loop of a tile": Mutation(
        "csrc/cpu/tile.h",
        r"int64_t k = 0;(\s+constexpr int pauses)",
        r"int64_t k = count > 100;\1",
        "tests/test_sweep_nll.py tests/test_diagonal_ranks.py -k 'test_against_fp64 or sums_are_exact'",
    ),
    # An entry equal to the threshold, and before it, is passed over.
    "ties with a threshold": Mutation(
        "csrc/cpu/*topk*",
        r"return (\w+)\.place < place\(tile, i\) \? \1\.above : \1\.at_least;",
        r"return \1.above;",
        "tests/test_factored_topk.py -k 'exact or ties or first or any_shape'",
    ),
    "weight of a Gram diagonal": Mutation(
        "csrc/cpu/*gram*",
        r"rows == panel \? 1 : 2",
        "rows == panel ? 2 : 2",
        "tests/test_pair_norms.py -k 'matches or agree'",
    ),
    # One source too many is seen where a tile crosses the window's edge.
    "window of attention": Mutation(
        "csrc/cpu/*attention*",
        r"smaller\(kW, j - first \+ a\.window\)",
        "smaller(kW, j - first + a.window + 1)",
        "tests/test_frozen_attention.py -k window",
    ),
    # A sum is not scaled to the new maximum.
    "online maximum in Triton": Mutation(
        "kernels/*.py",
        r"(total = tl\.where\(total == 0, 0\.0, total) \* tl\.exp2\(reference\(highest\) - level\)\)"
        r"(?=\s+total \+= tl\.sum\(tl\.exp2\(logits \* LOG2E - level\[:, None\]\), 1\)"
        r"(?:\s+return|\s+highest = tallest\s+here = inside & \(home == g\)\s+place = split))",
        r"\1)",
        "tests/interpreted/test_triton_logits_lse.py",
    ),
    "mean over padding": Mutation(
        "pyfastcircuits/**/*.py",
        r"\.double\(\)\.where\(real\[\.\.\., None\], 0\)",
        ".double()",
        "tests/test_masked_means.py",
    ),
    # Parts of the sequences count by something else than by the positions scored in them.
    "share of positions": Mutation(
        "pyfastcircuits/**/*.py",
        r"(values\.mean\(-1\) \* )(share|\(asked\.count / self\.how\.asked\.count\))",
        r"\1\2 ** 0.9",
        "tests/test_experiments.py tests/test_ablation.py -k 'cutting or mask'",
    ),
    "norm scale of a path": Mutation(
        "pyfastcircuits/**/*.py",
        r"(= carried \* trace\.value_scale\()layer\)",
        r"\1layer - 1)",
        "tests/test_paths.py -k all_paths",
    ),
    # Queries are read where keys are asked for, and keys where queries.
    "input of an edge": Mutation(
        "pyfastcircuits/**/*.py",
        r'(if name in inputs else old for name, new, old in zip\()"QKV"',
        r'\1"KQV"',
        "tests/test_experiments.py -k 'composition_ablation or cut_together'",
    ),
    # The highest order of each layer is lost.
    "recursion of the orders": Mutation(
        "pyfastcircuits/**/*.py",
        r"raised = min\(layer \+ 1, max_order\)",
        "raised = min(layer, max_order)",
        "tests/test_paths.py -k 'graded or orders'",
    ),
}


class Place(NamedTuple):
    """Where a mutation goes."""

    file: Path
    text: str  # of the whole file, mutated


def find(tree: Path, mutation: Mutation) -> Place | str:
    """The one place, or why there is none."""
    found = []
    for file in sorted(tree.glob(mutation.files)):
        text = file.read_text()
        found += [(file, text, match) for match in re.finditer(mutation.text, text)]
    if len(found) != 1:
        return f"stands in {len(found)} places of {mutation.files}"
    file, text, match = found[0]
    return Place(file, text[: match.start()] + match.expand(mutation.instead) + text[match.end() :])


class Copy:
    """The tree in a folder of its own, with what is built for it."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.root, self.build, self.stale = folder / "tree", folder / "build", False
        shutil.copytree(tree, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        link = self.root / "pyfastcircuits" / "kernels"  # where an installed package has it
        shutil.rmtree(link, ignore_errors=True)
        link.symlink_to(self.root / "kernels")

    def compile(self) -> None:
        """`_ops`, in place."""
        import pybind11
        import torch

        settings = {
            "CMAKE_BUILD_TYPE": "Mutated",
            "CMAKE_CXX_FLAGS_MUTATED": "-O1",
            "CMAKE_CUDA_COMPILER": "NOTFOUND",
            "PyFC_OUTPUT": self.root / "pyfastcircuits",
            "PyFC_TORCH": Path(torch.__file__).parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if shutil.which("ccache"):
            settings["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
        definitions = [f"-D{key}={value}" for key, value in settings.items()]
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(["cmake", "-S", self.root, "-B", self.build, "-GNinja", *definitions], **quiet)
        subprocess.run(["cmake", "--build", self.build, "--target", "_ops"], **quiet)

    def test(self, arguments: str) -> tuple[str, str]:
        """ "caught", "survived" or "no verdict", and the first test that failed or pytest's last line."""
        environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        if "interpreted" in arguments:
            environment["TRITON_INTERPRET"] = "1"
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider --tb=no -rf {arguments}"
        try:
            run = subprocess.run(
                command, shell=True, cwd=self.root, env=environment, timeout=LIMIT, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return "caught", f"no end after {LIMIT} s"
        lines = run.stdout.strip().splitlines() or [run.stderr[-200:]]
        failed = [line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED")]
        if run.returncode < 0:
            return "caught", f"signal {-run.returncode}"
        return {0: "survived", 1: "caught"}.get(run.returncode, "no verdict"), (failed or lines[-1:])[0]

    def judge(self, mutation: Mutation) -> tuple[str, str]:
        """With the mutation in its place, which is mended afterwards."""
        place = find(self.root, mutation)
        if isinstance(place, str):
            return "no verdict", place
        before = place.file.read_text()
        place.file.write_text(place.text)
        try:
            if "csrc" in place.file.parts:
                self.stale = True
                self.compile()
            elif self.stale:
                self.compile()
                self.stale = False
            return self.test(mutation.tests)
        except subprocess.CalledProcessError as problem:
            return "no verdict", f"does not compile: {problem}"
        finally:
            place.file.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description="Applies mutations one at a time and runs the tests they are for.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(MUTATIONS)}; all if none is given")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another tree than this one")
    parser.add_argument("--find", action="store_true", help="only look the places up")
    options = parser.parse_args()
    chosen = {name: MUTATIONS[name] for name in options.names or MUTATIONS}
    places = {name: find(options.tree, mutation) for name, mutation in chosen.items()}
    if options.find:
        for name, place in places.items():
            print(f"{name:28}", place if isinstance(place, str) else place.file.relative_to(options.tree))
        return any(isinstance(place, str) for place in places.values())

    verdicts = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Copy(options.tree.resolve(), Path(folder))
        native = any("csrc" in mutation.files for mutation in chosen.values())
        if native:
            copy.compile()
        for name, mutation in {"none": None, **chosen}.items():
            start = time.perf_counter()
            if mutation is None:
                tests = dict.fromkeys(m.tests for m in chosen.values())
                outcomes = {test: copy.test(test) for test in tests}
                verdict = next(((v, f"{w} ({t})") for t, (v, w) in outcomes.items() if v != "survived"), None)
                if verdict is not None:
                    print(f"The tests must pass before anything is made wrong: {verdict[1]}")
                    return 1
                continue
            verdicts[name], what = copy.judge(mutation)
            print(f"{verdicts[name]:10} {name:28} {time.perf_counter() - start:6.0f} s  {what}", flush=True)
    caught = sum(verdict == "caught" for verdict in verdicts.values())
    print(f"{caught} of {len(verdicts)} mutations caught")
    return int(caught < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
