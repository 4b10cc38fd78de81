"""docs/models.md says which families the tests run, and what is refused in which words."""

import re

import pytest

pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.models_page import PAGE, written


def numbered(page):
    """Without the versions, which are those of whoever wrote the page."""
    return re.sub(r"transformers \S+ and torch \S+", "", page)


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_the_tests_run():
    page = PAGE.read_text(encoding="utf-8")
    assert numbered(written(page)) == numbered(page), "run `make models`"
