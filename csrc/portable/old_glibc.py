"""Makes libraries to link against, in which functions have the versions that glibc 2.28 has.

    python old_glibc.py FOLDER COMPILER

Modules that are linked on a newer Linux ask for the newest version of each function, which an older one does not have,
though nearly all functions have an older version too. The libraries made here hold nothing but the names of those
functions in their older versions; a module that is linked with them, before glibc's own, runs on both. Functions stand
in the library that held them then.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

OLDEST = (2, 28)
LIBRARIES = {"libpthread.so.0": r"pthread_|sem_", "libdl.so.2": r"dl", "librt.so.1": r"shm_|aio_|mq_|timer_|lio_"}
SYMBOL = re.compile(r"^\S+ [TWi] (\w+)(@@?)GLIBC_([\d.]+)$", re.MULTILINE)


def versions(library: Path) -> dict[str, str]:
    """The newest version up to OLDEST of every function whose default is newer."""
    found: defaultdict[str, list[tuple[tuple[int, ...], str]]] = defaultdict(list)
    default = {}
    for name, at, version in SYMBOL.findall(
        subprocess.check_output(["nm", "-D", "--with-symbol-versions", library], text=True)
    ):
        number = tuple(map(int, version.split(".")))
        found[name].append((number, version))
        if at == "@@":
            default[name] = number
    older = {name: [x for x in found[name] if x[0] <= OLDEST] for name, newest in default.items() if newest > OLDEST}
    return {name: max(known)[1] for name, known in older.items() if known}


def make(folder: Path, name: str, functions: dict[str, str], compiler: str) -> None:
    """A library of this name with the functions in their versions."""
    code, script = folder / f"{name}.s", folder / f"{name}.map"
    code.write_text("".join(f".globl {f}\n.type {f}, @function\n{f}:\n" for f in functions))
    nodes = "".join(
        f"GLIBC_{v} {{ {' '.join(f'{f};' for f in functions if functions[f] == v)} }};\n" for v in {*functions.values()}
    )
    script.write_text(nodes)
    linked = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
    subprocess.run([compiler, *linked, "-o", folder / name, code], check=True)


def main(folder: Path, compiler: str) -> None:
    """See above."""
    folder.mkdir(parents=True, exist_ok=True)

    def of_this_machine(name: str) -> Path:
        return Path(subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip())

    of_libc = versions(of_this_machine("libc.so.6"))
    for name, pattern in LIBRARIES.items():
        make(folder, name, {f: v for f, v in of_libc.items() if re.match(pattern, f)}, compiler)
    make(folder, "libm.so.6", versions(of_this_machine("libm.so.6")), compiler)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
