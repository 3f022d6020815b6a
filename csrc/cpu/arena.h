// An arena for the large maps of chains: it keeps the memory of a freed map for the next one.
//
// glibc returns a large block to the kernel when it is freed, and the next block then costs a page
// fault for every 4 KiB, which takes longer than a pass over it. A chain that saves few maps frees
// and allocates maps all the time.
#pragma once

#include <cstdint>

namespace fusedconvbn {

// While a scope is alive, large allocations that its thread makes through ATen on the CPU come from
// the arena. They return to it when they are freed, on whichever thread that happens.
class ArenaScope {
 public:
  ArenaScope();
  ~ArenaScope();
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  bool outer_;
};

// Returns the pages that hold no tensor to the system. The result is their size in bytes.
int64_t empty_arena();

}  // namespace fusedconvbn
