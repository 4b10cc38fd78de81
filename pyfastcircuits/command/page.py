"""The command `report`: one HTML page of a model's circuits."""

from pathlib import Path
from typing import Annotated

import typer

import pyfastcircuits as fc
from pyfastcircuits.command import options, text
from pyfastcircuits.command.app import command
from pyfastcircuits.command.made import check_folder
from pyfastcircuits.command.options import Backend, Force, Model, ModelOption
from pyfastcircuits.command.report import Report
from pyfastcircuits.report.make import LENGTH, SEQUENCES, report_steps
from pyfastcircuits.report.page import GENERATOR, check_can_be_made


@command
def report(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    text_file: Annotated[Path | None, typer.Option("--text", help="a text to run over, in UTF-8")] = None,
    tokens_file: Annotated[Path | None, typer.Option("--tokens", help="token ids: .npy, or text, a row a line")] = None,
    out: Annotated[Path, typer.Option(help="the page to write, or a folder for report.html")] = Path("report.html"),
    force: Force = False,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="at most so many, evenly spaced", show_default=f"{SEQUENCES}, fewer of large models"),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="tokens a sequence, at most", show_default=f"{LENGTH}")
    ] = None,
    backend: Backend = "auto",
) -> None:
    """One HTML page with the article's figures for this model: pairs, composition, attention patterns, and more.

    It is a single file that needs no network and no server. A browser opens it.
    """
    if text_file and tokens_file:
        raise ValueError("--text and --tokens: give one of them")
    check_can_be_made()
    model, _ = options.named(name, option), options.device_of(backend)
    file = out / "report.html" if out.is_dir() else out
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
