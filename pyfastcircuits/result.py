"""The result of every experiment: one value for each thing that was ablated, patched, attributed or scored."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.arguments import public

_PLACES = ("sequence", "position", "source_position")
Label = Hashable  # a path or set of heads ((layer, head), ...); a layer; the name of a node
Harm = Literal["rise", "fall", "size"]


@dataclass(frozen=True, eq=False)
class Result:
    """Values of many experiments on one run, or on a pair of runs.

    Attributes:
        labels: the thing that each value belongs to, in the order of the flattened values: ((layer, head),) for a head,
            ((layer, head), (layer, head)) for a pair or path, a frozenset of those for several that go together, the
            number of a layer, the name of a node.
        values: [*shape], one entry for each label; followed by [B, T'] positions with `per_token`, or
            by [B] with `per_sequence`, NaN where nothing is measured. Nats for "nll" and "kl"; logits, probabilities,
            ranks from 0.
        baseline: the same quantity of the run that nothing was done to, a scalar ([B, T'] or [B] where they
            are told apart).
        metric: the name of the quantity in `values`.
        extra: other quantities measured along the way, each shaped like `values`; `result.kl` is `result.extra["kl"]`.
        setup: how the experiments were made: scope, mode, attention, ...; strings, or numbers that stay numbers.
        harm: which values `top` puts first: those above the baseline ("rise"), those below it ("fall"), or those that
            lie farthest from it ("size").
        rise: `delta`, where the change was measured itself: it has digits that values and baseline round away.
    """

    labels: Sequence[Label]
    values: Tensor
    baseline: Tensor
    metric: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    setup: Mapping[str, str | int | float] = field(default_factory=dict)
    harm: Harm = "rise"
    rise: Tensor | None = None

    def __getattr__(self, name: str) -> Tensor:
        """A measured quantity by its name; `loss` is "nll"."""
        wanted = "nll" if name == "loss" else name
        if not name.startswith("_") and wanted in (there := self.__dict__.get("extra", {})):
            found: Tensor = there[wanted]
            return found
        if not name.startswith("_") and wanted == self.__dict__.get("metric"):
            return self.values
        raise AttributeError(f"{name!r} was not measured, only {', '.join(self.measured)}")

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all quantities that were measured."""
        return (self.__dict__.get("metric", ""), *self.__dict__.get("extra", {}))

    @property
    @public
    def delta(self) -> Tensor:
        """What each experiment adds to the baseline, shaped like values."""
        return self.values - self.baseline if self.rise is None else self.rise

    @property
    def pairs(self) -> Tensor:
        """[P, 2, 2]: (layer, head) of the source and of the destination, where experiments are of pairs.

        Raises:
            ValueError: they are not.
        """
        if any(_width(label) != 2 for label in self.labels):
            raise ValueError("pairs: these are not of pairs of heads; see labels")
        return torch.tensor(self.labels, dtype=torch.long).view(-1, 2, 2)

    @public
    def means(self) -> Tensor:
        """The mean of `delta` over positions for each label, [len(labels)], in fp64."""
        count = len(self.labels)
        return self.delta.double().reshape(count, -1).nanmean(-1) if count else self.delta.double().flatten()

    @public
    def top(self, n: int) -> list[tuple[Any, float]]:
        """The n labels that matter most by `harm`, with their difference from the baseline; ties in label order.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n is {n}, expected at least 0")
        means = self.means().detach()
        key = {"rise": means, "fall": -means, "size": means.abs()}[self.harm]
        best = torch.sort(key.nan_to_num(-torch.inf), descending=True, stable=True).indices[:n].tolist()
        return [(self.labels[i], float(means[i])) for i in best]

    @public
    def table(self) -> Any:
        """A pyarrow.Table with a row for each label (and each position or sequence that is told apart); `.to_pandas()`.

        Columns: layer, head; or source_layer, source_head, dest_layer, dest_head; or label, in words; then sequence and
        position where there are such (for attention scores, source_position too); then every quantity measured, and
        `delta_` of the first. The schema's metadata holds the setup and the baseline.

        Raises:
            ImportError: pyarrow is missing.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError("tables need pyarrow: pip install 'pyfastcircuits[cli]'") from error
        count, places = len(self.labels), self.baseline.numel()
        names = {"metric": self.metric, **{name: str(value) for name, value in self.setup.items()}}
        if not self.baseline.dim():
            names["baseline"] = repr(float(self.baseline.detach()))
        quantities = {self.metric: self.values, f"delta_{self.metric}": self.delta, **self.extra}
        flat = {name: x.detach().double().cpu().reshape(count, places) for name, x in quantities.items()}
        kept = flat[self.metric].isfinite().flatten() if self.baseline.dim() else torch.ones(count, dtype=torch.bool)
        rows = torch.arange(count).repeat_interleave(places)[kept].tolist()
        pairs = self.setup.keys() & {"scope", "kind"}
        named = label_columns(self.labels, bool(pairs))
        columns = {name: pa.array([values[i] for i in rows]) for name, values in named.items()}
        if self.baseline.dim():
            at = torch.arange(places).repeat(count)[kept]
            for name, index in zip(_PLACES, torch.unravel_index(at, self.baseline.shape), strict=False):
                columns[name] = pa.array(index.numpy())
        columns |= {name: pa.array(x.flatten()[kept].numpy()) for name, x in flat.items()}
        return pa.table(columns).replace_schema_metadata(names)

    @public
    def plot(
        self,
        quantity: str | None = None,
        *,
        title: str | None = None,
        most: int = 30,
        sequence: int = 0,
        tokens: Sequence[str] | None = None,
    ) -> Any:
        """Draw the values by their labels: a matrix of pairs or heads, a curve over layers, or bars.

        Pairs that do not exist are blank. With `per_token`, one sequence is drawn, position by position; with
        `per_sequence`, the mean of the sequences.

        Args:
            quantity: one of `measured`; None: the first, as `delta`, the change of the metric.
            title: above the figure; None: the metric and the setup.
            most: the most labels where they are bars or have positions: those that matter most.
            sequence: which one, with `per_token`.
            tokens: the texts of that sequence's tokens, to stand at its positions.

        Returns:
            A matplotlib Figure, which notebooks show; `.savefig("figure.pdf")` writes PNG, SVG or PDF.

        Raises:
            ValueError: the quantity was not measured; there are no labels; `most` is below 1; fewer tokens than
                positions.
            IndexError: no such sequence.
            ImportError: matplotlib is missing.
        """
        from pyfastcircuits.drawing import labelled

        name = {None: self.metric, "loss": "nll"}.get(quantity, quantity)
        if name not in self.measured:
            raise ValueError(f"quantity is {quantity!r}, expected one of {', '.join(self.measured)}")
        if not self.labels or most < 1:
            raise ValueError(
                "labels is empty: there is nothing to draw" if most > 0 else f"most is {most}, expected > 0"
            )
        first = name == self.metric
        values = (self.delta if first else self.extra[name]).detach().double().cpu()
        values = values.reshape(len(self.labels), *self.baseline.shape)
        change = first and (self.rise is not None or bool(self.baseline.detach().abs().nansum() > 0))
        values = values.nanmean(-1) if self.baseline.dim() == 1 else values
        values, scale = labelled.in_unit(name, values.numpy(), change=change)
        words = ((key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in self.setup.items())
        setup = ", ".join(f"{key} {value}" for key, value in words)
        own = scale.partition(" (")[0].capitalize() + (f": {setup}" if setup else "")
        how: dict[str, Any] = {"title": own if title is None else title, "scale": scale}
        how["rising"] = not change and not bool((values < 0).any())
        if self.baseline.dim() < 2:

            def best(n: int) -> list[Label]:
                return [label for label, _ in self.top(n)]

            return labelled.picture(self.labels, values, label_name, best, most=most, **how)
        if not -len(self.baseline) <= sequence < len(self.baseline):
            raise IndexError(f"sequence is {sequence}, expected 0 to {len(self.baseline) - 1}")
        if self.baseline.dim() > 2:
            return labelled.by_source(self.labels, values[:, sequence], label_name, **how)
        if tokens is not None and len(tokens) < values.shape[-1]:
            raise ValueError(f"tokens has {len(tokens)} texts, expected one for each of {values.shape[-1]} positions")
        place = {label: i for i, label in enumerate(self.labels)}
        chosen = sorted(place[label] for label, _ in self.top(most))
        names = [label_name(self.labels[i]) for i in chosen]
        texts = None if tokens is None else list(tokens)[: values.shape[-1]]
        return labelled.by_position(names, values[chosen, sequence], texts, **how)

    def _repr_html_(self) -> str:
        """What stands out, as a table with a picture."""
        from pyfastcircuits.drawing.notebook import card

        rows = [(label_name(label), f"{delta:+.4g}") for label, delta in self.top(8)]
        title = f"{repr(self).partition('; top:')[0]})"
        return card(title, ("label", f"delta of {self.metric}"), rows, self.plot)

    def __repr__(self) -> str:
        """Metric, setup and what stands out."""
        how = ", ".join(f"{name}={value}" for name, value in self.setup.items())
        head = f"{type(self).__name__}({self.metric} of {len(self.labels)}{', ' + how if how else ''}"
        best = ", ".join(f"{label_name(label)} {delta:+.4g}" for label, delta in self.top(3))
        return f"{head}; baseline {float(self.baseline.detach().double().nanmean()):.4g}; top: {best})"


def label_name(label: Label) -> str:
    """A label in words: "1.4" for a head, "1.4 Q" for its queries, "mlp 2" for an MLP, "0.6 -> 1.4" for a path.

    The path through no head is "direct"; what is done at one position is "1.4 @ 7".
    """
    if isinstance(label, frozenset):
        return "{" + ", ".join(sorted(map(label_name, label))) + "}"
    if not isinstance(label, tuple):
        return str(label)
    if len(label) == 2 and isinstance(label[0], tuple) and label[1] in ("Q", "K", "V", "pattern"):
        return f"{label_name(label[0])} {label[1]}"
    if len(label) == 2 and isinstance(label[0], (tuple, frozenset)) and isinstance(label[1], int):
        return f"{label_name(label[0])} @ {label[1]}"
    if len(label) == 2 and isinstance(label[1], int) and isinstance(label[0], (int, str)):
        return f"{label[0]}{' ' if isinstance(label[0], str) else '.'}{label[1]}"
    return " -> ".join(map(label_name, label)) if label else "direct"


def _width(label: Label) -> int | None:
    """The number of heads in the label of a path; None for other labels."""
    if isinstance(label, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in label):
        return len(label) if all(isinstance(i, int) for x in label for i in x) else None
    return None


def label_columns(labels: Sequence[Label], pairs: bool) -> dict[str, list[Any]]:
    """Columns that name the labels; `pairs`: an empty table is one of pairs."""
    widths = {_width(label) for label in labels} or {2 if pairs else 1}
    names = {1: ("layer", "head"), 2: ("source_layer", "source_head", "dest_layer", "dest_head")}
    if len(widths) == 1 and (width := widths.pop()) in names:
        flat: list[Any] = [[i for x in label for i in x] for label in labels]  # type: ignore[attr-defined]
        return {name: [row[i] for row in flat] for i, name in enumerate(names[width])}
    if labels and all(isinstance(label, int) for label in labels):
        return {"layer": list(labels)}
    return {"label": [label_name(label) for label in labels]}
