"""The command `pyfastcircuits`: from a model's name to the tables it shows and the files it writes."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

try:
    import pyarrow as pa
    import typer
    from rich import progress as bars
    from rich.console import Console

    from pyfastcircuits.command import show, text, write
except ImportError as error:
    sys.exit(f"the command needs the cli extra ({error}): pip install 'pyfastcircuits[cli]'")

import pyfastcircuits as fc
from pyfastcircuits import ops
from pyfastcircuits.adapters.files import load_model
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import MetricName
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.experiments.sweep import SweepScope, count_ablations, limit_seconds
from pyfastcircuits.run.nodes import Kind

PATTERNS = 4 << 30  # bytes of attention patterns that a sweep keeps, unless --sequences says otherwise
SEQUENCES = "256, or as many as have 4 GiB of attention patterns"
MODEL = "a bundled model, a safetensors file or its folder, or the local folder of a Hugging Face model"

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL, show_default="induction-2l")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="the same, by name")]
Backend = Annotated[ops.Backend, typer.Option(help="which kernels run")]
Dtype = Annotated[Literal["float32", "float64", "bfloat16"], typer.Option(help="of the weights")]
Precision = Annotated[ops.Precision, typer.Option(help="of the multiply-adds")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a subcommand for which bad input is one line of error, not a traceback."""

    @wraps(function)
    def guarded(**options: Any) -> None:
        try:
            function(**options)
        except (ValueError, TypeError, IndexError, OSError, RuntimeError, ImportError) as error:
            Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
            raise typer.Exit(1) from None

    return app.command()(guarded)


@app.callback()
def main() -> None:
    """Transformer-circuit analysis as fused kernels."""


@command
def info() -> None:
    """Facts of this build and machine."""
    for key, value in fc.build_info().items():
        _say(f"{key}: {value}")


@command
def sweep(
    name: Model = None,
    option: ModelOption = None,
    text_file: Annotated[Path | None, typer.Option("--text", help="a text to run over")] = None,
    tokens_file: Annotated[Path | None, typer.Option("--tokens", help="token ids: .npy, or text, a row a line")] = None,
    scope: Annotated[SweepScope, typer.Option(help="pairs of heads by what is taken out; heads; layers")] = "path",
    mode: Annotated[Mode, typer.Option(help="what is written instead")] = "zero",
    attention: Annotated[Attention, typer.Option(help="patterns behind what is taken out")] = "frozen",
    metric: Annotated[MetricName, typer.Option(help="what is measured, besides kl")] = "nll",
    against: Annotated[str | None, typer.Option(help="the token that a logit difference is against")] = None,
    top: Annotated[int, typer.Option(min=0, help="ablations to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of sweep.parquet, orders.parquet and pairs.png")] = Path("out"),
    sequences: Annotated[
        int | None, typer.Option(min=1, help="at most so many sequences of the text", show_default=SEQUENCES)
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a sequence; at most the model's positions")] = 512,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="never hold the clean logits")] = False,
) -> None:
    """Term importance order by order, and the ablation of every pair of heads, every head or every layer."""
    if text_file and tokens_file:
        raise ValueError("--text and --tokens: give one of them")
    _check_folder(out)
    model = _named(name, option)
    run = load_model(model, getattr(torch, dtype)).to(_device(backend))
    weights = run if isinstance(run, fc.CircuitWeights) else fc.CircuitWeights.from_model(run)
    shown = text.TokenText(model)
    if tokens_file:
        tokens = text.read_tokens(tokens_file)
    else:
        content = text.read_text(text_file) if text_file else text.held_out_text()
        length = min(length, _positions(run, weights) or length)
        most = sequences or max(1, min(256, PATTERNS // _pattern_bytes(weights, length)))
        tokens = text.sequences_of(shown, content, length, most)
    kind, count = {"head": "heads", "layer": "layers"}.get(scope, "pairs"), count_ablations(weights, scope)
    _say(
        f"{model}: {weights.n_layers} layers, {weights.n_heads} heads, {weights.d_vocab} tokens; "
        f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens; {count} {kind}{' of heads' * (kind == 'pairs')}"
    )
    with _progress(kind, count) as progress:
        found = fc.sweep(
            run,
            tokens.to(weights.device),
            scope,
            mode,
            attention,
            progress=progress,
            metric=metric,
            against=None if against is None else shown.token(against),
            low_memory=low_memory,
            precision=precision,
            backend=backend,
        )
    console.print(show.order_table(found))
    if weights.n_layers:
        console.print(show.marginal_table(found))
    files = write.write_tables(out, {"orders": pa.table(show.order_steps(found)), "sweep": found.result.table()})
    if count:
        console.print(show.effect_table(found.result, found.examples(top), shown))
        files.append(out / f"{kind}.png")
        title = f"{model}: {scope} ablation, {mode}, attention {attention}"
        write.heatmap(found.result, files[-1], title, f"change of the {show.METRIC_NAMES[found.result.metric]}")
        limit = limit_seconds(found)
        share = "" if limit is None else f", {limit / found.seconds:.0%} of this machine's limit"
        _say(f"{count / found.seconds:.1f} {kind}/s of {len(tokens) * (tokens.shape[1] - 1)} tokens each{share}")
    _say_written(files)


@command
def composition(
    name: Model = None,
    option: ModelOption = None,
    kind: Annotated[Kind, typer.Option(help="what of the destination reads: queries, keys or values")] = "K",
    top: Annotated[int, typer.Option(min=0, help="pairs to show")] = 10,
    out: Annotated[Path, typer.Option(help="folder of composition-K.parquet and composition-K.png")] = Path("out"),
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
) -> None:
    """Composition scores of every pair of heads, against a random rotation, with the spectra that go with them.

    Norm gains are in the weights; with layernorms, what is written is centred first.
    """
    _check_folder(out)
    model = _named(name, option)
    weights = _weights(model, dtype, backend)
    weights = fc.center(weights) if weights.norm == "layernorm" else weights
    pairs = fc.enumerate_paths(weights.n_layers, weights.n_heads, 2)
    if not pairs:
        raise ValueError(f"{model} has {weights.n_layers} layers: composition needs two heads in different layers")
    with _progress("pairs", len(pairs)) as progress:
        scores = fc.composition_scores(weights, kind, precision=precision, backend=backend, progress=progress)
    mean = fc.composition_baseline(weights, kind).mean
    z = fc.composition_z_scores(weights, kind, scores)
    score, baseline, z = (x.cpu()[tuple(torch.tensor(pairs).view(-1, 4).mT)] for x in (scores, mean, z))
    found = fc.Result(pairs, z, z.new_zeros(()), "z", {"score": score, "baseline": baseline}, {"kind": kind})
    eigenvalues = fc.composed_eigenvalues(weights, pairs if kind == "K" else []).cpu()
    console.print(show.composition_table(found, eigenvalues, fc.copying_scores(weights).cpu(), top))
    name = f"composition-{kind}"
    files = [*write.write_tables(out, {name: write.composition_columns(found, eigenvalues)}), out / f"{name}.png"]
    label = f"{kind}-composition, standard deviations from a random rotation"
    write.heatmap(found, files[-1], f"{model}: {kind}-composition", label)
    _say_written(files)


@command
def tables(
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
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Bigrams and, with --head, skip-trigrams, of the whole vocabulary or of a source token; how far heads copy."""
    if (head is not None) + all_heads + check > 1:
        raise ValueError("--head, --all-heads and --check: give one of them")
    if source and (all_heads or check):
        raise ValueError("--source goes with --head, or alone")
    if all_heads:
        _check_folder(out)
    model = _named(name, option)
    weights, shown = _weights(model, dtype, backend), text.TokenText(model)
    sources = [shown.token(piece) for piece in source] if source else None
    if check:
        for part in show.validation_tables(weights, shown, backend):
            console.print(part, highlight=False)
    elif all_heads:
        if not weights.n_layers:
            raise ValueError(f"--all-heads: {model} has no heads")
        with _progress("heads", weights.n_layers * weights.n_heads) as progress:
            written = write.head_tables(
                weights, k, shown, normed=normed, offset=offset, backend=backend, progress=progress
            )
        _say_written(write.write_tables(out, written))
    elif head is not None:
        found = fc.skip_trigrams(weights, _head(head), sources, k, normed=normed, offset=offset, backend=backend)
        console.print((show.source_table if sources else show.triple_table)(found, shown))
    elif sources:
        rows = fc.top_per_row(fc.bigrams(weights, normed=normed), k, sources, normalize="center", backend=backend)
        console.print(show.row_table("Bigrams: the direct path", ("token", "raised next"), rows, shown))
    else:
        best = fc.top_entries(fc.bigrams(weights, normed=normed), k, normalize="center", backend=backend)
        title = "Largest bigrams: the direct path, logits less the mean over outputs"
        console.print(show.entry_table(title, ("token", "raised next", "logit"), best, shown))
        if weights.n_layers:
            accuracy = fc.copying_accuracy(weights, backend=backend)
            console.print(show.copying_table(accuracy, fc.copying_scores(weights)))


@command
def heads(
    name: Model = None,
    option: ModelOption = None,
    top: Annotated[int, typer.Option(min=0, help="heads to show")] = 10,
    length: Annotated[int, typer.Option(help="random tokens in one copy")] = 25,
    copies: Annotated[int, typer.Option(help="how often they come")] = 4,
    batch: Annotated[int, typer.Option(help="sequences run at a time")] = 8,
    batches: Annotated[int, typer.Option(help="how many such runs")] = 4,
    seed: Annotated[int, typer.Option(help="of the tokens")] = 0,
    out: Annotated[Path, typer.Option(help="folder of heads.parquet and induction.parquet")] = Path("out"),
    backend: Backend = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Previous-token, induction, prefix-matching, duplicate-token and copying scores of every head.

    On random tokens that repeat, 4 times 25 of them as Olsson et al. 2022 have it; with what the weights say of it.
    """
    _check_folder(out)
    model = _named(name, option)
    run = load_model(model, getattr(torch, dtype)).to(_device(backend))
    start = text.TokenText(model).start or 0
    scores = fc.head_scores(run, length=length, copies=copies, batch=batch, batches=batches, seed=seed, start=start)
    layers, count = scores.values.shape
    if not layers:
        raise ValueError(f"{model} has no heads")
    _say(
        f"{model}: {layers} layers, {count} heads; {batch * batches} sequences of {copies} copies of {length} "
        f"random tokens, behind token {start}"
    )
    found = fc.induction_heads(run, scores, backend=backend) if layers > 1 else None
    console.print(show.head_table(scores, found, top))
    written = {"heads": scores} if found is None else {"heads": scores, "induction": found}
    _say_written(write.write_tables(out, {file: result.table() for file, result in written.items()}))


def _say(line: str) -> None:
    console.print(line, highlight=False)


def _say_written(files: Iterable[Path]) -> None:
    _say(f"written: {', '.join(map(str, files))}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar up to `total`, which the callable that this gives moves on."""
    with bars.Progress(
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(what),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)
        progress.update(task, completed=total)


def _named(name: str | None, option: str | None) -> str:
    if name and option:
        raise ValueError(f"model is given twice, as {name!r} and --model {option!r}: give one of them")
    return name or option or "induction-2l"


def _head(name: str) -> tuple[int, int]:
    layer, dot, head = name.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise ValueError(f"--head is {name!r}, expected LAYER.HEAD, such as 1.4")
    return int(layer), int(head)


def _weights(name: str, dtype: str, backend: str) -> fc.CircuitWeights:
    return fc.load_weights(name).to(getattr(torch, dtype)).to(_device(backend))


def _device(backend: str) -> str:
    on_gpu = backend in ("triton", "cuda") or (backend == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        ops.resolve_backend(backend, torch.device("cuda"))  # raises, and says what is missing
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def _positions(model: Any, weights: fc.CircuitWeights) -> int | None:
    """The number of positions of the model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pattern_bytes(weights: fc.CircuitWeights, length: int) -> int:
    """The size of one sequence's attention patterns."""
    return max(1, weights.n_layers) * weights.n_heads * length**2 * weights.compute_dtype.itemsize


def _check_folder(folder: Path) -> None:
    """Fail before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there ({error.strerror})") from error
