"""`fc.sweep`, the main job: term importance, and the ablation of everything of a kind, over many sequences."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters.tokens import checked_tokens
from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.arguments import public, takes_sharded
from pyfastcircuits.experiments.ablation_value import Mode
from pyfastcircuits.experiments.metrics import metric_spec
from pyfastcircuits.experiments.options import Attention, MeasureOptions, Unpack, measured, measurement
from pyfastcircuits.experiments.orders import LayerMarginals, layer_marginals, order_losses
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops.library import build_info
from pyfastcircuits.processes import ALONE, Processes, everybody
from pyfastcircuits.result import Result
from pyfastcircuits.run.trace import FrozenTrace
from pyfastcircuits.sweeps.corpus import Corpus, Given, Sequences
from pyfastcircuits.sweeps.identity import model_hash, told
from pyfastcircuits.sweeps.moments import Moments
from pyfastcircuits.sweeps.ranking import Ranking
from pyfastcircuits.sweeps.running import Runner
from pyfastcircuits.sweeps.sharing import Sharing
from pyfastcircuits.sweeps.store import Store
from pyfastcircuits.sweeps.work import Split, SweepScope, Work, ablate, experiments, work


@dataclass(frozen=True)
class Example:
    """The position where an ablation does most: the tokens up to it, the token asked about there, and the metric with
    and without the ablation.
    """

    context: list[int]
    target: int
    clean: float
    ablated: float


@dataclass(frozen=True)
class Sweep:
    """The findings of one sweep; see `sweep`.

    Attributes:
        trace: the clean run; of a sweep in chunks that of some of the first sequences.
        loss: the clean loss, in nats.
        orders: [L + 1], the loss with all paths of order at most k, in nats; see order_losses.
        marginals: see layer_marginals; these are of the loss too, whatever the metric.
        result: every ablation. Of a sweep in chunks it is on the CPU, in fp64, and has `standard_error`, that of each
            mean of `delta` over sequences.
        seconds: the time that the ablations took, without the run, orders and marginals; in chunks, the whole time.
        scope, mode, attention, options: what was ablated, and how it was measured.
        sequences: how many sequences were run.
        settled: whether the sweep ended because its ranking was settled; None if it was not asked to.
    """

    trace: FrozenTrace
    loss: Tensor
    orders: Tensor
    marginals: LayerMarginals
    result: Result
    seconds: float
    scope: SweepScope
    mode: Mode
    attention: Attention
    options: MeasureOptions
    sequences: int
    settled: bool | None = None

    @public
    def plot(self) -> Any:
        """Draw what each ablation changes, as `result.plot`; fc.plot.orders draws the losses by order.

        Raises:
            ValueError: the model has nothing to ablate; ImportError: matplotlib is missing.
        """
        if not self.result.labels:
            raise ValueError("result is empty: the model has nothing to ablate")
        return self.result.plot()

    def _repr_html_(self) -> str:
        """The losses by order and what stands out among the ablations, as tables with a picture."""
        from pyfastcircuits.drawing.notebook import card

        rows = [(f"at most {k}", f"{loss:.4g}") for k, loss in enumerate(self.orders.tolist())]
        orders = card("Loss with all paths up to an order", ("order", "loss (nats)"), rows, None)
        return orders + (self.result._repr_html_() if self.result.labels else "")

    @public
    @torch.no_grad()
    def examples(self, n: int, *, context: int = 12, progress: Callable[[float], None] | None = None) -> list[Example]:
        """For each of the n ablations that matter most, the token asked about whose metric it harms most.

        Args:
            n: how many ablations, as `result.top`; they are run once more, position by position.
            context: the most tokens to show, the last at the position measured.
            progress: called with the number of ablations finished since the last call.
        """
        labels = [label for label, _ in self.result.top(n)]
        options: MeasureOptions = {**self.options, "per_token": True, "kl": False}
        options |= {"per_sequence": False, "progress": progress}
        result = ablate(self.trace, self.scope, self.mode, self.attention, options, labels)
        targets = measurement(self.trace, options, self.attention).asked.targets
        harm = -result.delta if result.harm == "fall" else result.delta
        out = []
        for i in range(len(labels)):
            sequence, position = divmod(int(harm[i].nan_to_num(-torch.inf).argmax()), harm.shape[-1])
            before = self.trace.tokens[sequence, max(0, position + 1 - context) : position + 1]
            values = float(result.baseline[sequence, position]), float(result.values[i, sequence, position])
            out.append(Example(before.tolist(), int(targets[sequence, position].flatten()[0]), *values))
        return out


@public
@takes_sharded
@measured
@torch.no_grad()
def sweep(
    model: Any,
    tokens: Tensor | Corpus,
    scope: SweepScope = "path",
    mode: Mode = "zero",
    attention: Attention = "frozen",
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    settle: int | None = None,
    confidence: float = 0.95,
    split: Literal["auto", "none", "sequences", "experiments", "vocabulary"] = "auto",
    **options: "Unpack[MeasureOptions]",
) -> Sweep:
    """Term importance order by order and layer by layer, and the ablation of all heads, layers or pairs of heads.

    This is the "Term importance analysis" of Elhage et al. 2021, and the job of the command `pyfastcircuits sweep`.
    With a Corpus, `out` or `settle` it runs in chunks of some sequences, a few seconds each: then memory does not grow
    with the number of sequences, and means come with standard errors.

    Args:
        model: CircuitWeights or a model of another library, as for trace.
        tokens: [B, T] or [T], or a Corpus.
        scope: "head", "layer", or a scope of pair_ablation: "path", "direct", "edge", "joint".
        mode, attention: as in head_ablation. In chunks, "mean" is the mean over the first sequences, at most 64 of them
            and as many as have 512 MiB of patterns.
        out: the folder in which findings are stored as they come: the effect of each experiment on each sequence in
            Parquet files in `effects/`, and a manifest.json of what they are of.
        resume: go on with the sweep that is in `out`; what is stored is not run again.
        force: delete the sweep that is in `out`.
        settle: end as soon as the `settle` experiments that matter most, and their order, are known; see
            sweeps.ranking, and what it assumes of the sequences.
        confidence: with which they are to be known.
        split: by what the processes of a group share the sweep, where the program has initialised torch.distributed (as
            under torchrun) and all processes make this call: chunks of "sequences" or of "experiments" are dealt out,
            or each process multiplies its own part of the "vocabulary"; "none": each runs it all. "auto" is the fastest
            by `plan`. All processes return the same. Where W_U of CircuitWeights is sharded, of which each process then
            holds its own columns alone, the split is by the vocabulary.

    Returns:
        A Sweep, without gradients; its result has KL(clean || ablated) beside the metric. Orders and marginals are
        losses of the same targets at the same positions, so that "kl" needs targets where the next token is none.
        `progress` hears of the clean run and of orders and marginals too: see count_steps. In chunks it hears of
        sequences.

    Raises:
        ValueError, IndexError, TypeError, RuntimeError: as trace, order_losses, pair_ablation and head_ablation.
        ValueError: `out` holds a sweep, and neither resume nor force is given; the one that is to go on is another, or
            another process is writing there.
        OSError: `out` cannot be written to; what is stored is whole.
        MemoryError: one experiment on one sequence does not fit.
    """
    if out is None and (resume or force):
        raise ValueError(f"out is None, but {'resume' if resume else 'force'} is True: give the folder of the sweep")
    processes = ALONE if split == "none" else everybody()
    if isinstance(model, CircuitWeights) and model.sharded:
        if split not in ("auto", "vocabulary"):
            raise ValueError(
                f"split is {split!r}, but W_U of model is sharded, of which each process has its own columns: expected "
                "'vocabulary' or 'auto'"
            )
        split, processes = "vocabulary", model.holders
    if split not in ("auto", "none") and processes is ALONE:
        raise ValueError(f"split is {split!r}, but there is one process: start several, as torchrun does")
    if isinstance(tokens, Corpus) or out is not None or settle is not None or processes is not ALONE:
        place = None if out is None else Path(out)
        return _in_chunks(
            model,
            tokens,
            (scope, mode, attention),
            options,
            place,
            (resume, force),
            (settle, confidence),
            (split, processes),
        )
    run = trace(model, tokens)
    progress = options.get("progress")
    if progress is not None:
        progress(1)
    metric = metric_spec(options.get("metric", "nll"), options.get("targets"), options.get("against"))
    asked: dict[str, Any] = {name: options[name] for name in ("positions", "backend", "progress") if name in options}
    orders = order_losses(run, targets=metric.targets, **asked)
    marginals = layer_marginals(run, targets=metric.targets, **asked)
    start = time.perf_counter()
    result = ablate(run, scope, mode, attention, {"kl": True, **options}, None)
    if run.tokens.device.type == "cuda":
        torch.cuda.synchronize(run.tokens.device)
    seconds = time.perf_counter() - start
    loss = run.loss if run.weights.d_vocab_out == run.weights.d_vocab else orders[-1]
    return Sweep(run, loss, orders, marginals, result, seconds, scope, mode, attention, options, len(run.tokens))


def _in_chunks(
    model: Any,
    tokens: Tensor | Corpus,
    what: tuple[SweepScope, Mode, Attention],
    options: MeasureOptions,
    out: Path | None,
    there: tuple[bool, bool],
    until: tuple[int | None, float],
    shared: tuple[Split | Literal["auto"], Processes],
) -> Sweep:
    """See `sweep`."""
    scope, mode, attention = what
    (resume, force), (settle, confidence) = there, until
    if settle is not None and settle < 1:
        raise ValueError(f"settle is {settle}, expected at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    weights = model if isinstance(model, CircuitWeights) else CircuitWeights.from_model(model)
    source = _sequences(weights, tokens, options)
    made = work(model, weights, scope, mode, attention, options, source)
    sharing = Sharing.of(made, source, shared[1], shared[0])
    cut = sharing.cut(made.cut(source.length), source.count, len(made.labels))
    progress = options.get("progress") or (lambda steps: None)
    runner = Runner(
        made, source, progress, lambda text: warnings.warn(text, stacklevel=2), cut, sharing.dealt, sharing.writes
    )
    ranking = None
    if settle is not None:
        ranking = Ranking(settle, confidence, len(made.labels), -1 if made.metric.harm == "fall" else 1)
    start = time.perf_counter()
    if out is None:
        with sharing.vocabulary:
            total = runner.run(cut, None, ranking)
    else:
        identity = {
            "model_sha256": model_hash(made.first), "tokens": source.fingerprint, "length": source.length,
            "scope": scope, "mode": mode, "attention": attention, "metric": made.metric.name,
            "options": told({**vars(made.metric), **made.options}), "version": build_info()["version"],
        }  # fmt: skip

        def opened(leader: bool) -> Store:
            return Store(out, identity, cut, made.labels, resume=resume, force=force, leader=leader)

        with sharing.opened(opened) as store:
            if store.torn:
                runner.warn(f"out: {len(store.torn)} of its files are not what was written; their chunks run again")
            runner.most = store.cut
            with sharing.vocabulary:
                total = runner.run(store.cut, store, ranking)
    seconds = time.perf_counter() - start
    settled = None if ranking is None else ranking.settled
    return _told(made, total, options, seconds, settled)


def _sequences(weights: CircuitWeights, tokens: Tensor | Corpus, options: MeasureOptions) -> Sequences:
    """The sequences of a sweep in chunks, with what is asked about each of them checked."""
    for name in ("per_token", "per_sequence"):
        if options.get(name):
            raise ValueError(f"{name} is True, but in chunks a sweep gives means; `out` stores those of each sequence")
    given = Given(checked_tokens(weights, tokens)) if isinstance(tokens, Tensor) else tokens
    metric = metric_spec(options.get("metric", "nll"), options.get("targets"), options.get("against"))
    asked = {"positions": options.get("positions"), "targets": metric.targets, "against": metric.against}
    for name, value in asked.items():
        each = isinstance(value, Tensor) and value.dim() > (name == "positions")
        if isinstance(value, Tensor) and each and (given.count != len(value) or isinstance(given, Corpus)):
            raise ValueError(f"{name} has shape {list(value.shape)}, but there are {given.count} sequences in `tokens`")
    return given


def _told(work: Work, total: Moments, options: MeasureOptions, seconds: float, settled: bool | None) -> Sweep:
    """What the sums over sequences tell, in the order of `experiments`."""
    weights, name = work.weights, work.metric.name
    labels = experiments(weights, work.scope)
    place = {label: i for i, label in enumerate(work.labels)}
    order = torch.tensor([place[label] for label in labels], dtype=torch.long)
    shape = (weights.n_layers, weights.n_heads) if work.scope == "head" else (len(labels),)
    extra = {} if name == "kl" else {"kl": total.mean("kl")[order].view(shape)}
    extra["standard_error"] = total.standard_error(name)[order].view(shape)
    delta = total.mean(name)[order].view(shape)
    count = int(total.sequences.max()) if labels else 0
    pairs = {"scope": work.scope} if work.scope not in ("head", "layer") else {}
    setup = {**pairs, "mode": work.mode, "attention": work.attention, "sequences": count}
    values = total.baseline + delta
    result = Result(labels, values, total.baseline, name, extra, setup, work.metric.harm, delta)
    layers = weights.n_layers
    loss, orders, *marginals = total.mean_losses.split([1, layers + 1, layers, layers])
    here = slice(0, len(work.first.tokens))
    shown: MeasureOptions = {**options, "metric": work.metric_of(here), "targets": None, "against": None}
    if positions := work.positions_of(here):
        shown["positions"] = positions["positions"]
    return Sweep(
        work.first, loss[0], orders, LayerMarginals(*marginals), result, seconds, work.scope, work.mode,
        work.attention, shown, count, settled,
    )  # fmt: skip


def count_steps(weights: CircuitWeights, scope: SweepScope) -> dict[str, int]:
    """What the progress of a sweep adds up to, by phase: each loss over all sequences is a step, and so is the run.

    Ablations are of layers, of heads, of all pairs of heads or of those in two layers.
    """
    return {"clean run": 1, "orders": 3 * weights.n_layers + 3, "ablations": len(experiments(weights, scope))}
