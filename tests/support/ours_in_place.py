"""A pytest plugin (-p support.ours_in_place): our FactoredMatrix wherever TransformerLens' own tests meet theirs."""

import gc
import sys

import transformer_lens

from pyfastcircuits import FactoredMatrix


def pytest_configure() -> None:
    gc.freeze()  # they collect garbage after every test: without all that is imported here
    theirs = transformer_lens.FactoredMatrix
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_lens") and getattr(module, "FactoredMatrix", None) is theirs:
            module.FactoredMatrix = FactoredMatrix  # type: ignore[attr-defined]


def pytest_report_header() -> str:
    return f"transformer_lens.FactoredMatrix is {transformer_lens.FactoredMatrix.__module__}.FactoredMatrix"
