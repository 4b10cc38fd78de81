// CPU tiers. Every op file in this folder is compiled once for each tier, with that tier's flags and FC_TIER set to its
// name, and once without (the torch-facing half, which picks a tier at run time). Tier code must not instantiate
// library templates with external linkage: the linker would keep one tier's copy for all.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fc::cpu {

#define FC_OF_TIER(X, tier, ...) X(tier __VA_OPT__(, ) __VA_ARGS__)
#if defined(__x86_64__)
#define FC_FOR_EACH_TIER(X, ...)       \
  FC_OF_TIER(X, baseline, __VA_ARGS__) \
  FC_OF_TIER(X, avx2, __VA_ARGS__)     \
  FC_OF_TIER(X, avx512, __VA_ARGS__)   \
  FC_OF_TIER(X, avx512_bf16, __VA_ARGS__)
#elif defined(__aarch64__)
#define FC_FOR_EACH_TIER(X, ...)   \
  FC_OF_TIER(X, neon, __VA_ARGS__) \
  FC_OF_TIER(X, neon_bf16, __VA_ARGS__)
#else
#define FC_FOR_EACH_TIER(X, ...) FC_OF_TIER(X, baseline, __VA_ARGS__)
#endif

// Of this architecture, from the one that all its CPUs have to the best.
#define FC_TIER_VALUE(tier) tier,
enum class Tier { FC_FOR_EACH_TIER(FC_TIER_VALUE) };
#define FC_TIER_NAME(tier) #tier,
inline constexpr const char* kTierNames[] = {FC_FOR_EACH_TIER(FC_TIER_NAME)};
inline constexpr int kTiers = sizeof kTierNames / sizeof *kTierNames;
inline constexpr const char* kTierVariable = "PYFASTCIRCUITS_CPU_TIER";

#if defined(__APPLE__)
// What macOS says of this machine under a name; 0 where it knows none.
inline int64_t told_by_system(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
#endif

inline Tier best_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? Tier::avx512_bf16 : Tier::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Tier::avx2;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16, which old headers lack
  if (getauxval(AT_HWCAP2) & kBf16) return Tier::neon_bf16;
#elif defined(__aarch64__) && defined(__APPLE__)
  if (told_by_system("hw.optional.arm.FEAT_BF16")) return Tier::neon_bf16;
#endif
  return Tier{};
}

// The tier to which a tier of bfloat16 dot products adds these and nothing else; itself for others.
inline constexpr Tier base_of(Tier tier) {
#if defined(__x86_64__)
  return tier == Tier::avx512_bf16 ? Tier::avx512 : tier;
#elif defined(__aarch64__)
  return tier == Tier::neon_bf16 ? Tier::neon : tier;
#else
  return tier;
#endif
}

// Bytes of a vector, and across a packed panel of the right factor: three vectors.
inline constexpr int64_t vector_bytes([[maybe_unused]] Tier tier) {
#if defined(__x86_64__)
  return tier >= Tier::avx512 ? 64 : tier == Tier::avx2 ? 32 : 16;
#else
  return 16;
#endif
}
inline constexpr int64_t panel_bytes(Tier tier) { return 3 * vector_bytes(tier); }
inline constexpr int64_t kWidestPanel = panel_bytes(Tier{kTiers - 1}) / 4;  // columns, in fp32
inline constexpr int64_t kPanelsAStripe = 4;  // that a sweep packs together: long reads of the logits and the basis

// The level-1 data cache of every CPU that these tiers run on holds at least this much. Block sizes that have to be
// constants, because they decide the order of a sum, are chosen to fit it.
inline constexpr int64_t kSmallestL1 = 32 << 10;

// The tier in force: the best this CPU has, or the one named by PYFASTCIRCUITS_CPU_TIER.
inline Tier current_tier() {
  static const Tier best = best_tier();
  const char* forced = std::getenv(kTierVariable);
  if (forced == nullptr || *forced == '\0') return best;
  std::string names;
  for (int i = 0; i < kTiers; ++i) {
    names += (i == 0 ? "" : i == kTiers - 1 ? " or " : ", ") + std::string(kTierNames[i]);
    if (std::strcmp(forced, kTierNames[i]) != 0) continue;
    if (i > static_cast<int>(best))
      throw std::runtime_error(std::string(kTierVariable) + "=" + forced + ": this CPU has only " +
                               kTierNames[static_cast<int>(best)]);
    return static_cast<Tier>(i);
  }
  throw std::runtime_error(std::string(kTierVariable) + "=" + forced + ": expected " + names);
}

}  // namespace fc::cpu
