"""The command, run in this process."""

from typer.testing import CliRunner

from pyfastcircuits.command.cli import app


def run(*arguments: object, columns: int = 160):
    """What a command prints, and its exit code."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


COMMANDS = {
    "sweep": ["--top", 2],
    "heads": ["--copy-length", 4, "--copies", 2],
    "composition": [],
    "tables": [],
    "tables --all-heads": [],
    "tables --head 0.1": [],
    "tables --source 3": [],
}


def command(name, model, tokens, tmp_path, *more):
    """The arguments of one of COMMANDS."""
    first, *rest = name.split()
    given = ["--tokens", tokens] if first == "sweep" else []
    return [first, model, *rest, *COMMANDS[name], *given, "--out", tmp_path / "out", *more]


def refused(*arguments):
    """The one line of an error in the input."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output
