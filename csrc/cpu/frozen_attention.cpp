// frozen_attention on the CPU: its arguments are checked and its work is cut into tasks; frozen_attention_kernels.h
// does them.
#include "frozen_attention_kernels.h"

#ifndef FC_TIER  // the torch-facing half

namespace fc::cpu {

FC_TIERS(const AttentionKernels*, attention_kernels, Arithmetic)

namespace {

// The tensor with time, the axis before the last, running backwards if asked to.
template <int N>
Strided<N> view(const Tensor& x, bool backwards) {
  Strided<N> out = strided<N>(x);
  if (!backwards || x.numel() == 0) return out;
  int64_t& time = out.stride[N - 2];
  out.data = static_cast<char*>(out.data) + (x.size(N - 2) - 1) * time * static_cast<int64_t>(x.element_size());
  time = -time;
  return out;
}

void attend(const AttentionArguments& a, const AttentionKernels& kernels) {
  const HugeScratch packed(a.batches * a.heads_from * kernels.packed_bytes(a));
  run_tasks(a.batches * a.heads_from, [&](int64_t head) { kernels.pack(a, packed.data(), head); });
  const int64_t heads = a.batches * a.heads_to, all = ceil_div(a.positions, kernels.panel);
  // As many panels to a task as its results have room for, since each task packs the values anew, but tasks enough to
  // share. The results and a chunk's weights fit the L2 cache: results take five sixteenths of it.
  const int64_t fitting = caches().l2 * 5 / 16 / std::max<int64_t>(kernels.panel * a.streams * a.width * 4, 1);
  const int64_t panels = std::clamp<int64_t>(heads * all / (8 * torch::stable::get_num_threads()), 1,
                                             std::clamp<int64_t>(fitting, 1, kMostPanels));
  const int64_t blocks = ceil_div(all, panels), rows = panels * kernels.panel;
  run_tasks(heads * blocks, kernels.scratch_bytes(a, panels), [&](int64_t i, void* scratch) {
    // The last destinations come first: they see the most sources.
    const int64_t head = i / blocks, first = (blocks - 1 - i % blocks) * rows;
    kernels.attend(a, packed.data(), {head / a.heads_to, head % a.heads_to, first, std::min(first + rows, a.positions)},
                   scratch);
  });
}

std::tuple<Tensor, Tensor> frozen_attention(const Tensor& q, const Tensor& k, const Tensor& values,
                                            const std::optional<Tensor>& lse, const std::optional<Tensor>& pre,
                                            const std::optional<Tensor>& post, const std::optional<Tensor>& mask,
                                            double scale, std::optional<int64_t> window, std::optional<double> softcap,
                                            bool transposed, const std::string& precision) {
  Sizes sizes;
  sizes("q", q, "B H T r");
  sizes("k", k, "B Hkv T r");
  const int64_t B = sizes["B"], H = sizes["H"], T = sizes["T"], r = sizes["r"], Hkv = sizes["Hkv"];
  FC_CHECK(Hkv > 0 ? H % Hkv == 0 : H == 0, "q has ", H, " heads, no multiple of k's ", Hkv);
  sizes("values", values, transposed ? "S B H T s" : "S B Hkv T s");
  sizes("lse", lse, "B H T", Kind::number);
  sizes("pre", pre, "B T", Kind::number);
  sizes("post", post, "B T", Kind::number);
  sizes("mask", mask, "B T", Kind::flag);
  const int64_t S = sizes["S"], s = sizes["s"];
  FC_CHECK(lse.has_value() || !transposed, "lse is None, but the transposed form needs it");
  FC_CHECK(!window.has_value() || *window >= 1, "window is ", *window, ", expected at least 1");
  check_positive("scale", scale);
  if (softcap.has_value()) check_positive("softcap", *softcap);
  const AttentionKernels& kernels = *pick(pick_attention_kernels, "q", q, precision);

  const auto double_of = [](const std::optional<Tensor>& x) { return contiguous_as(x, ScalarType::Double); };
  const std::optional<Tensor> given = double_of(lse), before = double_of(transposed ? post : pre),
                              after = double_of(transposed ? pre : post), there = contiguous_as(mask, ScalarType::Bool);
  Tensor out = torch::stable::new_empty(values, {S, B, transposed ? Hkv : H, T, s}, result_dtype(q));
  Tensor found = torch::stable::new_empty(q, {given.has_value() ? 0 : B, H, T}, ScalarType::Double);
  const Tensor &to = transposed ? k : q, &from = transposed ? q : k;
  const AttentionArguments a{.to = view<4>(to, transposed),
                             .from = view<4>(from, transposed),
                             .values = view<5>(values, transposed),
                             .out = view<5>(out, transposed),
                             .lse = data_of<double>(given.has_value() ? *given : found),
                             .before = data_of<const double>(before),
                             .after = data_of<const double>(after),
                             .mask = data_of<const uint8_t>(there),
                             .batches = B,
                             .heads_to = to.size(1),
                             .heads_from = from.size(1),
                             .positions = T,
                             .rank = r,
                             .streams = S,
                             .width = s,
                             .window = std::min(window.value_or(T), T),
                             .scale = scale,
                             .softcap = softcap.value_or(0),
                             .find_lse = !given.has_value(),
                             .transposed = transposed};
  if (B * H * T > 0) attend(a, kernels);
  return {out, found};
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CPU, m) { m.impl("frozen_attention", TORCH_BOX(&fc::cpu::frozen_attention)); }

#endif
