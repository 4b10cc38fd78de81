"""Collects what the benches find: one table at the end of the run, and files from which `bench.write` makes its page."""

from functools import partial

import pytest

from bench.record import REPORTS, Recorder


def pytest_addoption(parser):
    parser.addoption("--reports", default=None, help=f"folder of the JSON lines that benches leave ({REPORTS})")


def pytest_configure(config):
    folder = config.getoption("--reports")
    recorder = Recorder(config.invocation_params.dir / folder if folder else config.rootpath / REPORTS)
    config.pluginmanager.register(recorder, "bench recorder")


@pytest.fixture
def found(request):
    """found(what, measured, goal=""): one figure; a goal that differs by CPU tier is a mapping from tiers to goals."""
    recorder = request.config.pluginmanager.get_plugin("bench recorder")
    return partial(recorder.found, request.node.nodeid)


def pytest_terminal_summary(terminalreporter, config):
    lines = config.pluginmanager.get_plugin("bench recorder").lines
    if lines:
        terminalreporter.section("measured in this run")
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        for line in lines:
            terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
