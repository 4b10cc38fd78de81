// The blocks that each thread keeps: of all sizes that a task takes, and no more bytes than a few tasks.
#include "blocks.h"

#ifndef FC_TIER

#include <cstdlib>
#include <cstring>
#include <new>

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kKept = 0;  // it is to see what is used after a task
#else
constexpr size_t kKept = size_t{2} << 20;
#endif
constexpr size_t kSmallest = 4096;  // the C library keeps what is smaller

size_t whole_lines(size_t bytes) { return (bytes + 127) / 64 * 64; }

struct Kept {
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr int kMost = 32;

  Block blocks[kMost];  // the longest unused first
  int count = 0;
  size_t size = 0;

  ~Kept() {
    for (int i = 0; i < count; ++i) std::free(blocks[i].data);
  }
  Block out(int i) {
    const Block block = blocks[i];
    --count;
    size -= block.size;
    std::memmove(blocks + i, blocks + i + 1, static_cast<size_t>(count - i) * sizeof(Block));
    return block;
  }
};

thread_local Kept kept;

}  // namespace

namespace fc::cpu {

void* take_block(size_t bytes) {
  const size_t size = whole_lines(bytes);
  for (int i = kept.count - 1; i >= 0; --i)
    if (kept.blocks[i].size == size) return kept.out(i).data;
  void* const data = std::aligned_alloc(64, size);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void give_block(void* block, size_t bytes) {
  const size_t size = whole_lines(bytes);
  if (size < kSmallest || size > kKept) return std::free(block);
  while (kept.count == Kept::kMost || kept.size + size > kKept) std::free(kept.out(0).data);
  kept.blocks[kept.count++] = {block, size};
  kept.size += size;
}

}  // namespace fc::cpu

#endif
