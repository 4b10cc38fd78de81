"""The command, run in this process."""

from typer.testing import CliRunner

from pyfastcircuits.command.cli import app


def run(*arguments: object, columns: int = 160):
    """What a command prints, and its exit code."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})
