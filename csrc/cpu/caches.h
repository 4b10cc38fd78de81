// How large this machine's data caches are. The ops cut their work into blocks that fit; no result depends on it, only
// speed. Torch-free: the host module reports the same figures.
#pragma once

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>

#include "isa.h"

namespace fc::cpu {

inline constexpr int64_t kUnknownL2 = 1 << 20;  // what is assumed where the system does not tell

struct Caches {
  int64_t l1, l2;  // bytes of one core's level-1 data cache and level-2 cache
};

// Bytes of the first CPU's cache of a level as Linux describes it, for C libraries whose sysconf() says 0; else 0.
inline int64_t described_cache(int level) {
  for (int i = 0; i < 8; ++i) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i);
    int at = 0;
    std::string type;
    int64_t kibibytes = 0;
    std::ifstream(folder + "/level") >> at;
    std::ifstream(folder + "/type") >> type;
    std::ifstream(folder + "/size") >> kibibytes;  // "512K"
    if (at == level && type != "Instruction") return kibibytes << 10;
  }
  return 0;
}

// Read once. A level-2 cache larger than 4 MiB is shared by several cores.
inline const Caches& caches() {
  static const Caches found = [] {
    int64_t l1 = 0, l2 = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#elif defined(__APPLE__)
    l1 = told_by_system("hw.l1dcachesize"), l2 = told_by_system("hw.l2cachesize");
#endif
    if (l1 <= 0) l1 = described_cache(1);
    if (l2 <= 0) l2 = described_cache(2);
    return Caches{std::max(l1, kSmallestL1), l2 <= 0 ? kUnknownL2 : std::clamp<int64_t>(l2, 256 << 10, 4 << 20)};
  }();
  return found;
}

}  // namespace fc::cpu
