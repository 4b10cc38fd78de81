"""The page of a report: a Jinja template with the data, our script, and Plotly's, in one file that loads nothing.

Nothing of a model or a text can become script. The template escapes what it is given; data stand in a script element
of type application/json, in which <, > and & are escaped; our script writes tokens as text alone; and the page's policy
lets only the two scripts run whose hashes it names, and nothing be fetched.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyfastcircuits.adapters.texts import visible
from pyfastcircuits.reports.pack import as_json
from pyfastcircuits.reports.sections import Section

_FOLDER = Path(__file__).parent
GENERATOR = '<meta name="generator" content="pyfastcircuits">'
_SCRIPTS = ("data", "page", "charts", "tokens", "tables", "pairs", "weights", "attention", "start")


def check_can_be_made() -> None:
    """Raise ImportError, before any work, if what makes a page is missing."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs the report extra ({error}): pip install 'pyfastcircuits[report]'") from error


def page(
    shared: Mapping[str, Any], sections: Mapping[str, Section], facts: Mapping[str, str], cuts: Sequence[str]
) -> str:
    """The page.

    Args:
        shared: data of several sections.
        sections: what each section shows, by the name of its place.
        facts: what made the page, by name.
        cuts: what is left out of it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    plotly = _script(get_plotlyjs())
    ours = _script("\n".join((_FOLDER / "assets" / f"{name}.js").read_text("utf-8") for name in _SCRIPTS))
    data = {**shared, **{name: section.data for name, section in sections.items()}}
    return environment.get_template("report.html.j2").render(
        policy=_policy(plotly, ours),
        generator=GENERATOR,
        style=(_FOLDER / "assets" / "report.css").read_text("utf-8"),
        plotly=plotly,
        script=ours,
        data=as_json(data),
        sections=sections,
        facts={name: visible(value) for name, value in facts.items()},
        cuts=cuts,
    )


def _script(source: str) -> str:
    """A script as it may stand in a script element, with the line breaks that a browser hashes it with."""
    return "\n" + source.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script") + "\n"


def _policy(*scripts: str) -> str:
    """The policy that lets these scripts run and nothing else, and nothing be fetched."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
