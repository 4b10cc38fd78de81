"""The text everyone already has: the running interpreter's own standard library.

The bundled models are trained on it and the default sweep reads it. Files are held out of training by a hash of
their path, so every Python version splits the same names the same way.
"""

import hashlib
import sysconfig
from pathlib import Path

__all__ = ["stdlib_files"]

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_files(held_out: bool) -> list[Path]:
    """Source files of the standard library, sorted by path: the held-out twentieth, or the training rest.

    Raises:
        FileNotFoundError: the interpreter ships no standard-library source (a zipped or stripped install).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            if (digest[0] < 13) == held_out:
                files.append(path)
    if not files:
        raise FileNotFoundError(f"no standard-library source under {root}; pass a text of your own")
    return files
