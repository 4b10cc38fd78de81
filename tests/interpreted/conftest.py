"""What Triton's interpreter launches: the kernels for a GPU so small that splits hold several tiles of these shapes."""

from collections.abc import Callable

import pytest

from pyfastcircuits.kernels import configs

interpreter = pytest.importorskip("triton.runtime.interpreter")
_patch_language: Callable[[Callable[..., object]], object] = interpreter._patch_lang
_patched: set[str] = set()


def _patch_language_once(function: Callable[..., object]) -> object:
    """The interpreter goes through all of Triton's language whenever a function calls another: half of its time.

    Here it does for the first function of each module, and nothing is put back, as no kernel is compiled beside it.
    """
    if function.__module__ not in _patched:
        _patched.add(function.__module__)
        _patch_language(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_language_once


@pytest.fixture(autouse=True)
def _a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "WAVES", 4)
    monkeypatch.setattr(configs, "MULTIPROCESSORS", dict.fromkeys(configs.MULTIPROCESSORS, 1))
