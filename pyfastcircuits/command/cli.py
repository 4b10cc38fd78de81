"""The command `pyfastcircuits`: from a model's name to the tables it shows and the files it writes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import pyarrow as pa
    import typer

    from pyfastcircuits.command import check as checks
    from pyfastcircuits.command import options, show, text, write
    from pyfastcircuits.command.guard import EXIT_CODES, guarded
    from pyfastcircuits.command.made import check_files, check_folder, made_by
    from pyfastcircuits.command.options import Backend, Dtype, Force, Model, ModelOption, Precision
    from pyfastcircuits.command.report import Report
except ImportError as error:
    sys.exit(f"the command needs the cli extra ({error}): pip install 'pyfastcircuits[cli]'")

import pyfastcircuits as fc
from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import MetricName
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.experiments.sweep import SweepScope, count_steps
from pyfastcircuits.run.nodes import Kind

PATTERNS = 4 << 30  # bytes of attention patterns that a sweep of a text keeps, unless --sequences says otherwise
LENGTH = 512
SEQUENCES = "of a text 256, or as many as have 4 GiB of attention patterns; all of --tokens"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a subcommand; see guard."""
    return app.command(epilog=EXIT_CODES)(guarded(function))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Transformer-circuit analysis as fused kernels."""
    if version:
        print(fc.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@command
def info(report: Report) -> None:
    """Facts of this build and machine."""
    report.found(fc.build_info())
    for key, value in fc.build_info().items():
        report.line(f"{key}: {value}")


@command
def sweep(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    text_file: Annotated[Path | None, typer.Option("--text", help="a text to run over, in UTF-8")] = None,
    tokens_file: Annotated[Path | None, typer.Option("--tokens", help="token ids: .npy, or text, a row a line")] = None,
    scope: Annotated[SweepScope, typer.Option(help="pairs of heads by what is taken out; heads; layers")] = "path",
    mode: Annotated[Mode, typer.Option(help="what is written instead")] = "zero",
    attention: Annotated[Attention, typer.Option(help="patterns behind what is taken out")] = "frozen",
    metric: Annotated[MetricName, typer.Option(help="what is measured, besides kl")] = "nll",
    against: Annotated[str | None, typer.Option(help="the token that a logit difference is against")] = None,
    top: Annotated[int, typer.Option(min=0, help="ablations to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of sweep.parquet, orders.parquet and pairs.png")] = Path("out"),
    force: Force = False,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="at most so many, evenly spaced", show_default=SEQUENCES)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="tokens a sequence, at most", show_default=f"of a text {LENGTH}; all of --tokens"),
    ] = None,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="never hold the clean logits")] = False,
) -> None:
    """Term importance order by order, and the ablation of every pair of heads, every head or every layer."""
    if text_file and tokens_file:
        raise ValueError("--text and --tokens: give one of them")
    model, device = options.named(name, option), options.device_of(backend, precision, dtype)
    check_folder(out)
    with report.bar as bar:
        run, weights = options.model_of(model, dtype, device)
        shown = text.TokenText(model)
        if tokens_file:
            tokens = text.read_tokens(tokens_file, weights.d_vocab)[:, :length]
            tokens = text.evenly(tokens, sequences or len(tokens))
        else:
            content = text.read_text(text_file) if text_file else text.held_out_text()
            size = min(length or LENGTH, _positions(run, weights) or LENGTH)
            most = sequences or max(1, min(256, PATTERNS // _pattern_bytes(weights, size)))
            tokens = text.sequences_of(shown, content, size, most)
            unknown = text.check_known(tokens, shown, weights.d_vocab)
            if unknown > 0.01:
                report.warn(f"--text: {unknown:.0%} of its tokens are unknown to the model's tokenizer")
        against_token = None if against is None else options.token_of("--against", against, shown, weights)
        kind, steps = {"head": "heads", "layer": "layers"}.get(scope, "pairs"), count_steps(weights, scope)
        count = steps["ablations"]
        files = ["orders.parquet", "sweep.parquet", *[f"{kind}.png"] * (count > 0)]
        made = made_by(
            "sweep",
            model,
            {
                "scope": scope, "mode": mode, "attention": attention, "metric": metric, "against": against_token,
                "backend": backend, "dtype": dtype, "precision": precision, "low_memory": low_memory,
            },
            tokens,
            str(tokens_file or text_file or "held-out files of the standard library"),
        )  # fmt: skip
        check_files(out, files, made, force=force)
        report.line(
            f"{model}: {weights.n_layers} layers, {weights.n_heads} heads, {weights.d_vocab} tokens; "
            f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens; {count} {kind}{' of heads' * (kind == 'pairs')}"
        )
        bar.plan({**steps, "examples": min(top, count), "writing": len(files)})
        found = fc.sweep(
            run,
            tokens.to(weights.device),
            scope,
            mode,
            attention,
            progress=bar.advance,
            metric=metric,
            against=against_token,
            low_memory=low_memory,
            precision=precision,
            backend=backend,
        )
        report.show(show.order_table(found))
        if weights.n_layers:
            report.show(show.marginal_table(found))
        examples = found.examples(top, progress=bar.advance) if count else []
        written = {"orders": pa.table(show.order_steps(found)), "sweep": found.result.table()}
        paths = write.write_tables(out, written, made)
        bar.advance(len(written))
        if count:
            report.show(show.effect_table(found.result, examples, shown))
            title = f"{model}: {scope} ablation, {mode}, attention {attention}"
            label = f"change of the {show.metric_name(found.result.metric)}"
            paths.append(write.heatmap(found.result, out / files[-1], title, label, made))
            bar.advance()
            report.line(f"{count / found.seconds:.1f} {kind}/s of {len(tokens) * (tokens.shape[1] - 1)} tokens each")
    marginals = {name: x.tolist() for name, x in found.marginals._asdict().items()}
    report.found({"marginals": marginals, "examples": write.example_records(found, examples, shown)})
    _end(report, made, written, paths)


@command
def composition(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    kind: Annotated[Kind, typer.Option(help="what of the destination reads: queries, keys or values")] = "K",
    top: Annotated[int, typer.Option(min=0, help="pairs to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of composition-K.parquet and composition-K.png")] = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
) -> None:
    """Composition scores of every pair of heads, against a random rotation, with the spectra that go with them.

    Norm gains are in the weights; with layernorms, what is written is centred first.
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
        label = f"{kind}-composition, standard deviations from a random rotation"
        paths.append(write.heatmap(found, out / f"{table}.png", f"{model}: {kind}-composition", label, made))
        bar.advance()
    report.found({"copying": copying.tolist()})
    _end(report, made, written, paths)


@command
def tables(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    head: Annotated[str | None, typer.Option(help="skip-trigrams of this head, as LAYER.HEAD")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="only of this token (\\n: a line break); may be given again")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="entries to show, of each token or of all")] = 10,
    all_heads: Annotated[bool, typer.Option("--all-heads", help="write the tables of every head to --out")] = False,
    check: Annotated[bool, typer.Option("--check", help="hold the tables against logits and text")] = False,
    normed: Annotated[bool, typer.Option("--normed", help="embeddings go through the norm first")] = False,
    offset: Annotated[int, typer.Option(help="rotary positions: from the source to the destination")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the Parquet files of --all-heads")] = Path("out"),
    force: Force = False,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Bigrams and, with --head, skip-trigrams, of the whole vocabulary or of a source token; how far heads copy."""
    if (head is not None) + all_heads + check > 1:
        raise ValueError("--head, --all-heads and --check: give one of them")
    if source and (all_heads or check):
        raise ValueError("--source goes with --head, or alone")
    model, device = options.named(name, option), options.device_of(backend)
    with report.bar as bar:
        weights, shown = options.weights_of(model, dtype, device), text.TokenText(model)
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
            _end(report, made, written, paths)
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
    _end(report, made, written, paths)


def _end(report: Report, made: dict[str, Any], tables: dict[str, pa.Table], files: list[Path]) -> None:
    """Tell what has been written, and by what."""
    report.found({name: table.to_pylist() for name, table in tables.items()})
    report.found({"made_by": made, "files": list(map(str, files))})
    report.line(f"written: {', '.join(map(str, files))}")


def _positions(model: Any, weights: fc.CircuitWeights) -> int | None:
    """The number of positions of the model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pattern_bytes(weights: fc.CircuitWeights, length: int) -> int:
    """The size of one sequence's attention patterns."""
    return max(1, weights.n_layers) * weights.n_heads * length**2 * weights.compute_dtype.itemsize
