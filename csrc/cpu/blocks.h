// Memory of a task, which a thread keeps for its next one. The C library gives so much, freed at once, back to the
// system, and to be given its pages again took 2 to 4% of a short sweep.
#pragma once

#include <cstddef>

namespace fc::cpu {

// So many bytes, aligned for vectors; what they hold is not defined.
void* take_block(size_t bytes);

// Back from the thread that took them.
void give_block(void* block, size_t bytes);

}  // namespace fc::cpu
