"""The kernels as typed functions, one module each: they check their arguments by name and can be used on their own.

| op | what it gives | never stored |
|---|---|---|
| `sweep_nll` | next-token losses, KL and logit differences of many ablations | the ablated logits [P, T, V] |
| `joint_nll` | the same of pairs of ablations at once | the logits of the pairs |
| `logits_lse` | logsumexps of logits that a low-rank product changes | the logits |
| `target_ranks` | how many tokens each ablation ranks above the target | the ablated logits |
| `pair_norms` | Frobenius norms of all products left[i] @ right[j]: composition scores | the products |
| `factored_topk` | the largest entries of a full circuit A @ B, or of each of its rows | the circuit [V, V] |
| `diagonal_ranks` | how many entries of a row are greater than the diagonal one: copying | the circuit [V, V] |
| `frozen_attention` | attention patterns of a clean run applied to many streams of values | the patterns [T, T] |
| `attention_lse` | the logsumexp of attention scores that `frozen_attention` takes | the scores |

`sweep_partial`, `joint_partial` and `rank_partial` are the raw ops beneath the first three: they take a slice of the
vocabulary and give what the slices' results are merged from. `factored_pair_norms` takes factors that are products.

`backend` is "auto" (the CPU kernels for CPU tensors, Triton for CUDA tensors), "cpu", "triton", "cuda" or "reference".
A backend that is not there raises; nothing falls back. `precision` is "ieee" (as right as the inputs' own arithmetic;
bfloat16 inputs accumulate in fp32), "tf32x3" (fp32 as three products of its TF32 parts, on tensor cores: what Triton
makes of "ieee" too, in all ops but `factored_topk` and `diagonal_ranks`), "tf32" (Triton) or "bf16" (factors rounded to
bfloat16, fp32 accumulation).
"""

from pyfastcircuits.ops.backend import Backend, Precision, Screen, resolve_backend
from pyfastcircuits.ops.diagonal_ranks import diagonal_ranks
from pyfastcircuits.ops.factored_topk import TopEntries, factored_topk
from pyfastcircuits.ops.frozen_attention import attention_lse, frozen_attention
from pyfastcircuits.ops.joint_nll import joint_nll, joint_partial
from pyfastcircuits.ops.logits_lse import logits_lse
from pyfastcircuits.ops.pair_norms import FactoredPairNorms, Route, factored_pair_norms, pair_norms
from pyfastcircuits.ops.sweep_nll import SweepPartial, sweep_nll, sweep_partial
from pyfastcircuits.ops.target_ranks import rank_partial, target_ranks
from pyfastcircuits.shapes import check_range

__all__ = [
    "Backend",
    "FactoredPairNorms",
    "Precision",
    "Route",
    "Screen",
    "SweepPartial",
    "TopEntries",
    "attention_lse",
    "check_range",
    "diagonal_ranks",
    "factored_pair_norms",
    "factored_topk",
    "frozen_attention",
    "joint_nll",
    "joint_partial",
    "logits_lse",
    "pair_norms",
    "rank_partial",
    "resolve_backend",
    "sweep_nll",
    "sweep_partial",
    "target_ranks",
]
