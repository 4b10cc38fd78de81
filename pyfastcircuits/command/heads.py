"""The command `heads`: scores that tell known kinds of heads."""

from pathlib import Path
from typing import Annotated

import typer

import pyfastcircuits as fc
from pyfastcircuits.adapters import texts
from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.command import options, show, write
from pyfastcircuits.command.app import RUNS, command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import READS, Backend, Dtype, Force, Model, ModelOption, Out, Top
from pyfastcircuits.command.report import Report


@command(task=RUNS, example="pyfastcircuits heads induction-2l --top 3")
def heads(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    top: Top = 10,
    length: Annotated[
        int, typer.Option("--copy-length", help="random tokens before they come again", rich_help_panel=READS)
    ] = 25,
    copies: Annotated[int, typer.Option(help="how often the same tokens come", rich_help_panel=READS)] = 4,
    batch: Annotated[int, typer.Option(help="sequences that are run together", rich_help_panel=READS)] = 8,
    batches: Annotated[int, typer.Option(help="how many such runs there are", rich_help_panel=READS)] = 4,
    seed: Annotated[int, typer.Option(help="of the random tokens", rich_help_panel=READS)] = 0,
    out: Out = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Find previous-token, induction and duplicate-token heads, and those that copy, on random tokens that repeat.

    There are 25 tokens that come 4 times, as Olsson et al. 2022 have it. What the weights say of the same heads stands
    beside it. It writes heads.parquet and induction.parquet.
    """
    model, device = options.named(name, option), options.device_of(backend)
    check_folder(out)
    with report.bar as bar:
        run, weights = options.model_of(model, dtype, device)
        start, (layers, count) = texts.TokenText(model).start, (weights.n_layers, weights.n_heads)
        if start is None:
            start = start_of(run, weights.d_vocab) or 0
        if not layers:
            raise ValueError(f"{model} has no heads")
        asked = {
            "length": length, "copies": copies, "batch": batch, "batches": batches, "seed": seed, "start": start,
            "backend": backend, "dtype": dtype,
        }  # fmt: skip
        made = made_by("heads", model, asked)
        names = ["heads", "induction"] if layers > 1 else ["heads"]
        check_files(out, [f"{name}.parquet" for name in names], made, force=force)
        report.line(
            f"{model}: {layers} layers, {count} heads; {batch * batches} sequences of {copies} copies of {length} "
            f"random tokens, behind token {start}"
        )
        bar.plan({"runs": batch * batches, "weights": layers - 1, "writing": len(names)})
        scores = fc.head_scores(
            run, length=length, copies=copies, batch=batch, batches=batches, seed=seed, start=start, weights=weights,
            progress=bar.advance,
        )  # fmt: skip
        found = fc.induction_heads(run, scores, weights=weights, backend=backend) if layers > 1 else None
        bar.advance(layers - 1)
        report.show(show.head_table(scores, top))
        if found is not None:
            report.show(show.induction_table(found, top))
        written = {"heads": scores.table()} | ({} if found is None else {"induction": found.table()})
        paths = write.write_tables(out, written, made)
        bar.advance(len(paths))
    end(report, made, written, paths)
