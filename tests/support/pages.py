"""Runs the Python blocks of a page; `PYTHONPATH=tests python -m support.pages docs/tutorial.md` writes into it what they
print, and into docs/pictures what they save.

A block that is followed by a `text` block prints what that holds. A mark in front of a block, such as
`<!-- needs transformer-lens -->`, names a library that it needs.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = re.compile(
    r"(?:<!-- needs ([\w-]+) -->\s*)?^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A Python block: its code, what it needs, what the page says that it prints, and where that stands."""

    code: str
    needs: str | None
    printed: str | None
    place: tuple[int, int]


def blocks(page: Path) -> list[Block]:
    """Every Python block of a page."""
    return [Block(m[2], m[1], m[3], m.span(3)) for m in BLOCK.finditer(page.read_text())]


def executed(page: Path, names: dict[str, Any]) -> Iterator[tuple[Block, str]]:
    """Run the blocks that need no library beside ours, one after another, and what each prints."""
    for i, block in enumerate(blocks(page)):
        if block.needs is None:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.code, f"{page.name}, block {i}", "exec"), names)
            yield block, out.getvalue()


def write(page: Path) -> None:
    """Write into a page what its blocks print."""
    page, text = page.resolve(), page.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for block, printed in reversed(list(executed(page, {}))):
            if block.printed is not None:
                start, end = block.place
                text = text[:start] + printed + text[end:]
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, page.parent / "pictures")
        os.chdir(page.parent)
    page.write_text(text)


if __name__ == "__main__":
    for name in [Path(name).resolve() for name in sys.argv[1:]]:
        write(name)
