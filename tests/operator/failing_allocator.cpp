// A CPU allocator whose n-th allocation fails, for tests/operator/test_trust.py.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <limits>
#include <new>

namespace {

constexpr long never = std::numeric_limits<long>::max();
std::atomic<long> left = never;

struct FailingAllocator final : c10::Allocator {
  explicit FailingAllocator(c10::Allocator* real) : real(real) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (left != never && --left < 0) throw std::bad_alloc();
    return real->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return real->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    real->copy_data(to, from, bytes);
  }

  c10::Allocator* real;
};

}  // namespace

extern "C" {

void install() {
  static FailingAllocator allocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(&allocator, /*priority=*/200);
}

// Lets `count` allocations pass and fails all after them; none with a negative count. Returns how
// many were left.
long allow(long count) { return left.exchange(count < 0 ? never : count); }
}
