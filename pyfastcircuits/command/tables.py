"""The command `tables`: bigrams, skip-trigrams, and how far heads copy."""

from pathlib import Path
from typing import Annotated

import typer

import pyfastcircuits as fc
from pyfastcircuits.adapters import texts
from pyfastcircuits.command import check as checks
from pyfastcircuits.command import options, show, write
from pyfastcircuits.command.app import WEIGHTS, command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import GIVES, Backend, Dtype, Force, Model, ModelOption, Out
from pyfastcircuits.command.report import Report


@command(task=WEIGHTS, example="pyfastcircuits tables skip-trigram-1l --head 0.2 --normed -k 4")
def tables(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    head: Annotated[str | None, typer.Option(help="skip-trigrams of this head, such as 1.4")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="only of this source token (\\n is a line break); may be given again")
    ] = None,
    k: Annotated[
        int, typer.Option("--k", "-k", min=1, help="entries to show, of each token or of all", rich_help_panel=GIVES)
    ] = 10,
    all_heads: Annotated[
        bool, typer.Option("--all-heads", help="write the tables of every head to --out", rich_help_panel=GIVES)
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="hold the tables against the logits and a text")] = False,
    normed: Annotated[bool, typer.Option("--normed", help="embeddings go through the norm first")] = False,
    offset: Annotated[
        int, typer.Option(help="of rotary positions: how far the destination stands behind the source")
    ] = 0,
    out: Out = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show the bigrams of the direct path and how far heads copy; with --head, a head's skip-trigrams.

    They are the largest of the whole vocabulary, or those of a source token. --all-heads writes ov, qk, skip-trigrams,
    copying and bigrams.parquet.
    """
    if (head is not None) + all_heads + check > 1:
        raise ValueError("--head, --all-heads and --check: give one of them")
    if source and (all_heads or check):
        raise ValueError("--source goes with --head, or alone")
    model, device = options.named(name, option), options.device_of(backend)
    with report.bar as bar:
        weights, shown = options.weights_of(model, dtype, device), texts.TokenText(model)
        sources = [options.token_of("--source", piece, shown, weights) for piece in source] if source else None
        count = weights.n_layers * weights.n_heads
        if check:
            bar.plan(checks.check_steps(weights))
            for finding, values, table in checks.check_tables(weights, shown, backend, bar.advance):
                report.found({finding: values})
                report.show(table)
        elif all_heads:
            if not count:
                raise ValueError(f"--all-heads: {model} has no heads")
            check_folder(out)
            asked = {"k": k, "normed": normed, "offset": offset, "backend": backend, "dtype": dtype}
            made = made_by("tables", model, asked)
            check_files(out, [f"{table}.parquet" for table in write.HEAD_TABLES], made, force=force)
            bar.plan({"heads": count, "writing": 1})
            written = write.head_tables(
                weights, k, shown, normed=normed, offset=offset, backend=backend, progress=bar.advance
            )
            paths = write.write_tables(out, written, made)
            bar.advance()
            end(report, made, written, paths)
        elif head is not None:
            bar.plan({"skip-trigrams": 1})
            trigrams = fc.skip_trigrams(
                weights, options.head_of(head), sources, k, normed=normed, offset=offset, backend=backend
            )
            bar.advance()
            report.found(write.skip_trigram_records(trigrams, shown, ranked=not sources))
            report.show((show.source_table if sources else show.triple_table)(trigrams, shown))
        else:
            bar.plan({"bigrams": 1, "copying": 0 if sources else count})
            circuit = fc.bigrams(weights, normed=normed)
            best = (
                fc.top_per_row(circuit, k, sources, normalize="center", backend=backend)
                if sources
                else fc.top_entries(circuit, k, normalize="center", backend=backend)
            )
            bar.advance()
            report.found({"bigrams": write.bigram_records(best, shown)})
            if sources:
                report.show(show.row_table("Bigrams: the direct path", ("token", "raised next"), best, shown))
                return
            title = "Largest bigrams: the direct path, logits less the mean over outputs"
            report.show(show.entry_table(title, ("token", "raised next", "logit"), best, shown))
            if count:
                accuracy = fc.copying_accuracy(weights, backend=backend, progress=bar.advance)
                eigenvalues = fc.copying_scores(weights)
                report.found({"copying": {x: y.tolist() for x, y in accuracy._asdict().items()}})
                report.found({"copying_scores": eigenvalues.tolist()})
                report.show(show.copying_table(accuracy, eigenvalues))
