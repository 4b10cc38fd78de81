"""The command `info`."""

import pyfastcircuits as fc
from pyfastcircuits.command.app import command
from pyfastcircuits.command.report import Report


@command
def info(report: Report) -> None:
    """Facts of this build and machine."""
    report.found(fc.build_info())
    for key, value in fc.build_info().items():
        report.line(f"{key}: {value}")
