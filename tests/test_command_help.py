"""The help of the command: commands by task, each with an example that works; the same options under the same names."""

import os
import shlex
import subprocess
import sys
from collections import defaultdict

import pytest
import typer
from support.command import run

from pyfastcircuits.command.app import TASKS, app

COMMANDS = typer.main.get_command(app).commands


def test_the_command_alone_shows_every_command_by_its_task():
    shown = run(columns=100).output
    tasks = [task for task in TASKS if any(x.rich_help_panel == task for x in COMMANDS.values())]
    assert len(tasks) > 1
    assert [shown.index(f"─ {task} ─") for task in tasks] == sorted(shown.index(f"─ {task} ─") for task in tasks)
    lines = [line.strip("│ ") for line in shown.splitlines()]
    for name, one in COMMANDS.items():
        assert one.rich_help_panel in TASKS, f"{name}: give its task to @command"
        example = one.epilog.partition("\n")[0].removeprefix("Example: ")
        assert example.startswith(f"pyfastcircuits {name}"), f"{name}: give an example to @command"
        assert example in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_of_options_that_there_are(name):
    """tests/test_docs.py runs them."""
    words = shlex.split(COMMANDS[name].epilog.partition("\n")[0].removeprefix("Example: "))[2:]
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_same_options_have_the_same_names_types_and_help():
    found = defaultdict(dict)
    for name, one in COMMANDS.items():
        for parameter in one.params:
            descriptor = getattr(parameter, "type_descriptor", None)  # of newer versions of typer
            kind = parameter.type.to_info_dict() if descriptor is None else descriptor.annotation
            help_ = getattr(parameter, "help", None)
            panel = getattr(parameter, "rich_help_panel", None)
            for option in parameter.opts:
                found[option][name] = (kind, help_, parameter.default, tuple(parameter.opts), panel)
    shared = {option: of for option, of in found.items() if len(of) > 1}
    assert len(shared) >= 8
    for option, of in shared.items():
        assert len({repr(x) for x in of.values()}) == 1, (option, of)


def test_every_option_has_a_help():
    for name, one in COMMANDS.items():
        assert one.help.endswith("."), name
        for parameter in one.params:
            assert getattr(parameter, "help", None), (name, parameter.name)


@pytest.mark.processes
def test_completion():
    asked = {"_PYFASTCIRCUITS_COMPLETE": "complete_bash", "COMP_WORDS": "pyfastcircuits heads ind", "COMP_CWORD": "2"}
    code = "from pyfastcircuits.command.cli import app; app(prog_name='pyfastcircuits')"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout.split() == ["induction-2l"], found
