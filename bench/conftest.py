"""Collects what the benchmarks found and prints it as one table."""

import pytest

LINES: list[tuple[str, str, str]] = []


@pytest.fixture
def found():
    """found(what, measured, wanted): one line of the closing table."""
    return lambda what, measured, wanted="": LINES.append((what, measured, wanted))


def pytest_terminal_summary(terminalreporter):
    if LINES:
        terminalreporter.section("measured in this run")
        widths = [max(len(line[i]) for line in LINES) for i in range(3)]
        for line in LINES:
            terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
