"""TransformerLens' `patching.get_act_patch_*`: many patches a forward pass, from the layer and position they change.

The user's metric is a function of all logits, of which it reads few as a rule: it is given logits that are computed
where they are read.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.experiments.points import Patched, Point, PointOutputs, What
from pyfastcircuits.experiments.rerun import rerun
from pyfastcircuits.model.norms import final_norm_gain, norm_scale
from pyfastcircuits.run.trace import FrozenTrace

COLUMNS: dict[str, str] = {
    "pos": "position",
    "dest_pos": "position",
    "head": "head",
    "head_index": "head",
    "src_pos": "source",
}
ROTATED = {"q": "rot_q", "k": "rot_k"}


def accelerated(theirs: Callable[..., Any], makes_points: Callable[..., Any]) -> Callable[..., Any]:
    """A `get_act_patch_*` of TransformerLens, `partial(generic_activation_patch, ...)`, on this package.

    What it cannot run (a model that `trace` refuses, hooks of the user's own, other setters) is left to theirs.
    """
    what: What = theirs.keywords["activation_name"]  # type: ignore[attr-defined]
    axes: Sequence[str] = theirs.keywords["index_axis_names"]  # type: ignore[attr-defined]

    @wraps(theirs)
    def get_act_patch(
        model: Any,
        corrupted_tokens: Tensor,
        clean_cache: Any,
        patching_metric: Callable[[Tensor], Tensor],
        *,
        index_axis_names: Sequence[str] | None = axes,
        index_df: Any = None,
        return_index_df: bool = False,
        **options: Any,
    ) -> Any:
        run = None if options or not _plain(model, what) else _traced(model, corrupted_tokens)
        if run is None or (index_df is None) != (index_axis_names == axes):
            return theirs(
                model, corrupted_tokens, clean_cache, patching_metric, index_axis_names=index_axis_names,
                index_df=index_df, return_index_df=return_index_df, **options,
            )  # fmt: skip
        sizes = {"layer": model.cfg.n_layers, "position": corrupted_tokens.shape[-1], "head": _heads(model, what)}
        shape = [sizes[{"source": "position"}.get(x, x)] for x in ("layer", *(COLUMNS[axis] for axis in axes[1:]))]
        frame = makes_points(shape, list(axes)) if index_df is None else index_df
        points = [_point(row, axes) for row in frame.itertuples(index=False)]
        with torch.no_grad():
            values = _values(run, what, points, _Cached(clean_cache, what, model), patching_metric)
        out = torch.tensor(values, dtype=torch.float32, device=model.cfg.device)
        out = out if index_df is not None else out.view(shape)
        return (out, frame) if return_index_df else out

    return get_act_patch


def _plain(model: Any, what: What) -> bool:
    """Whether nothing stands between a model and its patches that ours would not see."""
    hooked = any(getattr(point, "fwd_hooks", ()) for point in getattr(model, "hook_dict", {}).values())
    return not hooked and not (what in "qk" and getattr(model.cfg, "use_qk_norm", False))


def _traced(model: Any, tokens: Tensor) -> FrozenTrace | None:
    try:
        with torch.no_grad():
            return trace(model, tokens)
    except (ValueError, TypeError):
        return None


def _heads(model: Any, what: What) -> int:
    shared = getattr(model.cfg, "n_key_value_heads", None)
    return int(shared if what in "kv" and shared is not None else model.cfg.n_heads)


def _point(row: Sequence[Any], axes: Sequence[str]) -> Point:
    named = {COLUMNS[axis]: int(value) for axis, value in zip(axes[1:], row[1:], strict=True)}
    return Point(int(row[0]), named.get("head"), named.get("position"), named.get("source"))


class _Cached:
    """The values of a user's cache, in the place of a run's (see AblationValue)."""

    def __init__(self, cache: Any, what: What, model: Any) -> None:
        rotary = getattr(model.cfg, "positional_embedding_type", None) == "rotary"
        self.cache, self.name = cache, ROTATED.get(what, what) if rotary else what

    def mask(self, part: FrozenTrace) -> None:
        """See AblationValue."""
        return None

    def removal(self, outputs: PointOutputs, part: FrozenTrace) -> Tensor:
        """See AblationValue."""
        own: Tensor = outputs(part)
        theirs: Tensor = self.cache[self.name, outputs.layer].to(own.device, own.dtype)
        if outputs.what == "pattern":
            theirs = theirs.transpose(0, 1)
        elif theirs.dim() == 4:  # [B, T, H, r]
            theirs = theirs.permute(2, 0, 1, 3)
        lost: Tensor = own - theirs
        return lost


def _values(
    run: FrozenTrace, what: What, points: Sequence[Point], value: Any, metric: Callable[[Tensor], Tensor]
) -> list[float]:
    """The metric of each patch."""
    changes, found = Patched(run, what, points, value), [0.0] * len(points)
    unembedded = _Unembedded(run)
    for members, position, streams in rerun(run, changes.starts, changes):
        final = run.final.repeat(len(members), 1, 1, 1)
        final[:, :, position:] = streams
        rows = unembedded.expected()
        known = unembedded(final.flatten(1, 2)[:, rows])  # together, because one row takes as long as many
        for i, member in enumerate(members):
            logits = LazyLogits(unembedded, position, final[i])
            logits.keep(rows, known[i])
            found[member] = metric(logits).item()
    return found


class _Unembedded:
    """Logits of rows of the final residual stream, and those of the unchanged run."""

    def __init__(self, run: FrozenTrace) -> None:
        self.run, self.bias, self.kept = run, run.weights.whole_unembed_bias(), dict[str, Tensor]()
        self.read = torch.zeros(run.tokens.numel(), dtype=torch.bool, device=run.final.device)  # by the metric, so far

    def expected(self) -> Tensor:
        """The rows [n] that a metric is expected to read: those that it has read, unless they are many."""
        rows = self.read.nonzero()[:, 0]
        return rows if 4 * len(rows) <= len(self.read) else rows[:0]

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., d] -> [..., V']."""
        weights = self.run.weights
        read = final_norm_gain(rows, weights) * norm_scale(rows, weights)[..., None]
        logits = read @ weights.W_U.to(read.dtype)
        logits = logits if self.bias is None else logits + self.bias
        cap = weights.logit_cap
        capped: Tensor = logits if cap is None else cap * (logits / cap).tanh()
        return capped

    def whole(self) -> Tensor:
        """[B, T, V'] of the unchanged run."""
        if "whole" not in self.kept:
            self.kept["whole"] = self(self.run.final)
        return self.kept["whole"]


class LazyLogits(Tensor):
    """Logits [B, T, V'] that are computed where they are indexed, and whole for any other use."""

    @staticmethod
    def __new__(cls, unembedded: _Unembedded, position: int, final: Tensor) -> "LazyLogits":
        """Of a final residual stream [B, T, d] that is the unchanged run's in front of a position."""
        shape = (*final.shape[:2], unembedded.run.weights.d_vocab_out)
        out: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=final.dtype, device=final.device)
        out._made = unembedded, position, final
        out._known = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=final.device)
        out._logits = final.new_empty(shape[0] * shape[1], shape[2])  # memory is taken where it is written
        return out

    _made: tuple[_Unembedded, int, Tensor]
    _known: Tensor
    _logits: Tensor

    def keep(self, rows: Tensor, logits: Tensor) -> None:
        """Store the logits of some rows of [B * T]."""
        self._known[rows] = True
        self._logits[rows] = logits

    def whole(self) -> Tensor:
        """All of them."""
        unembedded, position, final = self._made
        unembedded.read[:] = True
        return torch.cat((unembedded.whole()[:, :position], unembedded(final[:, position:])), 1)

    def picked(self, index: Any) -> Tensor:
        """Some of them, of rows that are computed for it."""
        unembedded, _, final = self._made
        batch, length, vocabulary = self.shape
        of_rows = torch.arange(batch * length, device=final.device).view(batch, length, 1)
        asked = torch.zeros_like(self._known)
        asked[of_rows.expand(batch, length, vocabulary)[index].flatten()] = True
        unembedded.read |= asked
        missing = (asked & ~self._known).nonzero()[:, 0]
        if len(missing):
            self.keep(missing, unembedded(final.flatten(0, 1)[missing]))
        chosen: Tensor = self._logits.view(batch, length, vocabulary)[index]
        return chosen

    @classmethod
    def __torch_function__(cls, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch."""
        kwargs = kwargs or {}
        if called in OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return called(*args, **kwargs)
        if called is Tensor.__getitem__ and isinstance(args[0], cls):
            return args[0].picked(args[1])
        return cls.__torch_dispatch__(called, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation, on all of the logits."""
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, cls) else x, (args, kwargs or {}))
        return called(*args, **kwargs)


OF_THE_SHAPE = (
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
    Tensor.size, Tensor.dim, Tensor.__len__, Tensor.numel,
)  # fmt: skip


def of_module(patching: Any) -> dict[str, Callable[..., Any]]:
    """The accelerated functions of TransformerLens' module `patching`, by name."""
    generic = patching.generic_activation_patch
    return {
        name: accelerated(function, patching.make_df_from_ranges)
        for name, function in vars(patching).items()
        if isinstance(function, partial) and function.func is generic
    }
