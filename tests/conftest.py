"""What suites share: tiers of the CPU, threads, and how much of a matrix of cases is run where.

`tier` runs a test on every tier that this CPU has. `@pytest.mark.matrix(dtype=[...], rank=[...])` runs it for every
combination of the values on the best tier; on smaller ones, under the sanitizers, in emulators and in Triton's
interpreter, for so few that any two values of different axes still meet: a fault of two things at once is found.
"""

import gc
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.random_models import random_tokens, random_weights

import pyfastcircuits

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in a shell's background; tests send it to processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("COLUMNS", None)  # xdist hands its workers the terminal's width, which tables would keep to

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
TIERS = pyfastcircuits.build_info()["cpu_tiers"]
if "avx512_bf16" in TIERS:
    TIERS.remove("avx512")  # whose code runs as that of avx512_bf16 too
if SANITIZED:
    TIERS = TIERS[-2:]  # as in CMakeLists.txt
BEST = TIERS[-1]
EMULATED = "QEMU_CPU" in os.environ
FEW = SANITIZED or EMULATED or os.environ.get("TRITON_INTERPRET") == "1"
SKIPPED = {
    "bf16_dots": (not BEST.endswith("_bf16"), "this CPU has no bfloat16 dot products"),
    "processes": (SANITIZED or EMULATED, "compiles or starts a process, which sanitizers and emulators are not for"),
}


@pytest.fixture
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every tier this CPU has, in force."""
    monkeypatch.setenv("PYFASTCIRCUITS_CPU_TIER", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _threads_are_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pairwise(axes: Sequence[Sequence[object]]) -> list[tuple[object, ...]]:
    """Some of the product's rows: few, always the same, and any two values of different axes meet in one of them."""
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    together = {row: set(itertools.combinations(enumerate(row), min(2, len(axes)))) for row in rows}
    missing, chosen = set().union(*together.values()), []
    while missing:
        best = max(rows, key=lambda row: len(missing & together[row]))
        missing -= together[best]
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]


def _id(values: Sequence[object]) -> str:
    names = (getattr(value, "__name__", value) for value in values)
    words = ("+".join(name) or "plain" if isinstance(name, dict) else str(name) for name in names)
    return "-".join(word.removeprefix("torch.") for word in words)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tiers and matrices."""
    marker = metafunc.definition.get_closest_marker("matrix")
    axes = marker.kwargs if marker else {}
    whole, few = list(itertools.product(*axes.values())), pairwise(list(axes.values()))
    if "tier" in metafunc.fixturenames:
        cases = [(tier, *x) for tier in TIERS for x in (whole if tier == BEST and not FEW else few)]
        metafunc.parametrize(("tier", *axes), cases, indirect=["tier"], ids=map(_id, cases))
    elif axes:
        cases = few if FEW else whole
        metafunc.parametrize(tuple(axes), cases, ids=map(_id, cases))


def pytest_collection_finish() -> None:
    """What is imported is never garbage: collections that tests set off pass it over, for a twelfth of their time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What this machine or this run is not for."""
    for marker, (skipped, reason) in SKIPPED.items():
        if skipped and item.get_closest_marker(marker):
            pytest.skip(reason)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a small random model, without a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    random_weights(2, norm="rmsnorm", dtype=torch.float32).save(folder / "model.safetensors")
    return folder


@pytest.fixture
def worded(model: Path) -> Path:
    """The same with a tokenizer of 97 words: "a0" to "a96", and "[START]" at 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[START]": 0, **{f"a{i}": i for i in range(1, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[START]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[START]"])
    tokenizer.save(str(model / "tokenizer.json"))
    return model


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Tokens for it, three rows of twelve."""
    file = tmp_path / "tokens.npy"
    np.save(file, random_tokens(3, 12).numpy())
    return file
