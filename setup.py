"""Drives CMake and Ninja; everything else is in pyproject.toml."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
HOW = "pip install torch==2.13.0, then pip install . again"
COMPILER = """pyfastcircuits is compiled with a C++20 compiler, and there is none here (CXX is {}). Install one:
  Debian, Ubuntu: apt-get install g++        Fedora: dnf install gcc-c++        conda: conda install cxx-compiler
  macOS: xcode-select --install              Windows: the C++ clang tools of Visual Studio's Build Tools"""
HEADERS = """pyfastcircuits is compiled with Python's headers, and {} has no Python.h. Install them:
  Debian, Ubuntu: apt-get install python3-dev        Fedora: dnf install python3-devel"""


def torch_folder() -> Path:
    """The folder of the torch to compile against: of this environment even where pip hides it from builds."""
    if "PYFASTCIRCUITS_TORCH" in os.environ:
        return Path(os.environ["PYFASTCIRCUITS_TORCH"])
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None:
        return Path(found.origin).resolve().parent
    outside = Path(sysconfig.get_path("purelib")) / "torch"
    if not (outside / "include").is_dir():
        sys.exit(f"pyfastcircuits is compiled against an installed torch, and there is none here. Run: {HOW}")
    return outside.resolve()


def check_compiler() -> None:
    """Say what to install where CMake would fail."""
    named = os.environ.get("CXX", "")
    compilers = [named.split()[0]] if named else ["c++", "g++", "clang++", "cl", "clang-cl"]
    if not any(map(shutil.which, compilers)):
        sys.exit(COMPILER.format(repr(named) if named else "not set"))
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        sys.exit(HEADERS.format(sysconfig.get_path("include")))


class CMakeBuild(build_ext):
    """One CMake build for all extensions, kept between runs so that a changed file is all that is rebuilt."""

    def run(self) -> None:
        torch = torch_folder()
        check_compiler()
        import pybind11

        output = Path(self.get_ext_fullpath("pyfastcircuits._host")).parent.resolve()
        sanitize = os.environ.get("PYFASTCIRCUITS_SANITIZE", "")
        version = re.search(r'__version__ = "(.+)"', (ROOT / "pyfastcircuits/__init__.py").read_text())
        settings = {
            "PyFC_OUTPUT": output,
            "PyFC_VERSION": version[1] if version else "",
            "PyFC_TORCH": torch,
            "PyFC_SANITIZE": sanitize,
            "PyFC_CUDA_ARCHITECTURES": os.environ.get("PYFASTCIRCUITS_CUDA_ARCHITECTURES", ""),
            "PyFC_PORTABLE": os.environ.get("PYFASTCIRCUITS_PORTABLE", ""),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        folder = ROOT / "build" / f"cmake{'-sanitize' if sanitize else ''}"
        made_for = folder / sys.implementation.cache_tag
        if not made_for.exists():  # another Python was here: CMake must look for this one, and all but _host stays
            for file in (*folder.glob("cpython-*"), folder / "CMakeCache.txt"):
                file.unlink(missing_ok=True)
        definitions = [f"-D{key}={value}" for key, value in settings.items()]
        # Those of this environment, active or not: another version of CMake would compile everything again.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake, environment = shutil.which("cmake", path=path) or "cmake", os.environ | {"PATH": path}
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-GNinja", *definitions]
        subprocess.run(configure, check=True, env=environment)
        made_for.touch()
        subprocess.run([cmake, "--build", str(folder)], check=True, env=environment)


setup(
    ext_modules=[Extension("pyfastcircuits._host", [])],
    cmdclass={"build_ext": CMakeBuild},
)
