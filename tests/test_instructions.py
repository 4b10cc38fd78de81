"""The gate on instructions: what it notices, where it cannot judge, what it counts."""

import json
import re
import sys
from pathlib import Path

import pytest

import pyfastcircuits as fc

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is no installed package

from bench import instructions, op_calls  # noqa: E402

TABLE = {"an_op, per logit": 20.0, "another, per pair": 1e5}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """The check of counts against TABLE, made by a compiler."""

    def check(counts: dict[str, float], compiler: str = fc.build_info()["compiler"]) -> int:
        (tmp_path / "table.json").write_text(json.dumps({"compiler": compiler, "instructions": TABLE}))
        monkeypatch.setattr(instructions, "TABLE", tmp_path / "table.json")
        monkeypatch.setattr(instructions, "found", lambda: counts)
        return instructions.check()

    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", "")  # so that what the check sets is undone
    return check


needs_avx2 = pytest.mark.skipif(fc.build_info()["best_cpu_tier"] in ("baseline", "neon", "neon_bf16"), reason="no AVX2")


@needs_avx2
@pytest.mark.parametrize(("factor", "said"), [(1.03, "+3.0%"), (0.97, "-3.0%")])
def test_three_percent_are_noticed(judge, capsys, factor, said):
    assert judge(TABLE | {"an_op, per logit": 20 * factor}) == 1
    out = capsys.readouterr().out
    assert f"an_op, per logit: {20 * factor:g} instructions, {said} from the table's 20" in out
    assert "`python -m bench.instructions --write`" in out
    assert "from the table's 100000" not in out


@needs_avx2
def test_one_percent_is_not(judge, capsys):
    assert judge(TABLE | {"an_op, per logit": 20.2}) == 0
    assert "every op is within 2%" in capsys.readouterr().out


def test_ops_that_come_and_go_are_noticed():
    assert instructions.changes({"old": 1.0}, {"new": 2.0}) == [
        "old: in the table, but not counted",
        "new: 2, and not in the table",
    ]


def test_another_compiler_is_not_judged_and_says_so(judge, capsys):
    assert judge({"an_op, per logit": 99.0}, "GNU 1.0") == 0
    assert "CANNOT JUDGE" in capsys.readouterr().out


def test_a_cpu_without_the_tier_is_not_judged_and_says_so(judge, capsys, monkeypatch):
    monkeypatch.setattr(instructions, "TIER", "a tier of no CPU")
    assert judge({"an_op, per logit": 99.0}) == 0
    assert "CANNOT JUDGE, so nothing was checked: PYFASTCIRCUITS_CPU_TIER" in capsys.readouterr().out


def test_every_op_is_counted():
    declared = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    table = json.loads(instructions.TABLE.read_text())["instructions"]
    assert set(table) == {f"{name}, per {call.unit}" for name, call in op_calls.calls().items()}
    assert {what.partition(",")[0] for what in table} >= set(declared) - {"cpu_rate"}


DUMP = """\
summary: 5000
ob=(1) /lib/libtorch_cpu.so
fn=(1) outer
0 100
cob=(2) /some/where/_ops.so
cfn=(2) kernel
calls=1 0
0 700
ob=(2)
fn=(2) kernel
0x10 30
+4 7
* 5
cob=(1)
cfn=(3) allocate
calls=1 0
0 900
-4 1
ob=(1)
fn=(3) allocate
0 900
"""


def test_only_what_the_library_does_itself_is_counted():
    assert op_calls.in_library(DUMP.splitlines()) == 30 + 7 + 5 + 1
