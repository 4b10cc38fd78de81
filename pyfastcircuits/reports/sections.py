"""The sections of a report: what each one shows, as data for the page, and in a sentence for who does not see it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.circuits.composition import composition_scores
from pyfastcircuits.circuits.composition_baseline import composition_baseline, composition_z_scores
from pyfastcircuits.circuits.spectra import circuit_eigenvalues, positivity
from pyfastcircuits.experiments.ablation import pair_ablation
from pyfastcircuits.experiments.attribution import direct_logit_attribution
from pyfastcircuits.experiments.heads import head_scores
from pyfastcircuits.experiments.orders import ARTICLE_MARGINALS, ARTICLE_ORDERS, layer_marginals, order_losses
from pyfastcircuits.reports.pack import halves, rounded, shares
from pyfastcircuits.reports.study import Study
from pyfastcircuits.reports.vocabulary import virtual_heads
from pyfastcircuits.result import label_name
from pyfastcircuits.run.nodes import KINDS
from pyfastcircuits.run.trace import FrozenTrace

EFFECTS = 300_000  # per-token effects of pairs
PATTERNS = 600_000  # entries of attention patterns
REPEATED = 16  # heads whose pattern over repeated random tokens is shown


class Section(NamedTuple):
    """What a section shows.

    Attributes:
        data: for the page; None where the section does not apply.
        said: what there is to see, in words; or why there is nothing.
    """

    data: Any
    said: str


def orders(study: Study) -> Section:
    """Term importance: the loss with all paths up to each order, and what the heads of each layer add."""
    run, layers = study.run, study.weights.n_layers
    losses = order_losses(run, backend=study.backend)
    marginals = layer_marginals(run, backend=study.backend)
    study.progress(3 * layers + 3)
    uniform = float(torch.tensor(float(study.weights.d_vocab_out)).log())
    alike = layers == 2  # as the model whose figures the article gives
    data = {
        "uniform": uniform,
        "losses": rounded(losses),
        "full": float(f"{float(run.loss):.6g}"),
        "article": list(ARTICLE_ORDERS) if alike else None,
        "marginals": [rounded(x) for x in marginals],
        "article_marginals": [list(x) for x in ARTICLE_MARGINALS] if alike else None,
    }
    steps = ", ".join(f"{x:.3f}" for x in losses.tolist())
    said = f"The loss is {uniform:.3f} nats for a uniform guess and, with all paths up to each order from 0, {steps}."
    return Section(data, said)


def pairs(study: Study) -> Section:
    """The ablation of the path through every pair of heads, and what it does to each token of the text."""
    if not study.pairs:
        return Section(None, _too_few_layers(study, "no path goes through two heads"))
    found = pair_ablation(
        study.run, "path", pairs=study.pairs, kl=True, per_token=True, backend=study.backend, progress=study.progress
    )
    places = found.baseline.numel()
    rise, kl = found.means(), found.kl.double().reshape(len(study.pairs), -1).nanmean(-1).clamp_min(0)
    kept = rise.abs().argsort(descending=True, stable=True)[: max(1, EFFECTS // places)]
    if len(kept) < len(study.pairs):
        study.cuts.append(
            f"Effects on single tokens are kept of the {len(kept)} pairs of heads that matter most, of "
            f"{len(study.pairs)}."
        )
    effects = found.delta[kept.to(found.delta.device)]
    data = {
        "rise": halves(rise),
        "kl": halves(kl),
        "kept": kept.tolist(),
        "effects": halves(effects),
        "clean": halves(found.baseline),
    }
    best = ", ".join(f"{_pair_name(label)} ({change:+.3g})" for label, change in found.top(3))
    return Section(data, f"Without its path the loss rises most for {best}, in nats.")


def composition(study: Study) -> Section:
    """Composition scores by queries, keys and values, beside what a random rotation gives; and virtual heads."""
    if not study.pairs:
        return Section(None, _too_few_layers(study, "no head reads what another wrote"))
    weights, data, said = study.centered, {}, []
    sources, destinations = sorted({pair[0] for pair in study.pairs}), sorted({pair[1] for pair in study.pairs})
    rows, columns = ({head: i for i, head in enumerate(side)} for side in (sources, destinations))
    at = [rows[pair[0]] for pair in study.pairs], [columns[pair[1]] for pair in study.pairs]
    for kind in KINDS:
        scores = composition_scores(weights, kind, sources=sources, destinations=destinations, backend=study.backend)
        z = composition_z_scores(weights, kind, scores, sources=sources, destinations=destinations)
        mean = composition_baseline(weights, kind, sources=sources, destinations=destinations).mean
        data[kind] = {"score": halves(scores[at]), "random": halves(mean[at]), "z": halves(z[at])}
        best = int(z[at].argmax())
        said.append(f"{kind}: {_pair_name(study.pairs[best])} (z = {float(z[at][best]):.3g})")
        study.progress(1)
    return Section(
        {**data, "virtual": virtual_heads(study)}, f"The pairs that stand out most compose by {'; by '.join(said)}."
    )


def spectra(study: Study) -> Section:
    """The eigenvalues of every head's OV and QK circuit over the vocabulary, and what they say of copying."""
    if not study.heads:
        return Section(None, "The model has no heads, and so no OV and QK circuits.")
    data: dict[str, Any] = {}
    for circuit in ("OV", "QK"):
        values = study.picked(circuit_eigenvalues(study.centered, circuit))
        order = values.abs().argsort(-1, descending=True)
        values = values.gather(-1, order)
        data[circuit] = {"real": halves(values.real), "imaginary": halves(values.imag)}
        data[f"{circuit} positivity"] = rounded(positivity(values))
    study.progress(1)
    best = max(range(len(study.heads)), key=data["OV positivity"].__getitem__)
    copying = sum(score > 0.5 for score in data["OV positivity"])
    return Section(
        data,
        f"{copying} of {len(study.heads)} heads have a copying score above 0.5; the largest is that of head "
        f"{study.names[best]}, {data['OV positivity'][best]:.3g}.",
    )


def attention(study: Study) -> Section:
    """The attention patterns of every shown head over the text, and over random tokens that come twice."""
    if not study.heads:
        return Section(None, "The model has no heads, and so no attention patterns.")
    sequences, length = study.run.tokens.shape
    size = len(study.heads) * length * (length + 1) // 2
    kept = min(sequences, max(1, PATTERNS // size))
    if kept < sequences:
        study.cuts.append(f"Attention patterns are kept of the first {kept} of {sequences} sequences.")
    data: dict[str, Any] = {"text": _patterns(study, study.run[:kept], list(range(len(study.heads))))}
    said = "Every head's attention pattern is shown over the text."
    if study.repeated is not None:
        scores = _induction(study.repeated)
        order = study.picked(scores).argsort(descending=True, stable=True)[:REPEATED].tolist()
        data["repeated"] = _patterns(study, study.repeated, order) | {"copy": study.copy_length}
        best = order[0]
        said += (
            f" Over random tokens that come twice, head {study.names[best]} looks most at the token behind the "
            f"earlier occurrence: {float(scores[study.heads[best]]):.2f} of its attention."
        )
    study.progress(1)
    return Section(data, said)


def _induction(run: FrozenTrace) -> Tensor:
    """The attention [L, H] from the second copy to the token behind the first occurrence, in one sequence."""
    length = (run.tokens.shape[1] - 1) // 2
    at = torch.arange(length + 1, 2 * length + 1, device=run.tokens.device)
    layers = range(run.weights.n_layers)
    return torch.stack([run.pattern(layer)[0][:, at, at - length + 1].mean(-1) for layer in layers])


def _patterns(study: Study, run: FrozenTrace, shown: list[int]) -> dict[str, Any]:
    """The patterns [S, n, T (T + 1) / 2] of some of the shown heads and the lengths of their values [S, n, T]."""
    length = run.tokens.shape[1]
    rows, columns = torch.tril_indices(length, length)
    layers, values = range(run.weights.n_layers), []
    for layer in layers:
        read = run.read_by_values(run.streams[layer], layer)
        own = torch.einsum("btd,hdr->bhtr", read, run.weights.heads("W_V", layer))
        bias = run.weights.bias("V", layer)
        if bias is not None:
            own = own + bias.repeat_interleave(own.shape[1] // len(bias), 0)[:, None]
        values.append(own.norm(dim=-1))
    heads = [study.heads[i] for i in shown]
    patterns = torch.stack([run.pattern(layer)[:, head][:, rows, columns] for layer, head in heads], 1)
    norms = torch.stack([values[layer][:, head] for layer, head in heads], 1)
    tokens = study.pieces(run.tokens)
    return {"heads": shown, "patterns": shares(patterns), "values": halves(norms), "tokens": tokens}


def scores(study: Study) -> Section:
    """Scores of known kinds of heads, on random tokens that repeat, beside copying and ablation."""
    if not study.heads:
        return Section(None, "The model has no heads.")
    if study.copy_length is None:
        return Section(None, "The model has too few tokens or positions for random tokens that come twice.")
    found = head_scores(
        study.model,
        length=study.copy_length,
        batches=2,
        start=study.start,
        weights=study.weights,
        progress=lambda done: study.progress(done / 16),
    )
    names = ("induction", "previous_token", "prefix_matching", "duplicate_token", "copying")
    columns = {name: rounded(study.picked(getattr(found, name))) for name in names}
    columns["ablated"] = rounded(study.picked(study.ablated.delta))
    best = max(range(len(study.heads)), key=columns["induction"].__getitem__)
    return Section(
        {"columns": columns, "setup": dict(found.setup)},
        f"The largest induction score is that of head {study.names[best]}, {columns['induction'][best]:.3g}.",
    )


def attribution(study: Study) -> Section:
    """Direct logit attribution of every token of the text, component by component."""
    found = direct_logit_attribution(study.run, "component", center=True, per_token=True)
    values = found.values
    labels = [label_name(label) for label in found.labels]
    size = values.nan_to_num().abs().flatten(1).amax(-1)
    writes = size > 1e-5 * size.max()  # a layer without biases adds nothing of its own, but for rounding
    if writes.any():
        labels, values = [labels[i] for i in writes.nonzero()[:, 0].tolist()], values[writes]
    most = max(3, EFFECTS // found.baseline.numel())
    if len(labels) > most:
        study.cuts.append(f"Direct logit attribution shows the {most} of {len(labels)} components that write most.")
        mean = values.double().abs().flatten(1).nanmean(-1)
        kept = mean.argsort(descending=True, stable=True)[: most - 1].sort().values
        rest = values.sum(0) - values[kept].sum(0)
        labels, values = [*(labels[i] for i in kept.tolist()), "all others"], torch.cat((values[kept], rest[None]))
    study.progress(1)
    mean = values.double().abs().flatten(1).nanmean(-1)
    said = f"On average, component {labels[int(mean.argmax())]} changes the logit of the next token most."
    return Section({"labels": labels, "values": halves(values)}, said)


def _pair_name(pair: Any) -> str:
    return " → ".join(label_name(tuple(head)) for head in pair)


def _too_few_layers(study: Study, so: str) -> str:
    layers = study.weights.n_layers
    return f"The model has {layers} layer{'' if layers == 1 else 's'} of attention heads: {so}."
