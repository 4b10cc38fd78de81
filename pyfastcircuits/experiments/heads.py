"""Detectors of known heads: their attention where tokens repeat, and whether their weights say the same."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfastcircuits.adapters.start import start_of
from pyfastcircuits.adapters.tokens import checked_tokens
from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.arguments import public
from pyfastcircuits.circuits.composition import composition_scores
from pyfastcircuits.circuits.composition_baseline import composition_z_scores
from pyfastcircuits.circuits.spectra import composed_eigenvalues, copying_scores, positivity
from pyfastcircuits.model.folding import center
from pyfastcircuits.model.norms import final_norm_gain
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops import Backend
from pyfastcircuits.result import Result
from pyfastcircuits.run.nodes import Head
from pyfastcircuits.run.trace import FrozenTrace

ATTENTION = ("induction", "previous_token", "prefix_matching", "duplicate_token")


@public
@torch.no_grad()
def head_scores(
    model: Any,
    *,
    length: int = 50,
    copies: int = 2,
    batch: int = 8,
    batches: int = 4,
    seed: int = 0,
    start: int | None = None,
    tokens: Tensor | None = None,
    weights: CircuitWeights | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Score every head on random tokens that come again, by what it attends to and copies: five scores, [L, H] each.

    Each of the first four is a mean over sequences and over the positions where it can be told, of the attention from
    there:

    - `previous_token`: to the position before. From every position but the first.
    - `induction`: to the token that followed the same token's first occurrence. From every second occurrence: in the
      second copy, the diagonal `length - 1` behind.
    - `prefix_matching`: to all tokens that followed an earlier occurrence. From every occurrence but the first. With
      two copies it is `induction`.
    - `duplicate_token`: to all earlier occurrences themselves. From every occurrence but the first.

    `copying`, from -1 to 1, is about values: of all that a head raises, how much is the token it attends to? What each
    source adds to the logits through the head's OV circuit, under the frozen norms and weighted by the attention paid
    to it, is taken for the different tokens of the sequence; less their mean, and only where that is positive. 1 if
    all of it is raised for the source's own token, -1 if nothing is, 2 / N - 1 if it is spread evenly over N tokens.
    `fc.copying_scores` asks the weights instead, for all tokens of the vocabulary alike: whether eigenvalues of the
    whole OV circuit are positive, which counts what is lowered too and knows nothing of norms and other layers.
    Of a model that predicts other tokens than it reads, there is no such score.

    Args:
        model: CircuitWeights, or a model of another library that `trace` takes.
        length: random tokens in one copy, drawn without repetition where the vocabulary has enough; all but `start`.
        copies: how often they come. Olsson et al. take 4 copies of 25 tokens.
        batch: sequences run at a time. Memory is that of one run's patterns.
        batches: how many such runs.
        seed: of the tokens.
        start: the token in front of each sequence, at whose position heads rest. None: the model's own start token
            (BOS), which TransformerLens prepends or a Hugging Face configuration names; else 0, [START] of the bundled
            models.
        tokens: [B, T] or [T]: sequences of one's own, instead of all these but `batch`.
        weights: what `CircuitWeights.from_model(model)` returned before; None reads them, once for all runs.
        progress: called with the number of sequences finished since the last call.

    Returns:
        Of all heads, in the weights' computing dtype; `.values` is the induction score, the baseline 0. Scores that
        need repeated tokens are NaN where `tokens` repeat nothing, and `copying` is NaN for a head that raises nothing.

    Raises:
        TypeError: a model or tokens of another type.
        ValueError: a length or copies below 2, a batch or batches below 1, more tokens than the model has positions;
            else as `trace`.
        IndexError: a start or tokens outside [0, V).

    Source: "In-context Learning and Induction Heads", Olsson et al. 2022 (head activation evaluators); Elhage et al.
    2021.
    """
    weights = _weights_of(model, weights)
    for name, value in (("length", length), ("copies", copies), ("batch", batch), ("batches", batches)):
        least = 1 if name.startswith("batch") else 2
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if tokens is None:
        if start is None:
            start = start_of(model, weights.d_vocab) or 0
        parts = _drawn(weights, length, copies, batch, batches, seed, start)
        setup: dict[str, str | int | float] = {"length": length, "copies": copies, "seed": seed, "start": start}
        setup["sequences"] = batch * batches
    else:
        rows = checked_tokens(weights, tokens)
        parts = iter(rows.split(batch))
        setup = {"tokens": "given", "sequences": len(rows)}
    shape, copies_tokens = (weights.n_layers, weights.n_heads), weights.d_vocab_out == weights.d_vocab
    names = (*ATTENTION, "copying") if copies_tokens else ATTENTION
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=weights.device) for name in names}
    counts = {name: torch.zeros_like(total) for name, total in sums.items()}
    for part in parts:
        _add(trace(model, part, weights=weights), sums, counts)
        if progress is not None:
            progress(len(part))
    means = {name: (sums[name] / counts[name]).to(weights.compute_dtype) for name in names}
    if copies_tokens:
        means["copying"] = 2 * means["copying"] - 1
    labels = [Head(layer, head).label for layer in range(shape[0]) for head in range(shape[1])]
    induction = means.pop("induction")
    return Result(labels, induction, induction.new_zeros(()), "induction", means, setup)


def _weights_of(model: Any, weights: CircuitWeights | None) -> CircuitWeights:
    if isinstance(model, CircuitWeights):
        if weights is not None and weights is not model:
            raise ValueError("weights is given, but the model is a CircuitWeights itself: give one of them")
        return model
    return CircuitWeights.from_model(model) if weights is None else weights


def _drawn(
    weights: CircuitWeights, length: int, copies: int, batch: int, batches: int, seed: int, start: int
) -> Iterator[Tensor]:
    """Batches [batch, 1 + length * copies] of the start and copies of random tokens; errors as head_scores."""
    if not 0 <= start < weights.d_vocab:
        raise IndexError(f"start is {start}, expected 0 to {weights.d_vocab - 1}")
    total = 1 + length * copies
    if weights.n_ctx is not None and total > weights.n_ctx:
        raise ValueError(
            f"length is {length}, {copies} copies and the token in front are {total}, but W_pos has only "
            f"{weights.n_ctx} positions"
        )
    if weights.d_vocab == 1:
        raise ValueError("weights has a vocabulary of 1 token: no random token differs from the start; give tokens")
    generator = torch.Generator().manual_seed(seed)
    others = torch.ones(batch, weights.d_vocab)
    others[:, start] = 0
    for _ in range(batches):
        copy = torch.multinomial(others, length, replacement=length >= weights.d_vocab, generator=generator)
        front = torch.full((batch, 1), start)
        yield torch.cat((front, copy.repeat(1, copies)), 1).to(weights.device)


class _Places(NamedTuple):
    """Entries of the patterns that a score sums, and how many destinations it is the mean over."""

    sequence: Tensor  # [N]
    destination: Tensor  # [N]
    source: Tensor  # [N]
    destinations: int


def _places(tokens: Tensor) -> dict[str, _Places]:
    """The places in the patterns where each score of ATTENTION looks, for tokens [B, T]."""
    same = (tokens[:, :, None] == tokens[:, None]).tril(-1)
    before = same.sum(-1)  # [B, T]: how often the token has come before
    sequence, destination, source = same.nonzero(as_tuple=True)
    second = before[sequence, destination] == 1
    repeated, every = int((before > 0).sum()), torch.ones_like(before[:, 1:]).nonzero(as_tuple=True)
    return {
        "induction": _Places(sequence[second], destination[second], source[second] + 1, int(second.sum())),
        "previous_token": _Places(every[0], every[1] + 1, every[1], len(every[0])),
        "prefix_matching": _Places(sequence, destination, source + 1, repeated),
        "duplicate_token": _Places(sequence, destination, source, repeated),
    }


def _add(run: FrozenTrace, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    """Count one run in."""
    places = _places(run.tokens)
    for layer in range(run.weights.n_layers):
        pattern = run.pattern(layer)
        for name, at in places.items():
            entries = pattern[at.sequence, :, at.destination, at.source]  # [N, H]
            sums[name][layer] += entries.sum(0, dtype=torch.float64)
            counts[name][layer] += at.destinations
        if "copying" in sums:
            own, total = _raised(run, layer)
            sums["copying"][layer] += own
            counts["copying"][layer] += total


def _raised(run: FrozenTrace, layer: int) -> tuple[Tensor, Tensor]:
    """The logits that a layer's heads raise: of the tokens they attend to, and of all tokens; fp64 [H] each."""
    weights, tokens, stream = run.weights, run.tokens, run.streams[layer]
    read_out = final_norm_gain(weights.heads("W_O", layer), weights)  # [H, r, d]
    unembed = weights.W_U.mT[tokens].to(stream.dtype)  # [B, T, d]
    values = run.read_by_values(stream, layer)[:, None] @ weights.heads("W_V", layer)  # [B, H, T, r]
    logits = values @ torch.einsum("hrd,btd->bhrt", read_out, unembed)  # [B, H, T, T]: of a source, for a token
    first = (~(tokens[:, :, None] == tokens[:, None]).tril(-1).any(-1)).to(stream.dtype)  # each token counts once
    mean = torch.einsum("bhst,bt->bhs", logits, first / first.sum(-1, keepdim=True))
    raised = (logits - mean[..., None]).clamp_min_(0)
    reach = run.scales[-1] if run.post_scales is None else run.scales[-1] * run.post_scales[layer]
    paid = torch.einsum("bhts,bt->bhs", run.pattern(layer), reach)  # [B, H, T]: attention to a source, as logits see it
    own = paid * raised.diagonal(0, -2, -1)
    total = paid * torch.einsum("bhst,bt->bhs", raised, first)
    return own.sum((0, 2), dtype=torch.float64), total.sum((0, 2), dtype=torch.float64)


@public
@torch.no_grad()
def induction_heads(
    model: Any,
    scores: Result | None = None,
    *,
    weights: CircuitWeights | None = None,
    backend: Backend = "auto",
) -> Result:
    """Induction heads by their attention and by their weights, each with the head that it would build on.

    A head of a layer after the first is paired with the head of an earlier layer that attends most to the previous
    token. If it is an induction head, it finds its source by what that head has written there: its keys compose with it
    (`k_composition`), and the composed circuit matches a token with itself (`matching`); it then copies what it finds
    (`copying`).

    Args:
        model: as head_scores.
        scores: what head_scores returned for this model; None: made with its defaults.
        weights: as in head_scores.
        backend: of the composition scores, see pyfastcircuits.ops.

    Returns:
        Of pairs (previous-token head, head), one for each head of the layers after the first. `.values` is the head's
        `induction` score, `previous_token` its partner's. `k_composition`: their z-score against a random rotation,
        see composition_z_scores. `matching` and `copying`, from -1 to 1: positivity of the eigenvalues of the
        K-composed QK circuit of the two, and of the head's OV circuit. With layernorms, what is written is centred
        first.

    Raises:
        ValueError: a model of fewer than two layers, or one that predicts other tokens than it reads; scores of another
            model; else as head_scores.

    Source: "Induction Heads", Elhage et al. 2021.
    """
    weights = _weights_of(model, weights)
    shape = (weights.n_layers, weights.n_heads)
    if shape[0] < 2:
        raise ValueError(f"the model has {shape[0]} layers: an induction head reads what an earlier layer wrote")
    weights.check_one_vocabulary("no head copies what it finds")
    scores = head_scores(model, weights=weights) if scores is None else scores
    if "previous_token" not in scores.measured or scores.values.shape != shape:
        raise ValueError(
            f"scores are {scores.metric} of shape {list(scores.values.shape)}, expected what head_scores gives for "
            f"this model, of shape {list(shape)}"
        )
    weights = center(weights) if weights.norm == "layernorm" else weights
    previous = scores.previous_token
    pairs = []
    for layer in range(1, shape[0]):
        best = divmod(int(previous[:layer].argmax()), shape[1])
        pairs += [(best, (layer, head)) for head in range(shape[1])]
    places = torch.tensor(pairs, dtype=torch.long, device=weights.device).view(-1, 2, 2)
    ahead, behind = (places[:, i].unbind(-1) for i in (0, 1))
    partners = sorted({source for source, _ in pairs})
    composition = composition_scores(weights, "K", sources=partners, backend=backend)
    z = composition_z_scores(weights, "K", composition, sources=partners)
    rows = torch.tensor([partners.index(source) for source, _ in pairs], dtype=torch.long, device=weights.device)
    induction = scores.values[behind]
    extra = {
        "previous_token": previous[ahead],
        "k_composition": z[rows, behind[0], behind[1]],
        "matching": positivity(composed_eigenvalues(weights, pairs)),
        "copying": copying_scores(weights)[behind],
    }
    return Result(pairs, induction, induction.new_zeros(()), "induction", extra, scores.setup)
