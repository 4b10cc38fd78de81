"""Which backend runs, and the checks that the ops share."""

import os
from typing import Literal

import torch
from torch import Tensor

from pyfastcircuits.ops import library

Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
Precision = Literal["ieee", "tf32", "bf16"]
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
PRECISIONS = ("ieee", "tf32", "bf16")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs tensors of `device`, or an error that says what is missing.

    Raises:
        ValueError: an unknown backend, or one that does not run on this device.
        RuntimeError: a backend that this build or machine lacks.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and not library.has_triton():
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device.type)
    if wanted == "cuda" and not interpreted:
        if not torch.cuda.is_available():
            raise RuntimeError(f"backend={backend!r} needs a CUDA device, and torch sees none")
        if backend == "cuda" and not library._CUDA_LIBRARY.exists():
            raise RuntimeError("backend='cuda': this build has no CUDA kernels; rebuild where nvcc is found")
    if device.type != wanted and not interpreted:
        raise ValueError(f"backend={backend!r} runs on {wanted} tensors, but they are on {device}")
    return backend


def check_precision(precision: str) -> None:
    """Raise ValueError unless it is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_cap(cap: float | None) -> None:
    """Raise ValueError unless it is positive or None."""
    if cap is not None and not cap > 0:
        raise ValueError(f"cap is {cap}, expected a positive number")


def no_cuda_kernel(op: str) -> RuntimeError:
    """The error of an op that Triton alone has on a GPU."""
    return RuntimeError(f"backend='cuda': there is no CUDA C++ kernel of {op}; take backend='triton'")


def check_range(name: str, values: Tensor, end: int) -> None:
    """Raise IndexError, with the first offender and its place, unless all are in [0, end)."""
    bad = (values < 0) | (values >= end)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise IndexError(f"{name}{place or ''} is {int(values[tuple(place)])}, expected 0 to {end - 1}")
