"""Runs a notebook in a kernel of its own. `python tests/support/run_notebook.py FILE` writes what its cells print into it."""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def executed(file: Path) -> NotebookNode:
    """The notebook with all its outputs made again; nbclient.exceptions.CellExecutionError where a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(file.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what libraries have to say of this machine is on stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def words_and_numbers(text: str) -> tuple[str, list[float]]:
    """What a text says, and the numbers in it, which differ a little from machine to machine."""
    pieces = re.split(r"([+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?)", text)
    return " ".join(" ".join(pieces[::2]).split()), [float(number) for number in pieces[1::2]]


if __name__ == "__main__":
    nbformat.write(executed(Path(sys.argv[1])), sys.argv[1])
