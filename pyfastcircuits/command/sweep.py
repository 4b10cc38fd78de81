"""The command `sweep`: term importance, and the ablation of every pair of heads, head or layer."""

from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import pyfastcircuits as fc
from pyfastcircuits.command import options, show, text, write
from pyfastcircuits.command.app import RUNS, command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import (
    HOW,
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
from pyfastcircuits.experiments.sweep import SweepScope, count_steps

PATTERNS = 4 << 30  # bytes of attention patterns that a sweep of a text keeps, unless --sequences says otherwise
LENGTH = 512
SCOPES = (
    "what is taken out. Of a pair of heads: the one path through both (path), all that the first writes through the "
    "second (direct), every path with that step (edge), or both heads (joint); one head; a layer's heads"
)
MODES = "what stands in its place: nothing (zero), its mean over the text, or what it was in another sequence"
PATTERNS_BEHIND = "attention patterns behind what is taken out: as they were, as the article has it, or computed again"
SEQUENCES = "of a text 256, or as many as have 4 GiB of attention patterns; all of --tokens"


@command(task=RUNS, example="pyfastcircuits sweep induction-2l --top 5")
def sweep(
    report: Report,
    name: Model = None,
    option: ModelOption = None,
    text_file: TextFile = None,
    tokens_file: TokensFile = None,
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
    force: Force = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1, help="at most so many sequences, evenly spaced", show_default=SEQUENCES, rich_help_panel=READS
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="at most so many tokens in a sequence",
            show_default=f"of a text {LENGTH}; all of --tokens",
            rich_help_panel=READS,
        ),
    ] = None,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "ieee",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="never hold logits of all tokens at once", rich_help_panel=HOW)
    ] = False,
) -> None:
    """Run a text, and take out the path through every pair of heads, every head or every layer: what gets worse?

    First comes the article's term importance: the loss with all paths up to each order, and what each layer's heads
    add. Then every ablation, ranked, each with the token that it hits hardest. It writes orders.parquet, sweep.parquet,
    and pairs.png, heads.png or layers.png.
    """
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
            paths.append(write.picture(found.result.plot(title=title), out / files[-1], made))
            bar.advance()
            report.line(f"{count / found.seconds:.1f} {kind}/s of {len(tokens) * (tokens.shape[1] - 1)} tokens each")
    marginals = {name: x.tolist() for name, x in found.marginals._asdict().items()}
    report.found({"marginals": marginals, "examples": write.example_records(found, examples, shown)})
    end(report, made, written, paths)


def _positions(model: Any, weights: fc.CircuitWeights) -> int | None:
    """The number of positions of the model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pattern_bytes(weights: fc.CircuitWeights, length: int) -> int:
    """The size of one sequence's attention patterns."""
    return max(1, weights.n_layers) * weights.n_heads * length**2 * weights.compute_dtype.itemsize
