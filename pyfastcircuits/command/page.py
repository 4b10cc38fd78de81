"""The command `report`: one HTML page of a model's circuits."""

from pathlib import Path
from typing import Annotated

import typer

import pyfastcircuits as fc
from pyfastcircuits.command import options, text
from pyfastcircuits.command.app import RUNS, command
from pyfastcircuits.command.made import check_folder
from pyfastcircuits.command.options import READS, Backend, Force, Model, ModelOption, Out, TextFile, TokensFile
from pyfastcircuits.command.report import Report
from pyfastcircuits.reports.make import LENGTH, SEQUENCES, report_steps
from pyfastcircuits.reports.page import GENERATOR, check_can_be_made

FEWER = f"{SEQUENCES}; fewer where all pairs of heads would take long"


@command(task=RUNS, example="pyfastcircuits report induction-2l --out report.html")
def report(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    text_file: TextFile = None,
    tokens_file: TokensFile = None,
    out: Out = Path("out"),
    force: Force = False,
    sequences: Annotated[
        int | None, typer.Option(min=1, help=options.MOST, show_default=FEWER, rich_help_panel=READS)
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help=options.LONGEST, show_default=f"{LENGTH}", rich_help_panel=READS)
    ] = None,
    backend: Backend = "auto",
) -> None:
    """Write one HTML page with the article's figures for this model: pairs of heads, composition, attention, and more.

    It is a single file, report.html unless --out names it, that needs no network and no server: a browser opens it.
    """
    if text_file and tokens_file:
        raise ValueError("--text and --tokens: give one of them")
    check_can_be_made()
    model, _ = options.named(name, option), options.device_of(backend)
    file = out if out.suffix == ".html" and not out.is_dir() else out / "report.html"
    check_folder(file.parent)
    if file.exists() and not force and not _is_report(file):
        raise ValueError(f"--out is {str(file)!r}, which is there and is no report: take another file, or --force")
    with report.bar as bar:
        weights = options.weights_of(model, "float32", "cpu")
        bar.plan(report_steps(weights))
        source = tokens_file or text_file
        fc.report(
            model,
            text.read_tokens(tokens_file, weights.d_vocab) if tokens_file else None,
            text=text.read_text(text_file) if text_file else None,
            out=file,
            length=length,
            sequences=sequences,
            source=None if source is None else str(source),
            backend=backend,
            progress=bar.advance,
        )
    report.found({"files": [str(file)], "model": model})
    report.line(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")


def _is_report(file: Path) -> bool:
    """Whether a file is a report that may be overwritten."""
    with file.open("rb") as content:
        return GENERATOR.encode() in content.read(4096)
