"""What `make wheels` has made, used in an environment that has torch and nothing else, from another folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WHEELS, SDISTS = sorted(ROOT.glob("dist/*.whl")), sorted(ROOT.glob("dist/*.tar.gz"))
OWN = f"cp{sys.version_info.major}{sys.version_info.minor}"
LARGEST = 15e6
USED = """
import torch
import pyfastcircuits as fc

assert "site-packages" in fc.__file__, fc.__file__
weights = fc.load_weights("induction-2l")
tokens = torch.arange(1, 65).view(2, 32)
found = fc.pair_ablation(fc.trace(weights, tokens))
assert found.values.shape == (64,) and found.values.isfinite().all()
values, rows, columns = fc.ops.factored_topk(torch.eye(3), torch.eye(3), 1)
assert float(values[0]) == 1
print(fc.build_info())
"""
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not WHEELS or not SDISTS, reason="`make wheels` has made nothing"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with torch, and safetensors to read the bundled models: links to what is installed here."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    here = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    for name in required("torch") | required("safetensors"):
        parts = {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__", *os.listdir(here)}
        for part in parts:
            Path(here, part).symlink_to(str(distribution(name).locate_file(part)))
    return folder


def required(name: str) -> set[str]:
    """A package and all that it needs without extras."""
    words = map(Requirement, distribution(name).requires or ())
    return {name}.union(*(required(x.name) for x in words if x.marker is None or x.marker.evaluate({"extra": ""})))


def run(environment: Path, *arguments: str) -> str:
    kept = "PYFASTCIRCUITS_CUDA_ARCHITECTURES"  # so that what the sdist compiles is in the compiler's cache
    clean = {
        name: value
        for name, value in os.environ.items()
        if name == kept or not name.startswith(("PYFASTCIRCUITS", "PYTHON"))
    }
    done = subprocess.run(
        [environment / "bin/python", *arguments], cwd=environment, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda file: file.name)
def test_a_wheel_is_small_and_portable(wheel: Path) -> None:
    assert "manylinux_2_28_" in wheel.name
    assert wheel.stat().st_size < LARGEST
    names = zipfile.ZipFile(wheel).namelist()
    assert {"_ops.so", "py.typed"} <= {Path(name).name for name in names}
    assert not [name for name in names if "libtorch" in name or "libc10" in name]
    assert any(name.endswith("models/induction-2l/model.safetensors") for name in names)
    assert any(name.startswith("pyfastcircuits/kernels/") for name in names)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_is_installed_by_one_command_and_works(environment: Path, kind: str) -> None:
    [file] = [wheel for wheel in WHEELS if OWN in wheel.name] if kind == "wheel" else SDISTS
    run(environment, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(file))
    assert "'version'" in run(environment, "-c", USED)
    run(environment, "-m", "pip", "install", "-q", "pyfastcircuits[cli]")
    assert "cpu_tier" in run(environment, "-m", "pyfastcircuits", "info")
    assert "bigram" in run(environment, "-m", "pyfastcircuits", "tables", "bigram-0l", "--k", "2").lower()
