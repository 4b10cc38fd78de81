"""The command `sweep`: term importance, and the ablation of every pair of heads, head or layer."""

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import pyfastcircuits as fc
from pyfastcircuits import processes as group
from pyfastcircuits.adapters import texts
from pyfastcircuits.command import options, processes, show, text, write
from pyfastcircuits.command.app import RUNS, command, end
from pyfastcircuits.command.guard import Failed
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import (
    GIVES,
    READS,
    Backend,
    Dtype,
    Force,
    Model,
    ModelOption,
    Out,
    Precision,
    TextFile,
    TokensFile,
    Top,
)
from pyfastcircuits.command.report import Report
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import MetricName
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.sweeps import sharing
from pyfastcircuits.sweeps.corpus import Given, Sequences, TokenType
from pyfastcircuits.sweeps.store import StoreError
from pyfastcircuits.sweeps.work import SweepScope, experiments

SEQUENCES, LENGTH = 256, 512
SHORT = 1 << 16  # tokens of a vocabulary whose ids a .bin holds in two bytes
SCOPES = (
    "what is taken out. Of a pair of heads: the one path through both (path), all that the first writes through the "
    "second (direct), every path with that step (edge), or both heads (joint); one head; a layer's heads"
)
MODES = "what stands in its place: nothing (zero), its mean over the text, or what it was in another sequence"
PATTERNS_BEHIND = "attention patterns behind what is taken out: as they were, as the article has it, or computed again"
CORPUS = "a corpus of any size in their place: text, .jsonl, .parquet, .npy, .bin, a folder of one kind or a data set"


@command(task=RUNS, example="pyfastcircuits sweep induction-2l --top 5")
def sweep(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    text_file: TextFile = None,
    tokens_file: TokensFile = None,
    corpus: Annotated[Path | None, typer.Option(help=CORPUS, rich_help_panel=READS)] = None,
    column: Annotated[
        str | None,
        typer.Option(help="the column of --corpus", show_default="input_ids, tokens or text", rich_help_panel=READS),
    ] = None,
    scope: Annotated[SweepScope, typer.Option(help=SCOPES)] = "path",
    mode: Annotated[Mode, typer.Option(help=MODES)] = "zero",
    attention: Annotated[Attention, typer.Option(help=PATTERNS_BEHIND)] = "frozen",
    metric: Annotated[
        MetricName, typer.Option(help="what is measured at each token, beside KL(clean || ablated)")
    ] = "nll",
    against: Annotated[
        str | None, typer.Option(help="of --metric logit_difference: the token that the next one is compared with")
    ] = None,
    top: Top = 10,
    out: Out = Path("out"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on with the sweep that --out holds, if there is one", rich_help_panel=GIVES),
    ] = False,
    force: Force = False,
    settle: Annotated[
        int | None, typer.Option(min=1, help="end as soon as so many that matter most, and their order, are known")
    ] = None,
    confidence: Annotated[float, typer.Option(help="with which --settle knows them")] = 0.95,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=options.MOST,
            show_default=f"of a text {SEQUENCES}; all of --tokens and --corpus",
            rich_help_panel=READS,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=options.LONGEST,
            show_default=f"{LENGTH}; all of --tokens",
            rich_help_panel=READS,
        ),
    ] = None,
    split: options.Split = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
    low_memory: options.LowMemory = False,
) -> None:
    """Run a text, and take out the path through every pair of heads, every head or every layer: what gets worse?

    First comes the article's term importance: the loss with all paths up to each order, and what each layer's heads
    add. Then every ablation, ranked, each with the token that it hits hardest. It writes orders.parquet, sweep.parquet,
    and pairs.png, heads.png or layers.png; and as it runs, what it finds on each sequence (effects/, manifest.json).
    """
    sources = {"--text": text_file, "--tokens": tokens_file, "--corpus": corpus}
    given = [option for option, file in sources.items() if file]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    model, device = options.named(name, option), options.device_of(backend, precision, dtype)
    check_folder(out)
    resume = resume or processes.restarted()
    with processes.group(device), report.bar as bar:
        run, weights = options.model_of(model, dtype, device)
        shown = texts.TokenText(model)
        size = min(length or LENGTH, _positions(run, weights) or LENGTH)
        source: Sequences
        if corpus:
            width: TokenType = "uint16" if weights.d_vocab <= SHORT else "uint32"
            tokenizer = None if shown.tokenizer is None else model
            source = fc.corpus(corpus, size, tokenizer=tokenizer, column=column, dtype=width, sequences=sequences)
        elif tokens_file:
            tokens = text.read_tokens(tokens_file, weights.d_vocab)[:, :length]
            source = Given(texts.evenly(tokens, sequences or len(tokens)))
        else:
            content = text.read_text(text_file) if text_file else texts.held_out_text()
            source = Given(texts.sequences_of(shown, content, size, sequences or SEQUENCES))
            unknown = texts.check_known(source.tokens, shown, weights.d_vocab)
            if unknown > 0.01:
                report.warn(f"--text: {unknown:.0%} of its tokens are unknown to the model's tokenizer")
        against_token = None if against is None else options.token_of("--against", against, shown, weights)
        kind = {"head": "heads", "layer": "layers"}.get(scope, "pairs")
        count, there = len(experiments(weights, scope)), source.count
        files = ["orders.parquet", "sweep.parquet", *[f"{kind}.png"] * (count > 0)]
        made = made_by(
            "sweep",
            model,
            {
                "scope": scope, "mode": mode, "attention": attention, "metric": metric, "against": against_token,
                "backend": backend, "dtype": dtype, "precision": precision, "low_memory": low_memory,
            },
            source.fingerprint,
            str(corpus or tokens_file or text_file or "held-out files of the standard library"),
        )  # fmt: skip
        check_files(out, files, made, force=force)
        report.line(
            f"{model}: {weights.n_layers} layers, {weights.n_heads} heads, {weights.d_vocab} tokens; "
            f"{'' if there is None else f'{there} '}sequences of {source.length} tokens; "
            f"{count} {kind}{' of heads' * (kind == 'pairs')}"
        )
        everybody = group.everybody()
        if everybody is not group.ALONE and split == "auto":
            split = sharing.fastest(weights, (scope, mode, attention), source, everybody, low_memory=low_memory)
        if everybody is not group.ALONE and split == "vocabulary" and run is weights:
            run = weights = sharing.sharded(weights)
        report.going_on = _going_on()
        bar.plan({"sequences": math.inf if there is None else there})
        try:
            found = fc.sweep(
                run,
                source.tokens.to(weights.device) if isinstance(source, Given) else source,
                scope,
                mode,
                attention,
                out=out,
                resume=resume,
                force=force,
                settle=settle,
                confidence=confidence,
                split=split,
                progress=bar.advance,
                metric=metric,
                against=against_token,
                low_memory=low_memory,
                precision=precision,
                backend=backend,
            )
        except StoreError as error:
            raise Failed(f"--{error}") from error
        report.going_on = ""
        if processes.rank():
            if weights.sharded and count:
                found.examples(top)  # of which each process has a part
            return
        bar.plan({"examples": min(top, count), "writing": len(files)})
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
            paths.append(write.picture(found.result.plot(title=title), out / files[-1], made))
            bar.advance()
        if settle is not None:
            state = "is settled" if found.settled else "is not settled"
            report.line(f"the ranking of the first {settle} {state} after {found.sequences} sequences")
        if count and not resume:
            each = found.sequences * (source.length - 1)
            report.line(f"{count / found.seconds:.1f} {kind}/s of {each} tokens each")
    marginals = {name: x.tolist() for name, x in found.marginals._asdict().items()}
    report.found({"marginals": marginals, "examples": write.example_records(found, examples, shown)})
    report.found({"sequences": found.sequences, "settled": found.settled})
    end(report, made, written, paths)


def _positions(model: Any, weights: fc.CircuitWeights) -> int | None:
    """The number of positions of the model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _going_on() -> str:
    """The command line that goes on with this run."""
    given = [word for word in sys.argv[1:] if word not in ("--force", "--resume")]
    return shlex.join(["pyfastcircuits", *given, "--resume"])
