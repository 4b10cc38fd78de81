"""The command: `pyfastcircuits sweep`, `composition`, `tables` and `heads`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

try:
    import typer
    from rich import progress as bars
    from rich.console import Console

    from pyfastcircuits.command import heads_report, report, tables_report, text, truth_report
except ImportError as error:
    sys.exit(f"the command needs the cli extra ({error}): pip install 'pyfastcircuits[cli]'")

from pyfastcircuits import (
    bigrams,
    build_info,
    center,
    composed_eigenvalues,
    composition_baseline,
    composition_scores,
    composition_z_scores,
    copying_accuracy,
    copying_scores,
    enumerate_paths,
    head_scores,
    induction_heads,
    load_weights,
    ops,
    skip_trigrams,
    top_entries,
    top_per_row,
)
from pyfastcircuits.adapters.folder import is_folder, model_in
from pyfastcircuits.circuits.composition import Kind
from pyfastcircuits.experiments.ablation import Attention
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import Metric
from pyfastcircuits.experiments.sweep import Plan, SweepScope, limit_seconds, run_sweep, worst_tokens
from pyfastcircuits.model.weights import CircuitWeights

MODEL = "a bundled model, a safetensors file or its folder, or the local folder of a Hugging Face model"
Dtype = Literal["float32", "float64", "bfloat16"]

PATTERNS = 4 << 30  # bytes of attention patterns that a sweep keeps, unless it is told how many sequences to run
SEQUENCES = "256, or as many as have 4 GiB of attention patterns"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def main() -> None:
    """Transformer-circuit analysis as fused kernels."""


@app.command()
def info() -> None:
    """Facts of this build and machine."""
    for key, value in build_info().items():
        console.print(f"{key}: {value}", highlight=False)


@app.command()
def sweep(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL, show_default="induction-2l")] = None,
    option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="the same, by name")] = None,
    text_file: Annotated[Path | None, typer.Option("--text", help="a text to run over")] = None,
    tokens_file: Annotated[Path | None, typer.Option("--tokens", help="token ids: .npy, or text, a row a line")] = None,
    scope: Annotated[SweepScope, typer.Option(help="pairs of heads by what is taken out; heads; layers")] = "path",
    mode: Annotated[Mode, typer.Option(help="what is written instead")] = "zero",
    attention: Annotated[Attention, typer.Option(help="patterns behind what is taken out")] = "frozen",
    metric: Annotated[Metric, typer.Option(help="what is measured, besides kl")] = "nll",
    against: Annotated[str | None, typer.Option(help="the token that a logit difference is against")] = None,
    top: Annotated[int, typer.Option(min=0, help="ablations to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of sweep.parquet, orders.parquet and pairs.png")] = Path("out"),
    sequences: Annotated[
        int | None, typer.Option(min=1, help="at most so many sequences of the text", show_default=SEQUENCES)
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a sequence; at most the model's positions")] = 512,
    backend: Annotated[ops.Backend, typer.Option(help="which kernels run")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "float32",
    precision: Annotated[ops.Precision, typer.Option(help="of the multiply-adds")] = "ieee",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="never hold the clean logits")] = False,
) -> None:
    """Term importance order by order, and the ablation of every pair of heads, every head or every layer."""
    with _errors():
        if text_file and tokens_file:
            raise ValueError("--text and --tokens: give one of them")
        _check_folder(out)
        model = _named(name, option)
        run = _model(model, dtype, backend)
        weights = run if isinstance(run, CircuitWeights) else CircuitWeights.from_model(run)
        shown = text.TokenText(model)
        if tokens_file:
            tokens = text.read_tokens(tokens_file)
        else:
            content = text_file.read_text(encoding="utf-8", errors="replace") if text_file else text.held_out_text()
            length = min(length, _positions(run, weights) or length)
            most = sequences or max(1, min(256, PATTERNS // _pattern_bytes(weights, length)))
            tokens = text.sequences_of(shown, content, length, most)
        token = None if against is None else shown.token(against)
        plan = Plan(scope, mode, attention, metric, token, low_memory, precision, backend)
        rows, count = tokens.shape[0] * (tokens.shape[1] - 1), plan.count(weights)
        kind = {"head": "heads", "layer": "layers"}.get(scope, "pairs")
        console.print(
            f"{model}: {weights.n_layers} layers, {weights.n_heads} heads, {weights.d_vocab} tokens; "
            f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens; {count} {kind}{' of heads' * (kind == 'pairs')}",
            highlight=False,
        )
        limit = limit_seconds(weights, rows, count, precision) if count and plan == Plan(
            low_memory=low_memory, precision=precision, backend=backend
        ) else None  # fmt: skip
        with _progress(kind) as progress:
            task = progress.add_task("", total=count)
            result = run_sweep(run, tokens.to(weights.device), plan, progress=lambda done: progress.advance(task, done))
            progress.update(task, completed=count)
        console.print(report.order_table(result))
        if weights.n_layers:
            console.print(report.marginal_table(result))
        report.write_orders(result, out / "orders.parquet")
        report.write_table(result.result.table(), out / "sweep.parquet")
        written = ["orders.parquet", "sweep.parquet"]
        if count:
            best = [label for label, _ in result.result.top(top)]
            console.print(report.effect_table(result.result, worst_tokens(result.trace, plan, best, context=12), shown))
            title = f"{model}: {scope} ablation, {mode}, attention {attention}"
            report.effect_heatmap(result.result, out / f"{kind}.png", title)
            written.append(f"{kind}.png")
            share = "" if limit is None else f", {limit / result.seconds:.0%} of this machine's limit"
            console.print(f"{count / result.seconds:.1f} {kind}/s of {rows} tokens each{share}", highlight=False)
        console.print(f"written: {', '.join(str(out / name) for name in written)}", highlight=False)


@app.command()
def composition(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL, show_default="induction-2l")] = None,
    option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="the same, by name")] = None,
    kind: Annotated[Kind, typer.Option(help="what of the destination reads: queries, keys or values")] = "K",
    top: Annotated[int, typer.Option(min=0, help="pairs to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of composition-K.parquet and composition-K.png")] = Path("out"),
    backend: Annotated[ops.Backend, typer.Option(help="which kernels run")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "float32",
    precision: Annotated[ops.Precision, typer.Option(help="of the multiply-adds")] = "ieee",
) -> None:
    """Composition scores of every pair of heads, against a random rotation, with the spectra that go with them.

    Norm gains are in the weights; with layernorms, what is written is centred first.
    """
    with _errors():
        _check_folder(out)
        model = _named(name, option)
        weights = _place(load_weights(model), dtype, backend)
        weights = center(weights) if weights.norm == "layernorm" else weights
        count = _pairs(weights)
        if not count:
            raise ValueError(f"{model} has {weights.n_layers} layers: composition needs two heads in different layers")
        with _progress() as progress:
            task = progress.add_task("", total=count)
            scores = composition_scores(
                weights,
                kind,
                precision=precision,
                backend=backend,
                progress=lambda done: progress.advance(task, done),
            )
        z = composition_z_scores(weights, kind, scores)
        mean = composition_baseline(weights, kind).mean
        pairs = enumerate_paths(weights.n_layers, weights.n_heads, 2)
        where = tuple(torch.tensor(pairs).view(-1, 4).mT)
        found = report.Composition(
            kind=kind,
            pairs=[[list(head) for head in pair] for pair in pairs],
            score=scores.cpu()[where],
            baseline=mean.cpu()[where],
            z=z.cpu()[where],
            eigenvalues=composed_eigenvalues(weights, pairs if kind == "K" else []).cpu(),
            copying=copying_scores(weights).cpu(),
        )
        console.print(report.composition_table(found, top))
        names = (f"composition-{kind}.parquet", f"composition-{kind}.png")
        report.write_composition(found, out / names[0])
        report.composition_heatmap(found, out / names[1], f"{model}: {kind}-composition")
        console.print(f"written: {', '.join(str(out / name) for name in names)}", highlight=False)


@app.command()
def tables(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL, show_default="induction-2l")] = None,
    option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="the same, by name")] = None,
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
    backend: Annotated[ops.Backend, typer.Option(help="which kernels run")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "float32",
) -> None:
    """Bigrams and, with --head, skip-trigrams, of the whole vocabulary or of a source token; how far heads copy."""
    with _errors():
        if (head is not None) + all_heads + check > 1:
            raise ValueError("--head, --all-heads and --check: give one of them")
        if source and (all_heads or check):
            raise ValueError("--source goes with --head, or alone")
        if all_heads:
            _check_folder(out)
        model = _named(name, option)
        weights, shown = _place(load_weights(model), dtype, backend), text.TokenText(model)
        sources = [shown.token(piece) for piece in source] if source else None
        if check:
            for part in truth_report.check(weights, shown, backend):
                console.print(part, highlight=False)
        elif all_heads:
            if not weights.n_layers:
                raise ValueError(f"--all-heads: {model} has no heads")
            with _progress("heads") as progress:
                task = progress.add_task("", total=weights.n_layers * weights.n_heads)
                files = tables_report.write_heads(
                    weights,
                    k,
                    out,
                    shown,
                    normed=normed,
                    offset=offset,
                    backend=backend,
                    progress=lambda done: progress.advance(task, done),
                )
            console.print(f"written: {', '.join(map(str, files))}", highlight=False)
        elif head is not None:
            found = skip_trigrams(weights, _head(head), sources, k, normed=normed, offset=offset, backend=backend)
            show = tables_report.source_table if sources else tables_report.triple_table
            console.print(show(found, shown))
        elif sources:
            rows = top_per_row(bigrams(weights, normed=normed), k, sources, normalize="center", backend=backend)
            console.print(tables_report.row_table("Bigrams: the direct path", ("token", "raised next"), rows, shown))
        else:
            best = top_entries(bigrams(weights, normed=normed), k, normalize="center", backend=backend)
            title = "Largest bigrams: the direct path, logits less the mean over outputs"
            console.print(tables_report.entry_table(title, ("token", "raised next", "logit"), best, shown))
            if weights.n_layers:
                accuracy = copying_accuracy(weights, backend=backend)
                console.print(tables_report.copying_table(accuracy, copying_scores(weights)))


@app.command()
def heads(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL, show_default="induction-2l")] = None,
    option: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="the same, by name")] = None,
    top: Annotated[int, typer.Option(min=0, help="heads to show")] = 10,
    length: Annotated[int, typer.Option(help="random tokens in one copy")] = 25,
    copies: Annotated[int, typer.Option(help="how often they come")] = 4,
    batch: Annotated[int, typer.Option(help="sequences run at a time")] = 8,
    batches: Annotated[int, typer.Option(help="how many such runs")] = 4,
    seed: Annotated[int, typer.Option(help="of the tokens")] = 0,
    out: Annotated[Path, typer.Option(help="folder of heads.parquet and induction.parquet")] = Path("out"),
    backend: Annotated[ops.Backend, typer.Option(help="which kernels run")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="of the weights")] = "float32",
) -> None:
    """Previous-token, induction, prefix-matching, duplicate-token and copying scores of every head.

    On random tokens that repeat, 4 times 25 of them as Olsson et al. 2022 have it; with what the weights say of it.
    """
    with _errors():
        _check_folder(out)
        model = _named(name, option)
        run = _model(model, dtype, backend)
        start = text.TokenText(model).start or 0
        scores = head_scores(run, length=length, copies=copies, batch=batch, batches=batches, seed=seed, start=start)
        layers, count = scores.values.shape
        if not layers:
            raise ValueError(f"{model} has no heads")
        console.print(
            f"{model}: {layers} layers, {count} heads; {batch * batches} sequences of {copies} copies of {length} "
            f"random tokens, behind token {start}",
            highlight=False,
        )
        found = induction_heads(run, scores, backend=backend) if layers > 1 else None
        console.print(heads_report.head_table(scores, found, top))
        written = ["heads.parquet"]
        report.write_table(scores.table(), out / written[0])
        if found is not None:
            written.append("induction.parquet")
            report.write_table(found.table(), out / written[1])
        console.print(f"written: {', '.join(str(out / name) for name in written)}", highlight=False)


def _head(name: str) -> tuple[int, int]:
    layer, dot, head = name.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise ValueError(f"--head is {name!r}, expected LAYER.HEAD, such as 1.4")
    return int(layer), int(head)


def _progress(what: str = "pairs") -> bars.Progress:
    return bars.Progress(
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(what),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
    )


def _pairs(weights: CircuitWeights) -> int:
    return weights.n_layers * (weights.n_layers - 1) // 2 * weights.n_heads**2


def _named(name: str | None, option: str | None) -> str:
    if name and option:
        raise ValueError(f"model is given twice, as {name!r} and --model {option!r}: give one of them")
    return name or option or "induction-2l"


def _model(name: str, dtype: str, backend: str) -> Any:
    """What a sweep runs: CircuitWeights, or the model of a Hugging Face folder."""
    path = Path(name)
    if not (path.is_dir() and is_folder(path)):
        return _place(load_weights(name), dtype, backend)
    return model_in(path, getattr(torch, dtype)).to(_device(backend))


def _positions(model: Any, weights: CircuitWeights) -> int | None:
    """Positions the model has, None where nothing says."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pattern_bytes(weights: CircuitWeights, length: int) -> int:
    """Attention patterns of one sequence."""
    return max(1, weights.n_layers) * weights.n_heads * length**2 * weights.compute_dtype.itemsize


def _device(backend: str) -> str:
    on_gpu = backend in ("triton", "cuda") or (backend == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        ops.resolve_backend(backend, torch.device("cuda"))  # says what is missing
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def _place(weights: CircuitWeights, dtype: str, backend: str) -> CircuitWeights:
    return weights.to(getattr(torch, dtype)).to(_device(backend))


def _check_folder(folder: Path) -> None:
    """Fail before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there ({error.strerror})") from error


@contextmanager
def _errors() -> Iterator[None]:
    """Bad input is one line, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError, RuntimeError, ImportError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None
