"""The house: what is built, what importing costs, what a build without torch says."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyfastcircuits as fc
from pyfastcircuits.ops import library

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_build_facts():
    facts = fc.build_info()
    assert facts["version"] == fc.__version__
    tiers = {"baseline": ["baseline", "avx2", "avx512", "avx512_bf16"], "neon": ["neon", "neon_bf16"]}
    assert facts["cpu_tiers"] == tiers[facts["cpu_tiers"][0]][: len(facts["cpu_tiers"])]
    assert facts["best_cpu_tier"] == facts["cpu_tiers"][-1]
    assert facts["cpu_tier"] in facts["cpu_tiers"]
    if shutil.which("nvcc"):
        assert facts["cuda_architectures"].split()[0] == "sm_80"
        assert library._CUDA_LIBRARY.exists()


def test_ci_builds_for_every_architecture():
    if os.environ.get("CI") == "true":
        assert shutil.which("nvcc"), "CI must compile and link every .cu: nvcc is missing"
        assert fc.build_info()["cuda_architectures"] == "sm_80 sm_90a sm_100"


def test_import_is_light():
    heavy = (
        "transformer_lens",
        "transformers",
        "pyarrow",
        "plotly",
        "matplotlib",
        "numpy.testing",
        "triton",
        "rich",
        "typer",
    )
    loaded = python(f"import pyfastcircuits, sys; print([m for m in {heavy} if m in sys.modules])")
    before = python(f"import torch, sys; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == before


@pytest.mark.alone
def test_import_takes_a_fifth_of_a_second_over_torch(tmp_path, monkeypatch):
    """As installed: with bytecode, which the first of them writes."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = (
        "import gc, torch, time; gc.freeze()  # a collection that comes in between is to scan what is new, not torch\n"
        "t = time.perf_counter(); import pyfastcircuits; print(time.perf_counter() - t)"
    )
    assert min(float(python(code)) for _ in range(6)) < 0.2


@pytest.mark.alone
def test_a_build_without_torch_says_what_to_run(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = tmp_path / "bare" / "bin" / "python"
    setuptools = Path(__import__("setuptools").__file__).parents[1]
    for package in ("setuptools", "_distutils_hack"):
        (tmp_path / package).symlink_to(setuptools / package)
    start = time.perf_counter()
    result = subprocess.run(
        [bare, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "pip install torch==2.13.0" in result.stderr
    assert time.perf_counter() - start < 10


def test_a_build_without_a_compiler_says_what_to_install(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CXX": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "apt-get install g++" in result.stderr


@pytest.mark.parametrize(("pairs", "positions", "depth", "threads"), [(0, 9, 4, 2), (1, 1, 0, 64), (144, 511, 256, 2)])
def test_plans_cover_the_work(pairs, positions, depth, threads):
    pair_block, position_block, tasks = library.host.plan_tiles(pairs, positions, depth, threads)
    assert pair_block >= 1
    assert position_block >= 1
    assert tasks == (-(-pairs // pair_block) * -(-positions // position_block) if pairs and positions else 0)


def test_kernels_are_a_subpackage():
    import pyfastcircuits.kernels

    assert Path(pyfastcircuits.kernels.__file__).name == "__init__.py"
