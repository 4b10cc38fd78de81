"""Writes into docs/models.md the families that the tests run, and the errors of what a trace refuses.

python -m support.models_page, in tests/, writes the page; tests/adapters/test_models_page.py holds it to what is here.
"""

from pathlib import Path

import torch
import transformers

import pyfastcircuits as fc
from pyfastcircuits.adapters.families import FAMILIES
from support.configurations import ADDED, CONFIGURATIONS, LATENT, WITHOUT_QK, tokens
from support.refused import REFUSED

PAGE = Path(__file__).parents[2] / "docs/models.md"


def model_type(name: str) -> str:
    """The family of a configuration."""
    prefix = CONFIGURATIONS[name][0]
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    return config.model_type


def families() -> str:
    """A row for each family."""
    rows = ["| family | variants that the tests run | scores by weights alone | `store` |", "| --- " * 4 + "|"]
    for family in FAMILIES:
        own = [name for name in CONFIGURATIONS if model_type(name) == family]
        variants = [", ".join(name.split(", ")[1:]) for name in own]
        scores = "no" if own[0] in LATENT else "with a run's norm scales" if own[0] in ADDED else "yes"
        store = "patterns" if own[0] in WITHOUT_QK else "patterns, qk"
        shown = "; ".join(dict.fromkeys(variant or "plain" for variant in variants))
        rows.append(f"| `{family}` | {shown} | {scores} | {store} |")
    return "\n".join(rows)


def refusals() -> str:
    """An item for each error."""
    items = []
    for make, _ in REFUSED.values():
        try:
            fc.trace(make(), tokens(1))
        except ValueError as error:
            items.append(f"- {error}")
    return "\n".join(items)


def versions() -> str:
    """What ran."""
    return f"Written by transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}."


def written(page: str) -> str:
    """The page with its generated parts as they are now."""
    for name, made in (("families", families()), ("refusals", refusals()), ("versions", versions())):
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{made}\n\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
