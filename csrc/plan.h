// How a sweep is cut into tasks. Torch-free: the ops and the host module share it. No result depends on a plan, only
// speed and memory.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fc {

// A sweep over [pairs, positions] rows, cut into tasks of pair_block x position_block rows.
struct TilePlan {
  int64_t pair_block;
  int64_t position_block;
  int64_t tasks;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Even blocks: the fewest that are no longer than `longest`.
inline int64_t even_block(int64_t size, int64_t longest) { return ceil_div(size, ceil_div(size, longest)); }

// What a task keeps of a row beside its packed entries, and its share of a position's clean run: bytes.
inline constexpr int64_t kStateBytes = 160;

// The packed left rows of a task, `depth_bytes` each, and their state fill half the L2 cache: the other half is for
// what passes by, and for a neighbour on a shared one. Enough of them share a position's clean logits and a group's
// basis; blocks shrink until every thread has two tasks, of so many parts of the vocabulary each.
inline TilePlan plan_tiles(int64_t pairs, int64_t positions, int64_t depth_bytes, int64_t threads, int64_t l2_bytes,
                           int64_t parts = 1) {
  if (pairs == 0 || positions == 0) return {1, 1, 0};
  const int64_t rows = std::clamp<int64_t>(l2_bytes / 2 / (depth_bytes + kStateBytes), 64, 4096);
  const int64_t sharing = std::min<int64_t>(pairs, 16);  // ablations for which a position's clean run is worth making
  TilePlan plan{0, even_block(positions, std::clamp<int64_t>(rows / sharing, 16, 128)), 0};
  // As many blocks for every thread.
  const int64_t blocks = ceil_div(ceil_div(positions, plan.position_block), threads) * threads;
  if (positions >= 16 * blocks) plan.position_block = ceil_div(positions, blocks);
  plan.pair_block = even_block(pairs, std::max<int64_t>(1, rows / plan.position_block));
  const auto tasks = [&] { return ceil_div(pairs, plan.pair_block) * ceil_div(positions, plan.position_block); };
  while (tasks() * parts < 2 * threads && plan.position_block > 16)
    plan.position_block = ceil_div(plan.position_block, 2);
  while (tasks() * parts < 2 * threads && plan.pair_block > 8) plan.pair_block = ceil_div(plan.pair_block, 2);
  plan.tasks = tasks();
  return plan;
}

// The plan of work that only passes through the rows of the clean run: four tasks for every thread.
inline TilePlan plan_rows(int64_t pairs, int64_t positions, int64_t threads) {
  if (pairs == 0 || positions == 0) return {1, 1, 0};
  const int64_t block = ceil_div(positions, 4 * threads);
  return {pairs, block, ceil_div(positions, block)};
}

// The plan of a sweep whose ablations multiply their bases out: a task takes all positions of an ablation, since two
// tasks would make its basis twice. The packed rows fill half the L2 cache, beside what makes a basis; every thread has
// two tasks where there are as many ablations.
inline TilePlan plan_pairs(int64_t pairs, int64_t positions, int64_t depth_bytes, int64_t threads, int64_t l2_bytes) {
  if (pairs == 0 || positions == 0) return {1, 1, 0};
  const int64_t longest = std::max<int64_t>(1, l2_bytes / 2 / (positions * (depth_bytes + kStateBytes)));
  const int64_t block = even_block(pairs, std::min(longest, ceil_div(pairs, 2 * threads)));
  return {block, positions, ceil_div(pairs, block)};
}

}  // namespace fc
