"""Whether what the weights say is what a model computed; if not, an error that names the module and likely reasons."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

OWN = ("torch.", "transformers.", "transformer_lens.")  # packages of modules that are as their library made them
SHOWN = 3


def digits(dtype: torch.dtype) -> float:
    """The relative error that is allowed: half of the digits of the coarser of a model's dtype and fp32."""
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5)


class Agreement:
    """Compares parts of a model's run with what the weights make of them.

    Args:
        model: whose run it is.
        mask: [B, T], where tokens are real; None if all are.
    """

    def __init__(self, model: Any, mask: Tensor | None) -> None:
        self.model, self.mask = model, mask

    def __call__(self, part: str, does: str, ours: Tensor, theirs: Tensor, names: Mapping[str, str]) -> None:
        """Half of the digits of the coarser of the model's dtype and fp32 must agree where tokens are real.

        Raises:
            RuntimeError: they do not agree, or the model's are not finite.
        """
        if self.mask is not None:
            ours, theirs = ours[self.mask], theirs[self.mask]
        if not theirs.numel():
            return
        error, size = (ours - theirs.to(ours.dtype)).abs().max(), theirs.abs().max().to(ours.dtype)
        what = f"what the {part} {does}" if does != "are" else f"the {part}"
        name = names.get(part, "")
        where = f" ({name})" if name else ""
        if not size.isfinite():
            raise RuntimeError(f"{what}{where} is not finite in the model's own run")
        if not error <= digits(theirs.dtype) * size:
            raise RuntimeError(
                f"{what} by the weights differs from the model's{where} by {float(error):.3g}, where the largest is "
                f"{float(size):.3g}: {self._reasons(name)}"
            )

    def _reasons(self, name: str) -> str:
        found = list(self._changes(name))
        if found:
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            return f"likely {', '.join(found[:SHOWN])}{more}; remove or merge it, and trace the model again"
        kind = type(self.model).__name__
        return (
            f"no hook and no adapter was found there, so either a forward method has been replaced, or {kind} computes "
            "something there that this library does not represent"
        )

    def _changes(self, name: str) -> Iterator[str]:
        """Hooks and foreign modules in the module of this name, and around it."""
        if not isinstance(self.model, nn.Module):
            return
        names = name.split(", ")
        for other, module in self.model.named_modules():
            around = not other or any(one == other or one.startswith(f"{other}.") for one in names)
            if not (around or any(not one or other.startswith(f"{one}.") for one in names)):
                continue
            here = other or type(self.model).__name__
            if any(_added(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
                yield f"a hook on {here}"
            if not around or other in names:
                if not type(module).__module__.startswith(OWN):
                    yield f"an adapter: {here} is a {type(module).__module__}.{type(module).__name__}"
                if "forward" in vars(module):
                    yield f"a forward of its own that {here} has been given"
                if getattr(module, "parametrizations", None):
                    yield f"a parametrization of {here}"


def _added(hook: Any) -> bool:
    """Whether a hook is a user's, and not one that a TransformerBridge needs."""
    module = getattr(hook, "__module__", None) or ""
    return not module.startswith("transformer_lens.") or module == "transformer_lens.hook_points"
