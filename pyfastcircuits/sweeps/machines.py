"""What a machine takes for a unit of each kind of work: measured on this one, from data sheets of others."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pyfastcircuits.ops import Precision, joint_partial, sweep_partial
from pyfastcircuits.ops.backend import GPU_SHARE
from pyfastcircuits.ops.library import build_info
from pyfastcircuits.ops.logits_lse import clean_logsumexp
from pyfastcircuits.ops.onednn import OneDnnMatmul
from pyfastcircuits.run import memory as bounds
from pyfastcircuits.run.patterns import apply_pattern, softmax_pattern
from pyfastcircuits.sweeps.costs import EFFECT, FLOAT, PAIR, SHARED, Work

MEASURED, SHEET = "measured here", "from data sheets, not measured"
ROUNDS, SHORTEST = 3, 0.02  # of each loop, of which the fastest counts; seconds of a round, at least
LAUNCH = 5e-6  # seconds that torch takes to start an operation on a GPU


@dataclass(frozen=True)
class Machine:
    """A device, or a computer with a CPU.

    Attributes:
        name: as it is asked for, or the processor's.
        source: where the rates are from.
        rates: seconds for a unit of each kind of work.
        memory: bytes.
        link: bytes a second to another process.
        block, clean_block: the bytes of run.memory's bounds there.
        cores: that processes on it share; None where each process has a device of its own.
        threads: of the process that was measured.
    """

    name: str
    source: str
    rates: Work
    memory: int
    link: float
    block: int = bounds.BLOCK_BYTES
    clean_block: int = bounds.CLEAN_LOGITS_BYTES
    cores: int | None = None
    threads: int = 1

    def seconds(self, work: Work, processes: int = 1) -> float:
        """The time of work that each of some processes has to do."""
        crowded = 1.0 if self.cores is None else max(1.0, processes * self.threads / self.cores)
        total: float = sum(getattr(work, x.name) * getattr(self.rates, x.name) for x in fields(Work))
        return crowded * total


@dataclass(frozen=True)
class _Sheet:
    """A GPU's data sheet: FLOP/s without sparsity, bytes, bytes a second, exponentials a second; and the times in ms
    that the machine code of our kernels is predicted to take (all pipes in turn), by precision: of `sweep_nll` with 72
    experiments, 1,024 positions, 50,257 tokens and r = 64, and of `joint_nll` with the 66 pairs of 12 heads.
    """

    fp32: float
    tf32: float
    bf16: float
    bandwidth: float
    memory: int
    link: float
    exponentials: float
    sweep: dict[Precision, float]
    joint: dict[Precision, float]

    def machine(self, name: str, precision: Precision) -> Machine:
        if precision not in self.sweep:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(self.sweep)} for {name}")
        positions, pairs = 1024 * 50257, 66
        product = 2 / {"ieee": self.tf32 / 3, "tf32": self.tf32, "bf16": self.bf16}[precision]
        change = self.sweep[precision] * 1e-3 / (72 * positions) - 64 * product
        singles = 12 * positions * (change + 64 * product)
        byte = 1 / self.bandwidth
        rates = Work(
            products=2 / self.fp32, plain_products=2 / self.fp32, patterns=2 / self.fp32,
            changes=change, change_products=product,
            pair_changes=(self.joint[precision] * 1e-3 - singles) / (pairs * positions),
            logits=1 / self.exponentials + FLOAT * byte, scores=1 / self.exponentials + 5 * FLOAT * byte,
            moved=byte, calls=LAUNCH,
        )  # fmt: skip
        share = max(bounds.BLOCKS * bounds.BLOCK_BYTES, self.memory // GPU_SHARE)
        clean = max(bounds.CLEAN_LOGITS_BYTES, self.memory // GPU_SHARE)
        return Machine(name, SHEET, rates, self.memory, self.link, share // bounds.BLOCKS, clean)


_HOPPER_TIMES: dict[str, dict[Precision, float]] = {
    "sweep": {"ieee": 5.408, "tf32": 6.121, "bf16": 4.394},
    "joint": {"ieee": 7.947, "tf32": 7.981, "bf16": 5.619},
}
GPUS = {
    "A100": _Sheet(
        19.5e12, 156e12, 312e12, 2.04e12, 80 << 30, 300e9, 2.4e12,
        {"ieee": 16.39, "tf32": 26.42, "bf16": 16.25}, {"ieee": 27.44, "tf32": 25.14, "bf16": 18.97},
    ),
    "H100": _Sheet(67e12, 495e12, 989e12, 3.35e12, 80 << 30, 450e9, 3.7e12, **_HOPPER_TIMES),
    "H200": _Sheet(67e12, 495e12, 989e12, 4.8e12, 141 << 30, 450e9, 3.7e12, **_HOPPER_TIMES),
    "B200": _Sheet(
        80e12, 1.1e15, 2.25e15, 8e12, 180 << 30, 900e9, 4.4e12,
        {"ieee": 4.454, "tf32": 9.647, "bf16": 9.145}, {"ieee": 12.76, "tf32": 10.36, "bf16": 7.921},
    ),
}  # fmt: skip


def _laptop() -> Machine:
    """Eight cores with AVX2 at 3 GHz, 16 GiB, 60 GB/s."""
    multiply_add, byte = 1 / (8 * 2 * 8 * 3e9), 1 / 60e9
    rates = Work(
        products=multiply_add, plain_products=multiply_add, patterns=multiply_add, change_products=multiply_add,
        changes=EFFECT * multiply_add, pair_changes=PAIR * multiply_add, logits=2 * EFFECT * multiply_add,
        scores=5 * FLOAT * byte, moved=byte, calls=LAUNCH,
    )  # fmt: skip
    return Machine("laptop", SHEET, rates, 16 << 30, 10e9, cores=8, threads=8)


NAMES = ("here", *GPUS, "laptop")


def machine(name: str, precision: Precision = "ieee") -> Machine:
    """A machine by name; "here" is this one, measured once and kept in the user's cache.

    Raises:
        ValueError: no such machine, or a precision whose rate there is not known.
    """
    if name in GPUS:
        return GPUS[name].machine(name, precision)
    if name == "laptop":
        return _laptop()
    if name != "here":
        raise ValueError(f"machine is {name!r}, expected one of {', '.join(NAMES)}")
    return _kept(precision)


def _kept(precision: Precision) -> Machine:
    """This machine's rates from the cache, or measured."""
    facts = build_info()
    about = {
        "processor": _processor(), "tier": facts["cpu_tier"], "threads": torch.get_num_threads(),
        "torch": torch.__version__, "version": facts["version"], "precision": precision, "kinds": _KINDS,
    }  # fmt: skip
    file = _cache_folder() / "rates.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = []
    rates = next((x["rates"] for x in found if x["about"] == about), None)
    if rates is None:
        rates = asdict(measured_rates(precision))
        kept = [x for x in found if x["about"] != about]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps([*kept, {"about": about, "rates": rates}], indent=1), encoding="utf-8")
            new.replace(file)
        except OSError:  # a home that cannot be written: measured again next time
            pass
    return this_machine(Work(**rates))


def this_machine(rates: Work) -> Machine:
    """This machine with rates that were measured."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16 << 30
    there = {"cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    return Machine(_processor(), MEASURED, rates, pages, 1 / rates.moved, **there)


_KINDS = [x.name for x in fields(Work)]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyfastcircuits"


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@torch.no_grad()
def measured_rates(precision: Precision = "ieee", clock: Callable[[], float] = time.perf_counter) -> Work:
    """Seconds of this CPU for a unit of each kind of work, measured in a few seconds.

    Each loop is the operation itself at a size that is no model's, and the fastest of a few rounds counts.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    def time_of(function: Callable[[], object]) -> float:
        function()
        best, times = float("inf"), 1
        for _ in range(ROUNDS):
            while True:
                start = clock()
                for _ in range(times):
                    function()
                taken = clock() - start
                if taken >= SHORTEST:
                    break
                times *= 2
            best = min(best, taken / times)
        return best

    left, right = normal(512, 768), normal(768, 6144)
    multiplied = 512 * right.numel()
    plain = time_of(lambda: left @ right) / multiplied
    with OneDnnMatmul():
        products = time_of(lambda: left @ right) / multiplied

    q = normal(1, 8, 320, 32)
    pattern, values = softmax_pattern(q, q, 0.1, None), normal(1, 1, 8, 320, 64)
    patterns = time_of(lambda: apply_pattern(pattern, values)) / (pattern.numel() * 64)
    scores = time_of(lambda: softmax_pattern(q, q, 0.1, None)) / pattern.numel() - 32 * patterns

    positions, columns, experiments = 256, 9600, SHARED
    base, tokens = 3 * normal(positions, columns), torch.zeros(positions, 1, dtype=torch.long)
    lse = clean_logsumexp(base)
    logits = time_of(lambda: clean_logsumexp(base)) / base.numel()
    # Half of the changes are small, as those of most heads; the others as large as of a trained model's strong ones.
    sizes = torch.where(torch.arange(experiments) % 2 > 0, 1.0, 0.01)[:, None, None]

    def of_width(r: int) -> tuple[Any, Any]:
        return sizes * normal(experiments, positions, r), normal(1, r, columns) * 1.6 / r**0.5

    options: dict[str, Any] = {
        "group": torch.zeros(experiments, dtype=torch.long),
        "mean": True,
        "precision": precision,
    }
    scale, times = 1 + 0.1 * normal(experiments, positions).double().tanh(), []
    for r, more in ((24, {}), (192, {}), (24, {"scale": scale})):
        delta, basis = of_width(r)
        swept = time_of(
            lambda delta=delta, basis=basis, more=more: sweep_partial(  # type: ignore[misc]
                base, delta, basis, tokens, lse, **options, **more
            )
        )
        times.append(swept / (experiments * base.numel()))
    change_products = (times[1] - times[0]) / (192 - 24)
    change = times[0] - 24 * change_products - logits / SHARED

    delta, basis = of_width(24)
    pairs = torch.combinations(torch.arange(experiments))
    joint = time_of(lambda: joint_partial(base, delta, basis, tokens, pairs, lse, **options))
    pair_changes = (joint / base.numel() - experiments * 24 * change_products) / len(pairs)

    stream = normal(1 << 20)
    moved = time_of(lambda: stream + stream) / (2 * FLOAT * stream.numel())
    few = pattern[:, :1, :4, :4]
    calls = time_of(lambda: apply_pattern(few, values[:, :, :1, :4, :4])) / 8
    return Work(
        products=products, plain_products=plain, patterns=patterns, changes=max(change, 0.0),
        scaled_changes=max(times[2] - times[0], 0.0), change_products=change_products,
        pair_changes=max(pair_changes, 0.0), logits=logits, scores=max(scores, 0.0), moved=moved, calls=calls,
    )  # fmt: skip
