"""Loads the compiled parts and knows what this build and this machine can do."""

import ctypes
import importlib.util
import threading
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1]


try:
    import pyfastcircuits._host as host
except ImportError as error:
    raise ImportError(
        "pyfastcircuits is not compiled for this Python: run `make build`, or `pip install --no-build-isolation -e .`"
    ) from error

_OPS_LIBRARY = str(_FOLDER / "_ops.so")
torch.ops.load_library(_OPS_LIBRARY)
# Ops ask now and then whether the user pressed Ctrl-C: only the module that knows Python can tell them.
ctypes.CDLL(_OPS_LIBRARY).pyfastcircuits_ask_python_with(ctypes.c_void_p(host.question(threading.main_thread().ident)))
_CUDA_LIBRARY = _FOLDER / "_cuda.so"
HAS_CUDA_KERNELS = _CUDA_LIBRARY.exists()
if HAS_CUDA_KERNELS:
    torch.ops.load_library(str(_CUDA_LIBRARY))
HAS_TRITON = importlib.util.find_spec("triton") is not None


def stripe_columns() -> int:
    """The number of columns of the vocabulary that the CPU kernels pack together, for float32 and the tier in force."""
    return int(host.build_facts()["stripe_columns"])


def give_back_memory() -> None:
    """Give freed memory that the C library keeps for itself back to the system."""
    host.give_back()


def build_info() -> dict[str, Any]:
    """Facts of this build and machine.

    Keys: version, compiler, cuda_architectures (of the linked CUDA kernels, "" if none), cpu_tier (in force; the
    environment variable PYFASTCIRCUITS_CPU_TIER sets it), cpu_tiers (those this CPU has), best_cpu_tier (the last of
    them), threads, torch, triton (installed), gpu (name or None).
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = {"threads": torch.get_num_threads(), "torch": torch.__version__, "triton": HAS_TRITON, "gpu": gpu}
    return dict(host.build_facts()) | here
