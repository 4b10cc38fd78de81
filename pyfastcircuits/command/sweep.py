"""The command `sweep`: term importance, and the ablation of every pair of heads, head or layer."""

from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import pyfastcircuits as fc
from pyfastcircuits.command import options, show, text, write
from pyfastcircuits.command.app import command, end
from pyfastcircuits.command.made import check_files, check_folder, made_by
from pyfastcircuits.command.options import Backend, Dtype, Force, Model, ModelOption, Precision
from pyfastcircuits.command.report import Report
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import MetricName
from pyfastcircuits.experiments.options import Attention
from pyfastcircuits.sweeps.sweep import count_steps
from pyfastcircuits.sweeps.work import SweepScope

PATTERNS = 4 << 30  # bytes of attention patterns that a sweep of a text keeps, unless --sequences says otherwise
LENGTH = 512
SEQUENCES = "of a text 256, or as many as have 4 GiB of attention patterns; all of --tokens"


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
    end(report, made, written, paths)


def _positions(model: Any, weights: fc.CircuitWeights) -> int | None:
    """The number of positions of the model; None where nothing says it."""
    return weights.n_ctx or getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pattern_bytes(weights: fc.CircuitWeights, length: int) -> int:
    """The size of one sequence's attention patterns."""
    return max(1, weights.n_layers) * weights.n_heads * length**2 * weights.compute_dtype.itemsize
