"""What a stored sweep is of: two runs may go on with each other's results if these are the same."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.ops.library import build_info
from pyfastcircuits.run import memory
from pyfastcircuits.run.losses import slices
from pyfastcircuits.run.trace import FrozenTrace


def model_hash(run: FrozenTrace) -> str:
    """The SHA-256 of every option and weight of a run's model, of its circuits and of the layers beside them."""
    digest, weights, forward = hashlib.sha256(), run.weights, run.forward
    held = dict(weights.tensors())
    options = {x.name: getattr(weights, x.name) for x in fields(weights) if x.name not in held}
    digest.update(json.dumps([options, dict(forward.options())], sort_keys=True, default=str).encode())
    for name, tensor in (*held.items(), *forward.tensors()):
        if name == "W_U" and weights.sharded:
            _update_sharded(digest, weights)
            continue
        for part in [tensor] if isinstance(tensor, Tensor) else tensor:
            _update(digest, name, part)
    return digest.hexdigest()


def _update_sharded(digest: Any, weights: CircuitWeights) -> None:
    """As of the whole W_U, of which the processes gather some rows at a time."""
    digest.update(_head("W_U", weights.W_U))
    row = weights.d_vocab_out * weights.W_U.itemsize
    for some in slices(weights.d_model, max(1, memory.block_bytes(weights.device) // row)):
        digest.update(_bytes(weights.holders.joined(weights.own_W_U[some], weights.d_vocab_out)))


def tokens_hash(tokens: Tensor) -> str:
    """The SHA-256 of tokens as int64, in the order in which they lie."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()


def told(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the words of JSON; a tensor by its hash."""
    return {name: _told(value) for name, value in sorted(options.items())}


def versions() -> dict[str, Any]:
    """What ran: versions, the commit if this is a checkout of git, and the CPU's tier."""
    facts = build_info()
    return {name: facts[name] for name in ("version", "torch", "cpu_tier", "gpu")} | {"commit": _commit()}


def difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """The first thing in which two identities differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        parts = (difference(theirs.get(x), ours.get(x), x) for x in (*ours, *(theirs.keys() - ours.keys())))
        return next(filter(None, parts), None)
    return None if theirs == ours else f"{name} is {json.dumps(theirs)} there, but {json.dumps(ours)} here"


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        digest = hashlib.sha256()
        _update(digest, "", value)
        return digest.hexdigest()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(_head(name, tensor))
    digest.update(_bytes(tensor))


def _head(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {list(tensor.shape)}".encode()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
