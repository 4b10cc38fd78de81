"""TransformerLens on the kernels of this package, without a change to the code that uses it.

HookedTransformer (up to 3.9) and TransformerBridge (from 4) are both recognised by the attributes they have, not by a
version.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.circuits.head_factors import triangle
from pyfastcircuits.integrations.patching import of_module
from pyfastcircuits.model.factored import FactoredMatrix, computable
from pyfastcircuits.ops import pair_norms

_later_layers_only: ContextVar[bool] = ContextVar("later_layers_only", default=False)


class Acceleration(ExitStack):
    """The replacements that `accelerate` has made; leaving it as a context, or `undo`, takes them back."""

    def replace(self, owner: object, name: str, value: object) -> None:
        """Set an attribute of a module or class and remember what was there."""
        if name in vars(owner):
            self.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put back everything that was replaced. Once is enough; more does no harm."""
        self.close()


def accelerate() -> Acceleration:
    """Run TransformerLens' composition scores, FactoredMatrix and activation patching on this package, until undone.

    `accelerate()` lasts until `.undo()` of what it returns; `with accelerate():` until the block ends. Meanwhile
    `model.all_composition_scores(...)` and `composition_scores(...)` go through `ops.pair_norms`, and the methods of
    TransformerLens' FactoredMatrix (products, `svd`, `norm`, `eigenvalues`, and so copying scores, indexing) are those
    of this package's, for matrices that exist already too. `patching.get_act_patch_*`, and what is made of them, run
    many patches together, from the layer and position that each changes, with any metric of the logits (which are
    computed where the metric reads them). Types are theirs throughout (a Tensor from
    HookedTransformer, CompositionScores from TransformerBridge), and values equal up to rounding.

    Raises:
        ImportError: transformer_lens is not installed.
    """
    try:
        import transformer_lens
        from transformer_lens import patching, utilities
    except ImportError as error:
        raise ImportError(
            "accelerate() needs TransformerLens: pip install 'pyfastcircuits[transformer-lens]'"
        ) from error

    done = Acceleration()
    theirs = transformer_lens.FactoredMatrix
    for name, value in vars(FactoredMatrix).items():
        if isinstance(value, property) or (callable(value) and name not in ("__init__", "__hash__", "__repr__")):
            done.replace(theirs, name, value)

    slow = utilities.composition_scores
    fast = _composition_scores(slow)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "transformer_lens" and vars(module).get("composition_scores") is slow:
            done.replace(module, "composition_scores", fast)

    for name, function in of_module(patching).items():
        done.replace(patching, name, function)

    for model in _models(transformer_lens):
        if "all_composition_scores" in vars(model):
            done.replace(model, "all_composition_scores", _of_later_layers(model.all_composition_scores))
    return done


def _models(library: Any) -> list[Any]:
    from transformer_lens import model_bridge

    # asking TransformerLens 4 for HookedTransformer is an ImportError, not an AttributeError: look, do not ask
    found = (vars(library).get("HookedTransformer"), getattr(model_bridge, "TransformerBridge", None))
    return [model for model in found if model is not None]


def _of_later_layers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the method: while it runs, scores that it will set to zero anyway are not computed."""

    @wraps(method)
    def all_composition_scores(*args: Any, **kwargs: Any) -> Any:
        token = _later_layers_only.set(True)
        try:
            return method(*args, **kwargs)
        finally:
            _later_layers_only.reset(token)

    return all_composition_scores


def _composition_scores(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(theirs)
    def composition_scores(left: Any, right: Any, broadcast_dims: bool = True) -> Tensor:
        if not broadcast_dims or left.ndim == 2 or right.ndim == 2:
            return theirs(left, right, broadcast_dims)
        assert left.rdim == right.ldim, (
            f"Composition scores require left.rdim==right.ldim, shapes were left: {left.shape}, right:{right.shape}"
        )
        leading = (left.shape[:-2], right.shape[:-2])
        written = (triangle(computable(left.A)) @ computable(left.B)).flatten(0, -3)
        read = (triangle(computable(right.B).mT) @ computable(right.A).mT).flatten(0, -3)
        before = None
        if _later_layers_only.get():  # both sides are [layer, head]
            before = torch.arange(len(read), device=read.device) // leading[1][-1] * leading[0][-1]
        sizes = torch.linalg.matrix_norm(written)[:, None] * torch.linalg.matrix_norm(read)
        scores: Tensor = pair_norms(written, read.mT, before=before) / sizes
        return scores.view(*leading[0], *leading[1])

    return composition_scores
