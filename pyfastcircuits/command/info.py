"""The command `info`."""

import pyfastcircuits as fc
from pyfastcircuits.command.app import MACHINE, command
from pyfastcircuits.command.report import Report


@command(task=MACHINE, example="pyfastcircuits info")
def info(report: Report) -> None:
    """Show what this build and machine can do: CPU instructions, GPU, versions."""
    report.found(fc.build_info())
    for key, value in fc.build_info().items():
        report.line(f"{key}: {value}")
