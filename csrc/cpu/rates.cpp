// cpu_rate: what this machine does, on average over some time, in loops that stay in registers. It is the denominator
// of every "fraction of the limit" in the benches: a burst at a higher clock is no limit of work that takes longer.
#include "dispatch.h"

namespace fc::cpu {
enum class Rate { fma, exp, bf16 };
// Runs `rounds` rounds in registers and returns the operations of one round; 0 where the tier lacks the instruction.
using RateLoop = int64_t (*)(int64_t rounds, float* sink);
}  // namespace fc::cpu

#ifdef FC_TIER

#include "exp.h"

namespace fc::cpu::FC_TIER {
namespace {

constexpr int kRegisters = kRows * kVectors;

template <class Scheme>
int64_t multiply_loop(int64_t rounds, float* sink) {
  Vec<float> c[kRegisters] = {};
  alignas(64) typename Scheme::Right right[kLanes<float>] = {};
  typename Scheme::Left left{};
  asm volatile("" : "+m"(right), "+m"(left));
#if defined(__FMA__) || defined(__aarch64__)
  const auto step = [&](Vec<float>& total) { total = Scheme::step(total, left, right); };
#else
  Vec<float> factor = broadcast(left);
  const auto step = [&](Vec<float>& total) {
    in_register(factor);  // else one product would do for all
    total += factor * load(right);
  };
#endif
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 24
    for (int i = 0; i < kRegisters; ++i) step(c[i]);
  for (int i = 0; i < kRegisters; ++i) *sink += sum<float>(c[i]);
  return int64_t{2} * Scheme::kDepth * kRegisters * kLanes<float>;
}

[[maybe_unused]] int64_t exp_loop(int64_t rounds, float* sink) {
  Vec<float> x = broadcast<float>(-1.5f), total{};
  for (int64_t n = 0; n < rounds; ++n) {
    in_register(x);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) total += exponential<float>(x - static_cast<float>(i));
  }
  *sink += sum<float>(total);
  return int64_t{8} * kLanes<float>;
}

}  // namespace

RateLoop rate_loop(Rate rate) {
  switch (rate) {
#if defined(FC_BF16_DOTS)
    case Rate::bf16:
      return multiply_loop<Bf16Dot>;
#else
    case Rate::fma:
      return multiply_loop<Ieee<float> >;
    case Rate::exp:
      return exp_loop;
#endif
    default:
      return nullptr;
  }
}

}  // namespace fc::cpu::FC_TIER

#else  // the torch-facing half

#include <chrono>

namespace fc::cpu {

FC_TIERS(RateLoop, rate_loop, Rate)

namespace {

double cpu_rate(const std::string& kind, double seconds) {
  FC_CHECK(kind == "fma" || kind == "exp" || kind == "bf16", "kind is '", kind, "', expected 'fma', 'exp' or 'bf16'");
  check_positive("seconds", seconds);
  const Rate rate = kind == "fma" ? Rate::fma : kind == "exp" ? Rate::exp : Rate::bf16;
  const RateLoop loop = pick_rate_loop(rate);
  if (loop == nullptr) return 0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t rounds = 1 << 18;
  const int64_t threads = torch::stable::get_num_threads();
  double operations = 0;
  std::chrono::duration<double> taken{};
  for (const auto start = Clock::now(); taken < std::chrono::duration<double>(seconds);) {
    look_for_interrupt();
    int64_t of_a_round = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        volatile float sink = 0;
        float out = 0;
        const int64_t mine = loop(rounds, &out);
        sink = out;
        (void)sink;
        if (i == 0) of_a_round = mine;
      }
    });
    operations += static_cast<double>(of_a_round * rounds * threads);
    taken = Clock::now() - start;
  }
  return operations / taken.count();
}

}  // namespace
}  // namespace fc::cpu

STABLE_TORCH_LIBRARY_IMPL(pyfastcircuits, CompositeExplicitAutograd, m) {
  m.impl("cpu_rate", TORCH_BOX(&fc::cpu::cpu_rate));
}

#endif
