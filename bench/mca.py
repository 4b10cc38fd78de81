"""How near the tile core's multiply loop comes to the peak of cores that are not at hand: an estimate by llvm-mca.

    python -m bench.mca        or        make mca

It compiles `pair_norms` again as each tier's build did (that of 64-bit Arm is in build/arm), to assembly, and takes the
inner loop of multiply() from it. llvm-mca, which has models of many cores, says how many cycles that loop takes if all
its data are in the L1 cache, and how many its multiply-adds alone would take if none waited: the peak.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.record import REPORTS, ROOT

MCA = "llvm-mca-19"  # models of Neoverse came after 16
PAGE = "mca.md"  # the table, in the folder of the reports
BUILDS = ("build/cmake", "build/arm/cmake")
ROUNDS = 1000


class Tier(NamedTuple):
    """What multiplies and adds on a tier, and cores that have it."""

    instructions: str  # a regular expression; of two that do it together, either
    multiply_adds: float  # of one such instruction
    triple: str
    cores: tuple[str, ...]


TIERS = {
    "baseline": Tier(r"(mul|add)ps", 2, "x86_64", ("znver3", "skylake-avx512", "icelake-server")),
    "avx2": Tier(r"vfmadd\d+ps.*ymm", 8, "x86_64", ("znver3", "skylake-avx512", "icelake-server")),
    "avx512": Tier(r"vfmadd\d+ps.*zmm", 16, "x86_64", ("skylake-avx512", "icelake-server")),
    "avx512_bf16": Tier(r"vdpbf16ps.*zmm", 32, "x86_64", ("sapphirerapids",)),
    "neon": Tier(r"fmla\s+v\d+\.4s", 4, "aarch64", ("neoverse-n1", "neoverse-v1", "apple-m1")),
    "neon_bf16": Tier(r"bfdot\s+v\d+\.4s", 8, "aarch64", ("neoverse-v1", "apple-m2")),
}


def assembly() -> dict[str, str]:
    """Of `pair_norms`, for each tier of the builds that are there."""
    found = {}
    for build in BUILDS:
        commands = ROOT / build / "compile_commands.json"
        for entry in json.loads(commands.read_text()) if commands.exists() else []:
            tier = re.search(r"-DFC_TIER=(\w+)", entry["command"])
            if tier and entry["file"].endswith("/cpu/pair_norms.cpp"):
                command = shlex.split(entry["command"])
                command[command.index("-o") :] = ["-S", "-o", "-", entry["file"]]
                found[tier[1]] = subprocess.check_output(command, cwd=entry["directory"], text=True)
    return found


def loops(text: str) -> list[list[str]]:
    """The instructions of each loop that has no other jump, the last one being its own."""
    found: list[list[str]] = []
    label, body = "", list[str]()
    for line in text.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            label, body = match[1], []
        elif re.match(r"\t[a-z]", line):
            body.append(line)
            if label and line.endswith(label):
                found.append(body)
                label, body = "", []
    return found


def cycles(lines: list[str], tier: Tier, core: str) -> tuple[float, float]:
    """Of one round of a loop: as it would run, and as its instructions would if none waited for another."""
    report = subprocess.check_output(
        [MCA, f"-mtriple={tier.triple}", f"-mcpu={core}", f"-iterations={ROUNDS}"], input="\n".join(lines), text=True
    )
    total, free = (re.search(rf"{name}: +([\d.]+)", report) for name in ("Total Cycles", "Block RThroughput"))
    assert total is not None
    assert free is not None
    return float(total[1]) / ROUNDS, float(free[1])


def table() -> str:
    """Each tier that is built, on each of its cores."""
    lines = ["| tier | core | multiply-adds a cycle | peak | share of the peak |", "| --- | --- | --- | --- | --- |"]
    for name, text in assembly().items():
        tier = TIERS[name]

        def multiplying(loop: list[str], tier: Tier = tier) -> list[str]:
            return [line for line in loop if re.search(rf"\t{tier.instructions}", line)]

        loop = max(loops(text), key=lambda loop: len(multiplying(loop)))
        work = len(multiplying(loop)) * tier.multiply_adds
        for core in tier.cores:
            rate, peak = work / cycles(loop, tier, core)[0], work / cycles(multiplying(loop), tier, core)[1]
            lines.append(f"| {name} | {core} | {rate:.1f} | {peak:.1f} | {rate / peak:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if shutil.which(MCA) is None:
        sys.exit(f"{MCA} is missing: apt-get install llvm-19")
    text = table()
    print(text, end="")
    folder: Path = ROOT / REPORTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(text)


if __name__ == "__main__":
    main()
