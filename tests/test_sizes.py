"""Sizes of tiles and blocks follow from the tier and the machine: a constant that does not fit stops the compiler."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyfastcircuits as fc
from pyfastcircuits.ops import library
from pyfastcircuits.ops.backend import room
from pyfastcircuits.run.nodes import span

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
WRONG = {  # file, text, what stands in its place, an op that relies on it, the tier
    "a wider panel": ("cpu/simd.h", r"kVectors = 3;", "kVectors = 4;", "factored_topk", "avx512"),
    "a wider vector": ("cpu/simd.h", r"kVectorBytes = 32;", "kVectorBytes = 128;", "factored_topk", "avx2"),
    "half a panel a pack": ("cpu/product.h", r"kColumnsAPack = [^;]*;", "kColumnsAPack = 100;", "diagonal_ranks", "avx2"),
    "a chunk beyond L1": ("cpu/frozen_attention_kernels.h", r"kChunk = [^;]*;", "kChunk = 1200;", "frozen_attention", "avx2"),
    "a pass beyond L1": ("cpu/sweep.h", r"kStepsAPass = [^;]*;", "kStepsAPass = 4096;", "sweep_nll", "avx2"),
}  # fmt: skip


def checked(folder: Path, op: str, tier: str) -> subprocess.CompletedProcess:
    command = ["g++", "-std=gnu++20", "-fsyntax-only", "-w", *FLAGS[tier], f"-DFC_TIER={tier}", f"cpu/{op}.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86")
@pytest.mark.parametrize("what", WRONG)
def test_a_size_that_does_not_fit_is_not_compiled(what, tmp_path):
    file, text, wrong, op, tier = WRONG[what]
    shutil.copytree(CSRC, tmp_path / "csrc")
    changed = tmp_path / "csrc" / file
    code, count = re.subn(text, wrong, changed.read_text())
    assert count == 1
    changed.write_text(code)
    result = checked(tmp_path / "csrc", op, tier)
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr


def test_caches_are_read_from_the_machine():
    facts = fc.build_info()
    for name, least, most in (("LEVEL1_DCACHE_SIZE", 32 << 10, 1 << 20), ("LEVEL2_CACHE_SIZE", 256 << 10, 4 << 20)):
        told = os.sysconf(f"SC_{name}") if f"SC_{name}" in os.sysconf_names else 0
        if told > 0:
            key = "l1_bytes" if "1" in name else "l2_bytes"
            assert facts[key] == min(max(told, least), most)


def test_a_task_fits_half_the_cache_it_is_cut_for():
    facts = fc.build_info()
    for depth in (64, 256, 1024, 4096):
        pair_block, position_block, _ = library.host.plan_tiles(10_000, 4096, depth, 2)
        kept = pair_block * position_block * (depth + 160)  # with the state of each row
        assert facts["l2_bytes"] / 8 < kept <= max(facts["l2_bytes"] / 2, 64 * (depth + 160))


def test_a_stripe_is_whole_panels_of_the_tier(tier):
    panel = 3 * {"avx2": 32, "avx512": 64, "avx512_bf16": 64}.get(tier, 16) // 4
    assert fc.build_info()["stripe_columns"] == 4 * panel == library.stripe_columns()


@pytest.mark.parametrize("memory", [1 << 30, 80 << 30])
def test_a_gpu_has_more_scratch_than_a_cpu(memory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert room(torch.device("cpu"), 100 << 20) == 100 << 20
    assert room(torch.device("cuda"), 100 << 20) == max(100 << 20, memory // 64)


def test_places_that_follow_one_another_are_a_slice():
    assert [span(x) for x in ([3], [2, 3, 4], [2, 4], [3, 2])] == [slice(3, 4), slice(2, 5), [2, 4], [3, 2]]
