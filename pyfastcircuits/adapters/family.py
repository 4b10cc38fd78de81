"""The description of a family of Hugging Face models: the names of its modules, and how its tensors are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyfastcircuits.adapters.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    """The names of a family's modules. To add a family, see `pyfastcircuits.adapters`.

    Attributes:
        body: the module below the one with the output embedding; tensor names start with its name.
        layers: the list of layers in the body.
        attention: the attention in a layer, which returns (its write to the residual stream, its pattern).
        final_norm: the norm in front of the output embedding, in the body.
        read: makes the arguments of CircuitWeights from a checkpoint.
        post_norm: the norm in a layer through which the attention's write goes, if there is one.
        head_norms: the RMS norms of queries and of keys in the attention.
    """

    body: str
    layers: str
    attention: str
    final_norm: str
    read: Callable[[Checkpoint], dict[str, Any]]
    post_norm: str | None = None
    head_norms: tuple[str, ...] = ()


def rotary(c: Checkpoint, r: int) -> dict[str, Any]:
    """The rotary settings of CircuitWeights. The stretching of angles for long contexts shows in the patterns alone."""
    settings = dict(c.config) | dict(c.option("rope_scaling", {})) | dict(c.option("rope_parameters", {}))
    share = settings.get("partial_rotary_factor", settings.get("rotary_pct", 1.0))
    base = settings.get("rope_theta", settings.get("rotary_emb_base", 10_000.0))
    return {"positional": "rotary", "rotary_dim": int(r * share), "rotary_base": float(base)}
