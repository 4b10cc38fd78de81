"""The estimate of the multiply loop: which loop it reads, and that it knows every tier."""

import re
import sys
from pathlib import Path

import pyfastcircuits as fc

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is no installed package

from bench import mca, write  # noqa: E402

ASSEMBLY = """\
kernel:
\tmovq\t%rdi, %rax
.L2:
\tvmovaps\t(%rdx), %ymm2
.L3:
\tvfmadd231ps\t%ymm2, %ymm3, %ymm15
\tvfmadd132ps\t%ymm1, %ymm3, %ymm14
\tcmpq\t%rdi, %rax
\tjne\t.L3
\tvmovaps\t%ymm15, (%rsi)
\tjg\t.L2
.L33:
\tfmla\tv31.4s, v7.4s, v2.4s
\tb.ne\t.L3
"""


def test_a_loop_ends_with_its_jump_and_has_no_other():
    assert mca.loops(ASSEMBLY) == [ASSEMBLY.splitlines()[5:9]]


def test_every_tier_is_known():
    tiers = set(re.findall(r"FC_OF_TIER\(X, (\w+), __VA_ARGS__\)", (ROOT / "csrc" / "cpu" / "isa.h").read_text()))
    assert fc.build_info()["cpu_tier"] in tiers <= set(mca.TIERS)


def test_the_page_has_the_estimate_or_says_how_to_make_it():
    assert "It is an estimate, not a measurement" in write.page([])
    assert "Not estimated: run `make mca`." in write.page([])
    assert "| a tier | a core |" in write.page([], "| a tier | a core |\n")
