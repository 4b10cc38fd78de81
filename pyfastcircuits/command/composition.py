"""The command `composition`: composition scores of every pair of heads."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import pyfastcircuits as fc
from pyfastcircuits.command import options, show, write
from pyfastcircuits.command.app import WEIGHTS, command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import Backend, Dtype, Force, Model, ModelOption, Out, Precision, Top
from pyfastcircuits.command.report import Report
from pyfastcircuits.run.nodes import Kind


@command(task=WEIGHTS, example="pyfastcircuits composition induction-2l --kind K")
def composition(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    kind: Annotated[
        Kind, typer.Option(help="what of the later head reads what the earlier one wrote: queries, keys or values")
    ] = "K",
    top: Top = 10,
    out: Out = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
) -> None:
    """Show which heads are built to read what an earlier head writes: composition scores of every pair.

    Scores stand beside those of a random rotation between the two heads, and the spectra that go with them. Norm gains
    are in the weights; with layernorms, what is written is centred first. It writes composition-K.parquet and
    composition-K.png (or -Q, -V).
    """
    model, device = options.named(name, option), options.device_of(backend, precision, dtype)
    check_folder(out)
    with report.bar as bar:
        table = f"composition-{kind}"
        made = made_by("composition", model, {"kind": kind, "backend": backend, "dtype": dtype, "precision": precision})
        check_files(out, [f"{table}.parquet", f"{table}.png"], made, force=force)
        weights = options.weights_of(model, dtype, device)
        weights = fc.center(weights) if weights.norm == "layernorm" else weights
        pairs = fc.enumerate_paths(weights.n_layers, weights.n_heads, 2)
        if not pairs:
            raise ValueError(f"{model} has {weights.n_layers} layers: composition needs two heads in different layers")
        of_spectra = pairs if kind == "K" else []
        bar.plan({"scores": len(pairs), "baseline": 1, "spectra": len(of_spectra), "copying": 1, "writing": 2})
        scores = fc.composition_scores(weights, kind, precision=precision, backend=backend, progress=bar.advance)
        mean = fc.composition_baseline(weights, kind).mean
        z = fc.composition_z_scores(weights, kind, scores)
        bar.advance()
        score, baseline, z = (x.cpu()[tuple(torch.tensor(pairs).view(-1, 4).mT)] for x in (scores, mean, z))
        found = fc.Result(pairs, z, z.new_zeros(()), "z", {"score": score, "baseline": baseline}, {"kind": kind})
        eigenvalues = fc.composed_eigenvalues(weights, of_spectra, progress=bar.advance).cpu()
        copying = fc.copying_scores(weights).cpu()
        bar.advance()
        report.show(show.composition_table(found, eigenvalues, copying, top))
        written = {table: write.composition_columns(found, eigenvalues)}
        paths = write.write_tables(out, written, made)
        bar.advance()
        paths.append(write.picture(found.plot(title=f"{model}: {kind}-composition"), out / f"{table}.png", made))
        bar.advance()
    report.found({"copying": copying.tolist()})
    end(report, made, written, paths)
