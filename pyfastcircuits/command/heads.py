"""The command `heads`: scores that tell known kinds of heads."""

from pathlib import Path
from typing import Annotated

import typer

import pyfastcircuits as fc
from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.command import options, show, text, write
from pyfastcircuits.command.app import command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import Backend, Dtype, Force, Model, ModelOption
from pyfastcircuits.command.report import Report


@command
def heads(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    top: Annotated[int, typer.Option(min=0, help="heads to show")] = 10,
    length: Annotated[int, typer.Option(help="random tokens in one copy")] = 25,
    copies: Annotated[int, typer.Option(help="how often they come")] = 4,
    batch: Annotated[int, typer.Option(help="sequences run at a time")] = 8,
    batches: Annotated[int, typer.Option(help="how many such runs")] = 4,
    seed: Annotated[int, typer.Option(help="of the tokens")] = 0,
    out: Annotated[Path, typer.Option(help="folder of heads.parquet and induction.parquet")] = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Previous-token, induction, prefix-matching, duplicate-token and copying scores of every head.

    On random tokens that repeat, 4 times 25 of them as Olsson et al. 2022 have it; with what the weights say of it.
    """
    model, device = options.named(name, option), options.device_of(backend)
    check_folder(out)
    with report.bar as bar:
        run, weights = options.model_of(model, dtype, device)
        start, (layers, count) = text.TokenText(model).start, (weights.n_layers, weights.n_heads)
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
