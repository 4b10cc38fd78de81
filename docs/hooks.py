"""What the site takes from outside docs/: pages that stand where people look for them in a repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARDS = sorted(str(x.relative_to(ROOT)) for x in ROOT.glob("pyfastcircuits/models/*/README.md"))
OUTSIDE = ["CONTRIBUTING.md", "bench/RESULTS.md", "bench/predictions.json", *CARDS]


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links from docs/ to what is outside it, and back, to where the site has them."""
    if page.file.src_uri == "CONTRIBUTING.md":
        return markdown.replace("](docs/", "](")
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"\]\((?:\.\./)+docs/", "](../../../", markdown)
    markdown = markdown.replace("](../README.md)", "](index.md)")
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
