"""The command `circuit`: the edges that a task needs, and how much of the model they explain."""

import time
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import pyfastcircuits as fc
from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.adapters.texts import TokenText
from pyfastcircuits.command import options, show, write
from pyfastcircuits.command.app import RUNS, command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import GIVES, HOW, READS, Backend, Dtype, Force, Model, ModelOption, Out, Top
from pyfastcircuits.command.report import Report
from pyfastcircuits.experiments.faithfulness import pruning_runs
from pyfastcircuits.result import label_name

TaskName = Literal["induction", "indirect-object", "greater-than"]
CANDIDATES, SIZES = 3, 12  # edges that one in the circuit is chosen of; sizes on the curve
FILES = ["edges.parquet", "curve.parquet", "circuit.png", "curve.png"]  # that say what made them


@command(task=RUNS, example="pyfastcircuits circuit induction-2l --task induction --edges 20")
def circuit(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    task: Annotated[TaskName, typer.Option(help="what the model is asked", rich_help_panel=READS)] = "induction",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="a task of one's own: JSONL, with clean, corrupted, answers and perhaps against on each line",
            rich_help_panel=READS,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--pairs", min=1, help="pairs of prompts", rich_help_panel=READS)] = 16,
    seed: options.Seed = 0,
    edges: Annotated[int, typer.Option(min=0, help="the number of edges in the circuit", rich_help_panel=GIVES)] = 20,
    top: Top = 10,
    method: Annotated[
        Literal["eap", "eap-ig", "eap-ig-activations"],
        typer.Option(help="how edges are scored to first order", rich_help_panel=HOW),
    ] = "eap-ig",
    steps: Annotated[int, typer.Option(min=1, help="of integrated gradients", rich_help_panel=HOW)] = 5,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="take the best edges from the logits down", rich_help_panel=HOW)
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune/--no-prune",
            help="choose among three times as many by running the model hundreds of times, or by scores alone",
            rich_help_panel=HOW,
        ),
    ] = True,
    out: Out = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Find the edges between nodes that a task needs, and measure how much of the model they explain.

    Each edge is scored to first order. Of the best ones the circuit is chosen by running the model with all other edges
    patched from the corrupted prompt (--no-prune: by the scores alone). It writes circuit.json (for circuit-tracer's
    viewer), circuit.png, curve.png, edges.parquet and curve.parquet.
    """
    model, device = options.named(name, option), options.device_of(backend)
    check_folder(out)
    with report.bar as bar:
        run, weights = options.model_of(model, dtype, device)
        shown = TokenText(model)
        asked = {
            "task": task if prompts is None else str(prompts), "batch": batch, "seed": seed, "edges": edges,
            "method": method, "steps": steps, "greedy": greedy, "prune": prune, "backend": backend, "dtype": dtype,
        }  # fmt: skip
        given = _task(task, prompts, run, weights, shown, batch, seed)
        prompts_hash = sha256(b"".join(x.numpy().tobytes() for x in (given.clean, given.corrupted))).hexdigest()
        made = made_by("circuit", model, asked, prompts_hash, given.name)
        check_files(out, FILES, made, force=force)
        choosing = pruning_runs(CANDIDATES * edges, edges) if prune else 0
        bar.plan({"runs": 2, "scores": 1, "curve": 1, "choosing edges": choosing, "circuit": 2, "writing": 5})
        clean, corrupted = given.runs(run, weights=weights)
        bar.advance(2)
        how: dict[str, Any] = {**given.options, "backend": backend}
        scores = fc.edge_scores(clean, corrupted, method, steps=steps, **how)
        bar.advance()
        ranked = fc.circuit(scores)
        began = time.perf_counter()
        whole = fc.faithfulness(ranked, clean, corrupted, sizes=SIZES, **how)
        seconds = (time.perf_counter() - began) / SIZES
        bar.advance()
        found = fc.circuit(scores, top=(CANDIDATES if prune else 1) * edges, greedy=greedy)
        if prune:
            runs = pruning_runs(len(found), edges)
            report.line(show.choosing(len(found), edges, runs, seconds))
            left = float(choosing)

            def chosen(runs: float) -> None:
                nonlocal left
                bar.advance(min(runs, left))
                left -= min(runs, left)

            found = fc.prune_circuit(found, clean, corrupted, top=edges, progress=chosen, **how)
            bar.advance(left)
        explained = fc.faithfulness(found, clean, corrupted, random=5, **how)
        bar.advance()
        others = None
        if prompts is None:  # which the circuit was not chosen on
            asked_too = _task(task, None, run, weights, shown, batch, seed + 1)
            others = fc.faithfulness(found, *asked_too.runs(run, weights=weights), **asked_too.options, backend=backend)
        bar.advance()
        report.line(f"{model}: {given.name}, {len(given)} pairs of prompts; {len(found)} of {len(scores.labels)} edges")
        report.line(show.kept(explained))
        if others is not None:
            report.line(show.kept(others, f" on {batch} other pairs of prompts"))
        report.line(show.enough(whole))
        report.show(show.circuit_table(found, top))
        report.show(show.faithfulness_table(explained, whole))
        assert whole.curve is not None
        tables = {"edges": ranked.table(), "curve": whole.curve.table()}
        paths = write.write_tables(out, tables, made)
        paths.append(write.circuit_graph(found, out / "circuit.json"))
        paths.append(write.picture(found.plot(), out / "circuit.png", made))
        paths.append(write.picture(whole.curve.plot(), out / "curve.png", made))
        bar.advance(5)
    report.found({"circuit": [label_name(edge) for edge in found.edges], "faithfulness": explained.faithfulness})
    report.found({"right": explained.right})
    if others is not None:
        report.found({"on other prompts": {"faithfulness": others.faithfulness, "right": others.right}})
    report.found({"completeness": explained.completeness, "cpr": whole.curve.cpr, "cmd": whole.curve.cmd})
    end(report, made, tables, paths)


def _task(
    name: TaskName,
    file: Path | None,
    run: Any,
    weights: fc.CircuitWeights,
    shown: TokenText,
    batch: int,
    seed: int,
) -> fc.Task:
    """The task asked for, behind the model's start token."""
    start = shown.start if shown.start is not None else start_of(run, weights.d_vocab)
    if file is not None:
        if not file.exists():
            raise FileNotFoundError(f"--prompts is {str(file)!r}, and there is no such file")
        return fc.Task.load(file, None if shown.tokenizer is None else shown.tokenizer, start=start)
    if name == "induction":
        return fc.Task.induction(weights.d_vocab, batch=batch, start=start, seed=seed)
    if shown.tokenizer is None:
        raise ValueError(f"--task is {name!r}, but this model has no tokenizer.json")
    make = fc.Task.indirect_object if name == "indirect-object" else fc.Task.greater_than
    return make(shown.tokenizer, batch=batch, start=start, seed=seed)
