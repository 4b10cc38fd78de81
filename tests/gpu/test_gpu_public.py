"""Everything public, on a GPU: random valid calls of it give there what the same calls give on the CPU."""

import math
import tempfile
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz import attempt, is_clear, numbers, said
from support.fuzz_calls import ENTRIES, Call
from support.fuzz_values import Choices, World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROUNDED = ("bf16", "tf32")  # of precisions: those with numbers of their own
OF_MACHINES = ("build_info", "bandwidth", "_rate", "plan")
OF_FILES = ("report", "load_weights", "Corpus", "corpus", "plot.")


@pytest.mark.parametrize("name", [x for x in ENTRIES if not any(part in x for part in (*OF_MACHINES, *OF_FILES))])
def test_equals_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = []
    for seed in range(4):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monkeypatch.chdir(folder)  # some calls save
            choices = Choices(Random(f"{name} {seed}").randrange)
            plain = made(choices, [name], folder)
            if plain is None or not plain.valid:
                continue
            expected, wrong = attempt(plain, "")
            monkeypatch.setattr(World, "device", "cuda")
            there = made(Choices.again(choices.made), [*ENTRIES], folder)
            if there is None:
                problems.append(f"{plain}: cannot be made on the GPU")
                continue
            found, error = attempt(there, "")
            monkeypatch.undo()
        asked = there.arguments.get("backend", "auto")
        if error is not None:
            if not (is_clear(error, there) and (wrong is not None or asked not in ("auto", "reference"))):
                problems.append(f"{there}: {said(error)}")
        elif wrong is None and there.arguments.get("precision") not in ROUNDED and plain.world.dtype != torch.bfloat16:
            problems += [f"{there}: {text}" for text in differences(found, expected)]
    assert not problems, "\n".join(problems)


def made(choices: Choices, names: list[str], folder: str) -> Call | None:
    """A call of one of these, or None where the choices make no valid model."""
    try:
        return Call(choices, names, Path(folder))
    except (ValueError, TypeError, IndexError):
        return None


def differences(found: object, expected: object) -> list[str]:
    """How the numbers on the GPU differ from those on the CPU; the tensors of results stay on the GPU."""
    ours, theirs = list(numbers(found)), list(numbers(expected))
    if len(ours) != len(theirs):
        return [f"{len(ours)} numbers, on the CPU {len(theirs)}"]
    problems = []
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            one = one.detach().cpu()
            if one.dtype != other.dtype or one.shape != other.shape:
                problems.append(f"{one.dtype} {list(one.shape)}, on the CPU {other.dtype} {list(other.shape)}")
            elif not torch.allclose(one, other.detach(), rtol=1e-3, atol=1e-4, equal_nan=True):
                problems.append(f"numbers that differ by {(one - other).abs().max().item():.3g}")
        elif isinstance(one, float) and not math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4) and one == one:
            problems.append(f"{one}, on the CPU {other}")
    return problems
