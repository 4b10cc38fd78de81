// Scratch that threads share. For the torch-facing halves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fc::cpu {

// A block of memory, aligned for vectors. A large one lies in huge pages, since tens of megabytes in small pages cost
// milliseconds. Pages that the kernel has to clear cost as much again, so large blocks are kept for later calls, kKept
// bytes of them at most; the kernel may take their pages back whenever it wants some.
class HugeScratch {
 public:
  explicit HugeScratch(int64_t bytes) : block(take(static_cast<size_t>(bytes))) {}
  ~HugeScratch() { give(block); }
  HugeScratch(const HugeScratch&) = delete;
  HugeScratch& operator=(const HugeScratch&) = delete;
  void* data() const { return block.data; }

 private:
  static constexpr size_t kHuge = size_t{2} << 20, kLarge = 2 * kHuge, kKept = size_t{256} << 20;
  struct Block {
    void* data;
    size_t size;
  };
  struct Kept {
    std::mutex mutex;
    std::vector<Block> blocks;  // the longest unused first

    Kept() { blocks.reserve(kKept / kLarge + 1); }  // as many as there can be: giving one back does not throw
  };
  static Kept& kept() {
    static auto* const kept = new Kept;  // never destroyed: threads may outlive static objects
    return *kept;
  }

  static Block take(size_t bytes) {
    if (bytes >= kLarge) {
      const std::lock_guard<std::mutex> lock(kept().mutex);
      auto& blocks = kept().blocks;
      const auto fits = [&](const Block& b) { return b.size >= bytes && b.size / 2 <= bytes; };
      const auto found = std::find_if(blocks.begin(), blocks.end(), fits);
      if (found != blocks.end()) {
        const Block block = *found;
        blocks.erase(found);
        return block;
      }
    }
    const size_t alignment = bytes < kLarge ? 64 : kHuge, size = (bytes + alignment) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, size);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHuge) madvise(data, size, MADV_HUGEPAGE);
#endif
    return {data, size};
  }

  static void give(const Block& block) {
    if (block.size < kLarge || block.size > kKept || !offered(block)) return std::free(block.data);
    const std::lock_guard<std::mutex> lock(kept().mutex);
    auto& blocks = kept().blocks;
    blocks.push_back(block);
    size_t size = 0;
    for (const Block& b : blocks) size += b.size;
    for (; size > kKept; blocks.erase(blocks.begin())) {
      size -= blocks.front().size;
      std::free(blocks.front().data);
    }
  }

  // Whether the kernel takes the pages back on demand.
  static bool offered([[maybe_unused]] const Block& block) {
#if defined(__linux__)
    return madvise(block.data, block.size, MADV_FREE) == 0;
#else
    return false;
#endif
  }

  Block block;
};

}  // namespace fc::cpu
