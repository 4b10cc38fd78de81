"""Which backend runs an op, and the kernel that it runs."""

import os
from typing import Any, Literal

import torch

from pyfastcircuits.ops import library
from pyfastcircuits.shapes import check_choice

Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Screen = Literal["auto", "none", "bf16"]
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")


def resolve_backend(backend: str, device: torch.device, op: str = "sweep_nll") -> str:
    """The backend that runs `op` on tensors of `device`, or an error that says what is missing.

    Raises:
        ValueError: an unknown backend, or one that does not run on this device.
        RuntimeError: a backend that this op, build or machine lacks.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "cuda" and op != "factored_topk":
        raise RuntimeError(f"backend='cuda': there is no CUDA C++ kernel of {op}; take backend='triton'")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and not library.HAS_TRITON:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    wanted = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device.type)
    if wanted == "cuda" and not interpreted:
        if not torch.cuda.is_available():
            raise RuntimeError(f"backend={backend!r} needs a CUDA device, and torch sees none")
        if backend == "cuda" and not library.HAS_CUDA_KERNELS:
            raise RuntimeError("backend='cuda': this build has no CUDA kernels; rebuild where nvcc is found")
    if device.type != wanted and not interpreted:
        raise ValueError(f"backend={backend!r} runs on {wanted} tensors, but they are on {device}")
    return backend


GPU_SHARE = 64  # of a GPU's memory, the part that is scratch


def room(device: torch.device, scratch: int) -> int:
    """The bytes of scratch memory that work takes on a device where it takes `scratch` on a CPU.

    A CPU's caches are small, and its cores busy with little; a GPU is idle between launches, and wants each large.
    """
    if device.type != "cuda":
        return scratch
    return max(scratch, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)


def kernel_of(op: str, backend: str) -> Any:
    """The kernel of `op` for a backend that `resolve_backend` gave: it takes what torch.ops.pyfastcircuits.<op> does.

    Triton kernels are loaded here and nowhere else: triton is optional, and without a GPU importing it is time lost.
    """
    if backend == "triton":
        import pyfastcircuits.kernels.register  # noqa: F401

        op += "_triton"
    return getattr(torch.ops.pyfastcircuits, op)
