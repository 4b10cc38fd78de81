"""Drives CMake and Ninja; everything else is in pyproject.toml."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
HOW = "pip install torch==2.13.0 pybind11 ninja cmake setuptools && pip install --no-build-isolation -e ."


class CMakeBuild(build_ext):
    """One CMake build for all extensions, kept between runs so that a changed file is all that is rebuilt."""

    def run(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            sys.exit(f"pyfastcircuits is compiled against an installed torch, and there is none here. Run: {HOW}")
        import pybind11

        output = Path(self.get_ext_fullpath("pyfastcircuits._host")).parent.resolve()
        sanitize = os.environ.get("PYFASTCIRCUITS_SANITIZE", "")
        tag = f"cmake-{sys.implementation.cache_tag}{'-sanitize' if sanitize else ''}"
        version = re.search(r'__version__ = "(.+)"', (ROOT / "pyfastcircuits/__init__.py").read_text())
        settings = {
            "PyFC_OUTPUT": output,
            "PyFC_VERSION": version[1] if version else "",
            "PyFC_TORCH": Path(torch.origin).parent,
            "PyFC_SANITIZE": sanitize,
            "PyFC_CUDA_ARCHITECTURES": os.environ.get("PYFASTCIRCUITS_CUDA_ARCHITECTURES", ""),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        folder = ROOT / "build" / tag
        definitions = [f"-D{key}={value}" for key, value in settings.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-GNinja", *definitions], check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)


setup(
    ext_modules=[Extension("pyfastcircuits._host", [])],
    cmdclass={"build_ext": CMakeBuild},
)
