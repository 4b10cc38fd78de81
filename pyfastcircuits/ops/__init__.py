"""The kernels as typed functions, one module each: they check their arguments by name and can be used on their own.

| op | what it gives | never stored |
|---|---|---|
| `sweep_nll` | next-token losses, KL and logit differences of many ablations | the ablated logits [P, T, V] |
| `joint_nll` | the same of pairs of ablations at once | the logits of the pairs |
| `target_ranks` | how many tokens each ablation ranks above the target | the ablated logits |
| `pair_norms` | Frobenius norms of all products left[i] @ right[j]: composition scores | the products |
| `factored_topk` | the largest entries of a full circuit A @ B, or of each of its rows | the circuit [V, V] |
| `diagonal_ranks` | how many entries of a row are greater than the diagonal one: copying | the circuit [V, V] |
| `frozen_attention` | attention patterns of a clean run applied to many streams of values | the patterns [T, T] |
| `attention_lse` | the logsumexp of attention scores that `frozen_attention` takes | the scores |

`sweep_partial`, `joint_partial` and `rank_partial` are the raw ops beneath the first three: they take a slice of the
vocabulary and give what the slices' results are merged from. `factored_pair_norms` takes factors that are products.

`backend` is "auto" (the CPU kernels for CPU tensors, Triton for CUDA tensors), "cpu", "triton", "cuda" or "reference".
A backend that is not there raises; nothing falls back. `precision` is "ieee" (the inputs' own arithmetic; bfloat16
inputs accumulate in fp32), "tf32" (Triton) or "bf16" (factors rounded to bfloat16, fp32 accumulation).
"""

from pyfastcircuits.ops.backend import Backend as Backend
from pyfastcircuits.ops.backend import Precision as Precision
from pyfastcircuits.ops.backend import Screen as Screen
from pyfastcircuits.ops.backend import resolve_backend as resolve_backend
from pyfastcircuits.ops.diagonal_ranks import diagonal_ranks as diagonal_ranks
from pyfastcircuits.ops.factored_topk import TopEntries as TopEntries
from pyfastcircuits.ops.factored_topk import factored_topk as factored_topk
from pyfastcircuits.ops.frozen_attention import attention_lse as attention_lse
from pyfastcircuits.ops.frozen_attention import frozen_attention as frozen_attention
from pyfastcircuits.ops.joint_nll import joint_nll as joint_nll
from pyfastcircuits.ops.joint_nll import joint_partial as joint_partial
from pyfastcircuits.ops.pair_norms import FactoredPairNorms as FactoredPairNorms
from pyfastcircuits.ops.pair_norms import Route as Route
from pyfastcircuits.ops.pair_norms import factored_pair_norms as factored_pair_norms
from pyfastcircuits.ops.pair_norms import pair_norms as pair_norms
from pyfastcircuits.ops.sweep_nll import SweepPartial as SweepPartial
from pyfastcircuits.ops.sweep_nll import sweep_nll as sweep_nll
from pyfastcircuits.ops.sweep_nll import sweep_partial as sweep_partial
from pyfastcircuits.ops.target_ranks import rank_partial as rank_partial
from pyfastcircuits.ops.target_ranks import target_ranks as target_ranks
from pyfastcircuits.shapes import check_range as check_range

__all__ = [name for name, value in globals().items() if callable(value)]  # all that is imported here
