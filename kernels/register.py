"""Registers every Triton op as torch.ops.pyfastcircuits.<op>_triton: importing this imports triton."""

from pyfastcircuits.kernels import (  # noqa: F401
    diagonal_ranks,
    factored_topk,
    frozen_attention,
    joint_nll,
    pair_norms,
    sweep_nll,
    target_ranks,
)
