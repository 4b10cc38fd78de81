"""Registers every Triton op as torch.ops.pyfastcircuits.<op>_triton: importing this imports triton."""

from pyfastcircuits.gradients import register_no_gradient
from pyfastcircuits.kernels import (  # noqa: F401
    diagonal_ranks,
    factored_topk,
    frozen_attention,
    joint_nll,
    logits_lse,
    pair_norms,
    sweep_nll,
    target_ranks,
)

for op in ("sweep_nll", "joint_nll", "logits_lse", "factored_topk"):
    register_no_gradient(f"pyfastcircuits::{op}_triton", op)
