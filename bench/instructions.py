"""Do the CPU ops need more instructions than they did? A gate that does not depend on how busy a machine is.

    python -m bench.instructions --check        or        make instructions
    python -m bench.instructions --write        accepts what the ops need now

Callgrind counts the instructions of the compiled ops alone, on one thread of the AVX2 tier, and bench/instructions.json
keeps how many a logit, entry, score, pair or factor takes. The check fails where that changes by more than 2%. It cannot
judge a build by another compiler than the table's, nor run on a CPU without AVX2: then it says so, and passes.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pyfastcircuits as fc
from bench.op_calls import TIER, calls, instructions

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "instructions.json"
MOST_CHANGE = 0.02
ACCEPT = "If this is as it should be, accept it by `python -m bench.instructions --write`, and commit the table."


def found() -> dict[str, float]:
    """Instructions that each op takes, by its name and what it works out."""
    if shutil.which("valgrind") is None:
        sys.exit("valgrind, which counts instructions, is missing: apt-get install valgrind")
    counts = instructions(ROOT)
    return {f"{name}, per {call.unit}": float(f"{counts[name] / call.units:.5g}") for name, call in calls().items()}


def why_not(compiler: str) -> str:
    """Why this build or machine cannot be judged by a table of a compiler; empty if it can."""
    os.environ["PYFASTCIRCUITS_CPU_TIER"] = TIER
    try:
        built_by = fc.build_info()["compiler"]
    except RuntimeError as error:  # the library says which tiers this CPU has
        return str(error)
    return "" if built_by == compiler else f"the table is of {compiler}, and this library was built by {built_by}"


def changes(table: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """What has changed by more than MOST_CHANGE, in words."""
    words = [f"{what}: in the table, but not counted" for what in table if what not in now]
    for what, count in now.items():
        if what not in table:
            words.append(f"{what}: {count:g}, and not in the table")
        elif abs(count / table[what] - 1) > MOST_CHANGE:
            words.append(
                f"{what}: {count:g} instructions, {count / table[what] - 1:+.1%} from the table's {table[what]:g}"
            )
    return words


def check() -> int:
    """Print what the ops need, or why that cannot be judged; the exit status is 1 if the table is not true."""
    table = json.loads(TABLE.read_text())
    if reason := why_not(table["compiler"]):
        print(f"instructions: CANNOT JUDGE, so nothing was checked: {reason}")
        return 0
    now = found()
    for what, count in now.items():
        print(f"{what}: {count:g} instructions")
    if wrong := changes(table["instructions"], now):
        print("", *wrong, ACCEPT, sep="\n")
        return 1
    print(f"instructions: every op is within {MOST_CHANGE:.0%} of the table")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the table")
    what.add_argument("--write", action="store_true", help="make the table anew")
    asked = parser.parse_args()
    if asked.check:
        return check()
    table = {"compiler": fc.build_info()["compiler"], "instructions": found()}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
