// Memory for the large maps of chains that is kept when a map is freed, for the next one.
//
// glibc gives a large block back to the kernel when it is freed, and the next one costs a page
// fault for every 4 KiB: more than a pass over it. A chain with little kept in forward frees and
// allocates its maps all the time.
#pragma once

#include <cstdint>

namespace fusedconvbn {

// While one is alive, what its thread allocates through ATen on the CPU comes from the arena, if it
// is large. It goes back there when it is freed, whenever and by whomever.
class ArenaScope {
 public:
  ArenaScope();
  ~ArenaScope();
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  bool outer_;
};

// Gives the pages that no tensor is in back to the system. Returns their bytes.
int64_t empty_arena();

}  // namespace fusedconvbn
