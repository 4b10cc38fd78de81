// Every op's schema. Kernels register themselves beside their code: csrc/cpu, csrc/cuda, kernels/ (Triton).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyfastcircuits, m) {
  // base [T,V], delta [P,T,r], basis [G,r,V], group [P] -> the logsumexp of base + delta @ basis[group], [P,T] fp64.
  // With cap, logits x are cap * tanh(x / cap).
  m.def("logits_lse(Tensor base, Tensor delta, Tensor basis, Tensor group, str precision, float? cap=None) -> Tensor");
  // The same with tokens [T,K], scale [P,T], and clean_lse [T], the logsumexp of base over the whole vocabulary. With
  // p = exp(base - clean_lse) and change = what is added to a logit:
  // -> sum of p * expm1(change) [P,T], logarithm of the sum of p * exp(change) [P,T], changes of `tokens` [P,T,K], and
  // sum of p * change [P,T] (empty without `mean`); all fp64.
  // A token outside [0, V) is not in this slice of the vocabulary: its change is 0. A scale multiplies base - clean_lse
  // (with a cap, base itself): changes are told up to a number that a position's logits share. With cap, logits x are
  // cap * tanh(x / cap), those of the clean run too; base is given without it. With outer [G,r,d], the bases are outer
  // @ basis [1,d,V], made a stripe at a time by the CPU kernel alone.
  m.def(
      "sweep_nll(Tensor base, Tensor delta, Tensor basis, Tensor tokens, Tensor group, Tensor? scale, "
      "Tensor clean_lse, bool mean, str precision, float? cap=None, Tensor? outer=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // The same of pairs [P,2] of ablations, without a scale: logits are base + C[first] + C[second], C = delta [S,T,r] @
  // basis[group].
  m.def(
      "joint_nll(Tensor base, Tensor delta, Tensor basis, Tensor tokens, Tensor group, Tensor pairs, "
      "Tensor clean_lse, bool mean, str precision, float? cap=None) -> (Tensor, Tensor, Tensor, Tensor)");
  // base, delta, basis, group as above, tokens [T], thresholds [P,T] (fp64) -> how many logits of tokens of this slice
  // other than tokens[t] are greater than thresholds[p, t]: int64 [P,T].
  m.def(
      "target_ranks(Tensor base, Tensor delta, Tensor basis, Tensor tokens, Tensor group, Tensor thresholds, "
      "str precision) -> Tensor");
  // left [N,r,d], right [M,d,s], before [M] -> ||left[i] @ right[j]||_F [N,M] in left's dtype (fp32 for bfloat16).
  // Pairs with i >= before[j] are 0 and cost nothing.
  m.def("pair_norms(Tensor left, Tensor right, Tensor? before, str precision) -> Tensor");
  // The same by Gram matrices, with X = left_outer @ left [N,q,d] and Y = right @ right_outer [M,d,p] in their place:
  // <X_i^T X_i, Y_j Y_j^T> [N,M], and the trace and squared norm of each Gram matrix [N,2], [M,2]; all fp64. Several
  // outers in a row may share one left or right: N, M are multiples of those. The Y of several tensors stand one after
  // the other; right_outer is empty or has as many.
  m.def(
      "pair_grams(Tensor left, Tensor[] right, Tensor? left_outer, Tensor[] right_outer, Tensor? before) "
      "-> (Tensor, Tensor, Tensor)");
  // factors [N,d,r] -> upper R [N,r,r] in fp64 with R^T R = W^T W, and whether W^T W was regular [N]; if not, R is 0.
  m.def("triangles(Tensor factors) -> (Tensor, Tensor)");
  // A [N,r], B [r,M], shift [N] -> the k best entries of A @ B - shift[:,None], best first, equal ones by row, then
  // column: values in A's dtype (fp32 for bfloat16), rows, columns; [k], or [N,k] `per_row`.
  // screen: "auto", "none" or "bf16".
  m.def(
      "factored_topk(Tensor A, Tensor B, int k, bool largest, bool per_row, Tensor? shift, str screen) "
      "-> (Tensor, Tensor, Tensor)");
  // A [N,r], B [r,M], columns [N] -> entries of row i of A @ B greater than entry (i, columns[i]): int64 [N].
  m.def("diagonal_ranks(Tensor A, Tensor B, Tensor columns) -> Tensor");
  // q [B,H,T,r], k [B,Hkv,T,r], values [S,B,Hkv,T,s], lse [B,H,T], pre, post [B,T], mask [B,T] of the keys that are
  // there
  // -> post * softmax(q k) (pre * values) [S,B,H,T,s] in q's dtype (fp32 for bfloat16), and lse in fp64 (empty if
  // given). transposed: values [S,B,H,T,s] -> pre * softmax(q k)^T (post * values) [S,B,Hkv,T,s]; needs lse.
  m.def(
      "frozen_attention(Tensor q, Tensor k, Tensor values, Tensor? lse, Tensor? pre, Tensor? post, Tensor? mask, "
      "float scale, int? window, float? softcap, bool transposed, str precision) -> (Tensor, Tensor)");
  // Operations a second of one instruction mix on all threads: "fma", "bf16" (both in FLOP/s) or "exp".
  m.def("cpu_rate(str kind, float seconds) -> float");
}
