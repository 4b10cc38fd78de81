"""A fuzz of everything public: each call ends in a value, or in an error that says which argument is at fault.

`python tests/fuzz.py --calls N --seed S` draws calls with hypothesis: a small model, arguments that fit it, and often
one or two that belong nowhere (support/fuzz_calls.py, fuzz_values.py). They are made in child processes, each of which writes down a
call before it makes it: a crash or a hang is charged to that call, and the next child goes on after it. `--only
PATTERN` takes some functions, and `--replay NUMBERS` makes one call again, by the numbers that the report gives for it.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.fuzz_calls import ENTRIES, OFTEN, RAW, Call, Entry
from support.fuzz_values import Choices
from torch import Tensor

import pyfastcircuits as fc

HANG = 20.0  # seconds
START = 180.0  # of a child, until its first call
MEMORY = 12 << 30  # bytes of addresses that a child may have
KINDS = ("value", "clear error", "unclear error", "wrong", "crash", "hang")


# What comes of it.

ERRORS = (ValueError, TypeError, IndexError, RuntimeError, OverflowError, NotImplementedError, OSError, ImportError)
OURS = re.compile(
    r"pyfastcircuits[/.]\w+[/.]|\.(cpp|cc|h|cuh|cu|py|so)\b|(?<!\w)_[a-zA-Z]\w*|(?<!<lambda>\.)<locals>|pybind|operator\(\)"
    r"|\b(?!pyfastcircuits::)\w+::\w+"
)
OF_TORCH = re.compile(
    r"size of tensor a |einsum\(\)|mat1 and mat2|out of bounds for dimension|not implemented for '|Allocator|has no"
    r" attribute|attribute name must|object is not|not supported between|unsupported operand|has no len\(\)|not subscriptable|recursion depth|must be .*, not \w+$"
)
CONTRADICTION = re.compile(
    r"is an? (\w+), expected (.*\b)?\1\b|\b0 to -1\b|unexpected keyword argument '(?!wrong|mask_|Backend)"
)
EVERYTHING = Entry("the arguments of a call", None, tuple(p for entry in ENTRIES.values() for p in entry.parameters))
OF_DISPATCH = re.compile(  # torch's own words for the arguments of a raw op
    r"^Could not run 'pyfastcircuits::\w+' with arguments from the '\w+' backend"
    r"|^pyfastcircuits::\w+\(\) ((Exp|exp)ected|is missing|[Uu]nknown)"
)


def is_clear(error: BaseException, call: Call | None) -> bool:
    """Whether an error names an argument (or what this machine lacks), and nothing of ours.

    Without a call, it is of the making of some argument.
    """
    message = str(error)
    entry = EVERYTHING if call is None else call.entry
    if entry.name in RAW and (OF_DISPATCH.search(message) or isinstance(error, RecursionError)):
        return True
    if isinstance(error, AssertionError) and entry.owner is fc.FactoredMatrix:  # as TransformerLens' tests ask
        return True
    if not isinstance(error, ERRORS) or isinstance(error, RecursionError):
        return False
    if any(pattern.search(message) for pattern in (OURS, OF_TORCH, CONTRADICTION)):
        return False
    if re.search(rf"(?<![\w.]){entry.called}\(\) (got|missing|takes|is missing|expected|Expected)", message):
        return True
    if isinstance(error, (RuntimeError, ImportError)) and re.search("CUDA|[Tt]riton|needs? \\w+:", message):
        return True
    letter = r"(?= (is|has|holds|and|must|differs)\b|['\[:.,=(])"  # after a name that may be the article A
    chosen = [x for x in (call.arguments.get("name"),) if isinstance(x, str)] if call else []  # of check_range
    names = (re.escape(name) + ("" if len(name) > 1 else letter) for name in (*entry.names, *chosen) if name)
    return any(re.search(rf"(?<![\w'])'?{name}(?!\w)", message) for name in names)


def numbers(value: Any) -> Iterator[Any]:
    """The tensors and numbers of a result."""
    if isinstance(value, (Tensor, int, float)):
        yield value
    elif isinstance(value, fc.FactoredMatrix):
        yield from (value.A, value.B)
    elif isinstance(value, Mapping):
        yield from (x for inside in value.values() for x in numbers(inside))
    elif isinstance(value, (list, tuple)):
        yield from (x for inside in value for x in numbers(inside))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in ("seconds", "guard", "forward"))
        yield from (x for name in fields for x in numbers(getattr(value, name)))


def difference(found: Any, plain: Any) -> str:
    """How two results differ; "" if they do not."""
    pairs = list(numbers(found)), list(numbers(plain))
    if len(pairs[0]) != len(pairs[1]):
        return f"{len(pairs[0])} numbers, outside {len(pairs[1])}"
    for one, other in zip(*pairs, strict=True):
        if not isinstance(one, Tensor):
            if one != other and not (one != one and other != other) and isinstance(one, int):
                return f"{one!r}, outside {other!r}"
        elif (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
            return (
                f"{one.dtype} {one.device} {list(one.shape)}, outside {other.dtype} {other.device} {list(other.shape)}"
            )
        elif not torch.allclose(one.detach(), other.detach(), rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"numbers that differ by {(one.detach() - other.detach()).abs().max().item():.3g} from those outside"
    return ""


def outcome(call: Call, folder: Path) -> tuple[str, str]:
    """The kind of a call's end, and what to say of it."""
    found, error = attempt(call, call.mode)
    if error is not None and not is_clear(error, call):
        return "unclear error", said(error)
    if call.mode and call.valid:
        again = Call(Choices.again(call.choices.made), [*ENTRIES], folder)
        plain, plain_error = attempt(again, "")
        if error is None and plain_error is None:
            differs = difference(found, plain)
            return ("wrong", f"in {call.mode}: {differs}") if differs else ("value", "")
        gradients = call.mode in ("no_grad", "inference_mode")  # what is not differentiable works without
        if (error is None) != (plain_error is None) and not gradients:
            return "wrong", f"in {call.mode}: {said(error or plain_error)} only {'there' if error else 'outside'}"
    return ("value", "") if error is None else ("clear error", said(error))


def attempt(call: Call, mode: str) -> tuple[Any, BaseException | None]:
    try:
        return call(mode), None
    except BaseException as error:
        return None, error


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


# Many calls.


def conduct(seed_: int, count: int, names: Sequence[str], write: Callable[[dict[str, Any]], None]) -> None:
    """Make calls in this process; each is written before it is made, and its outcome after it."""

    @seed(seed_)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=True))
    def calls(random: Random) -> None:
        make(Choices(random.randrange), names, folder, write)

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        calls()


def make(choices: Choices, names: Sequence[str], folder: Path, write: Callable[[dict[str, Any]], None]) -> None:
    """One call."""
    try:
        call = Call(choices, names, folder)
    except Exception as error:  # of a valid instance or argument, which is a call of its own
        of = f"of {[*ENTRIES][choices.made[0]]}"
        write({"entry": EVERYTHING.name, "call": of, "made": choices.made, "valid": True})
        write({"outcome": "clear error" if is_clear(error, None) else "unclear error", "said": said(error)})
        return
    write({"entry": call.entry.name, "call": str(call), "made": choices.made, "valid": call.valid})
    kind, text = outcome(call, folder)
    write({"outcome": kind, "said": text})


class Findings:
    """The outcomes of many calls."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.entries: Counter[str] = Counter()

    def add(self, call: dict[str, Any], kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.entries[call["entry"]] += 1
        if kind not in KINDS[:2]:
            pattern = re.sub(r"'[^']*'|\[[^\]]*\]|-?\d+(\.\d+)?", "_", text)[:70]
            self.groups[kind, pattern].append({**call, "said": text})

    @property
    def calls(self) -> int:
        return self.counts.total()

    def share(self, kind: str) -> float:
        return self.counts[kind] / max(self.calls, 1)

    @property
    def good(self) -> bool:
        return self.share("unclear error") <= 0.01 and not any(self.counts[kind] for kind in KINDS[3:])

    def table(self, most: int = 40) -> str:
        """Markdown."""
        lines = ["| outcome | calls | % |", "| --- | --: | --: |"]
        lines += [f"| {kind} | {self.counts[kind]} | {100 * self.share(kind):.2f} |" for kind in KINDS]
        lines += [
            f"| all, of {len(self.entries.keys() & ENTRIES)} of {len(ENTRIES)} functions | {self.calls} | 100 |",
            "",
        ]
        rank = {kind: i for i, kind in enumerate(reversed(KINDS))}
        for (kind, _), found in sorted(self.groups.items(), key=lambda g: (rank[g[0][0]], -len(g[1])))[:most]:
            least = min(found, key=lambda call: (not call["valid"], len(call["call"])))
            functions = Counter(call["entry"] for call in found).most_common()
            listed = ", ".join(f"{name} ({count})" for name, count in functions[:12])
            lines.append(f"- {kind}, {len(found)} x {least['said']}\n  - {listed}{', ...' if functions[12:] else ''}")
            lines.append(
                f"  - {'valid: ' if least['valid'] else ''}`{least['call']}`\n  - `--replay {','.join(map(str, least['made']))}`"
            )
        return "\n".join(lines)


def fuzz(calls: int, seed_: int, names: Sequence[str] = tuple(OFTEN), seconds: float = 1e9) -> Findings:
    """Make calls in child processes, one at a time."""
    findings, end = Findings(), time.monotonic() + seconds
    while findings.calls < calls and time.monotonic() < end:
        count = min(calls - findings.calls, 2000)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "calls"
            log.touch()
            arguments = ["--calls", str(count), "--seed", str(seed_), "--log", str(log), "--names", ",".join(names)]
            hung, status, tail = _watch([sys.executable, str(Path(__file__).resolve()), *arguments], log, end)
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        ended = len(lines) // 2
        for call, result in zip(lines[0::2], lines[1::2], strict=False):
            findings.add(call, result["outcome"], result["said"])
        if len(lines) % 2:  # it ended within a call
            kind = "hang" if hung else "crash"
            if hung or status != 0:
                findings.add(lines[-1], kind, f"status {status} {tail[-300:]}".strip())
        elif status != 0 and not hung:
            raise RuntimeError(f"the child ended between calls, with status {status}: {tail[-2000:]}")
        if ended == 0 and not lines:
            break  # out of time
        seed_ += 1
    return findings


def _watch(command: list[str], log: Path, end: float) -> tuple[bool, int, str]:
    """Run a child until it ends, hangs or is out of time."""
    environment = os.environ | {"PYTHONPATH": str(Path(fc.__file__).parents[1])}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, cwd=log.parent, env=environment) as child,
    ):
        hung, started = False, time.time()
        while child.poll() is None:
            time.sleep(0.1)
            begun = log.stat().st_size > 0
            silent = time.time() - (log.stat().st_mtime if begun else started)
            hung = silent > (HANG if begun else START)
            if hung or time.monotonic() > end:
                child.kill()
                child.wait()
                status = 0 if not hung else 1
                break
        else:
            status = child.returncode
        errors.seek(0)
        return hung, status, errors.read()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--only", default="*", help="which functions, as a file pattern: 'ops.*'")
    parser.add_argument("--most", type=int, default=40, help="the groups that are listed")
    parser.add_argument("--replay", help="the numbers of one call")
    parser.add_argument("--log", help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.replay:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            call = Call(Choices.again([int(x) for x in chosen.replay.split(",")]), [*ENTRIES], Path(folder))
            print(call, *outcome(call, Path(folder)), sep="\n")
            print(call(call.mode))
        return 0
    if chosen.log:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(chosen.log, "a", buffering=1) as log:
            conduct(chosen.seed, chosen.calls, chosen.names.split(","), lambda line: print(json.dumps(line), file=log))
        return 0
    names = [name for name in OFTEN if fnmatch.fnmatch(name, chosen.only)]
    findings = fuzz(chosen.calls, chosen.seed, names, chosen.minutes * 60)
    print(findings.table(chosen.most))
    return 0 if findings.good else 1


if __name__ == "__main__":
    sys.exit(main())
