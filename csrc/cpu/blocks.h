// Memory of a task, which a thread keeps for its next one: so much, freed at once, the C library would give back to the
// system, and a short task would spend much of its time on being given the pages again.
#pragma once

#include <cstddef>

namespace fc::cpu {

// So many bytes, aligned for vectors; what they hold is not defined.
void* take_block(size_t bytes);

// Back from the thread that took them.
void give_block(void* block, size_t bytes);

}  // namespace fc::cpu
