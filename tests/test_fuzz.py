"""Random calls of everything public end in values, or in errors that name an argument; `make fuzz` runs more of them."""

import fuzz
import pytest


@pytest.mark.processes
def test_calls_of_everything_public():
    """A child process makes them, so that a crash or a hang is seen."""
    findings = fuzz.fuzz(500, seed_=14, seconds=40)
    assert findings.calls > 300
    assert findings.good, findings.table()


@pytest.mark.sanitize
def test_calls_of_the_raw_ops():
    """In this process, for the sanitizers to watch."""
    findings, begun = fuzz.Findings(), []

    def write(line):
        if "outcome" in line:
            findings.add(begun.pop(), line["outcome"], line["said"])
        else:
            begun.append(line)

    fuzz.conduct(14, 300, fuzz.RAW, write)
    assert findings.calls == 300
    assert findings.good, findings.table()
