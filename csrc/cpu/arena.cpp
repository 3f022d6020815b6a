// The arena, and the allocator that puts it in front of PyTorch's CPU allocator.
#include "arena.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

// Memory from the arena would hide errors from the address sanitizer.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define FUSEDCONVBN_ARENA 1
#endif

namespace fusedconvbn {
namespace {

thread_local bool in_scope = false;

#ifdef FUSEDCONVBN_ARENA

constexpr size_t smallest = 1 << 20;  // bytes; the arena serves no smaller allocation
constexpr size_t page = 2 << 20;      // a huge page, for far fewer page faults and TLB misses

constexpr size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// A range of addresses as large as the machine's memory. A block is taken at the lowest address
// where it fits, so the touched pages stay together at the low end.
class Arena {
 public:
  Arena() {
    const size_t bytes = rounded_up(size_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE), page);
    void* const range = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return;  // e.g. ulimit -v: the arena is empty and serves no request
    begin_ = reinterpret_cast<char*>(rounded_up(reinterpret_cast<size_t>(range), page));
    size_ = bytes;
    madvise(begin_, size_, MADV_HUGEPAGE);
    free_[begin_] = size_;
  }

  bool owns(const void* block) const { return block >= begin_ && block < begin_ + size_; }

  // nullptr if there is no room
  void* take(size_t bytes) {
    bytes = rounded_up(bytes, 4096);
    const std::lock_guard lock(mutex_);
    const auto hole = std::find_if(free_.begin(), free_.end(),
                                   [&](const auto& hole) { return hole.second >= bytes; });
    if (hole == free_.end()) return nullptr;
    const auto [at, room] = *hole;
    free_.erase(hole);
    if (room > bytes) free_[at + bytes] = room - bytes;
    used_[at] = bytes;
    touched_ = std::max(touched_, at + bytes);
    return at;
  }

  void give_back(void* block) {
    const std::lock_guard lock(mutex_);
    const auto used = used_.find(static_cast<char*>(block));
    auto [at, bytes] = *used;
    used_.erase(used);
    auto next = free_.lower_bound(at);
    if (next != free_.end() && at + bytes == next->first) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        before->second += bytes;
        return;
      }
    }
    free_[at] = bytes;
  }

  std::mutex& mutex() { return mutex_; }

  size_t empty() {
    const std::lock_guard lock(mutex_);
    size_t given_back = 0;
    for (const auto& [at, bytes] : free_) {
      const auto end = std::min(at + bytes, touched_);
      if (end <= at) break;
      given_back += end - at;
      madvise(at, end - at, MADV_DONTNEED);
    }
    touched_ = used_.empty() ? begin_ : used_.rbegin()->first + used_.rbegin()->second;
    return given_back;
  }

 private:
  char* begin_ = nullptr;
  size_t size_ = 0;
  char* touched_ = nullptr;  // the end of the touched pages
  std::mutex mutex_;
  std::map<char*, size_t> free_, used_;  // address → bytes; neighbours in free_ are merged
};

Arena& arena = *new Arena;  // outlives every tensor

void give_back(void* block) {
  c10::profiledCPUMemoryReporter().Delete(block);
  arena.give_back(block);
}

// Wraps the allocator that was installed before, and passes on to it every request that is small or
// comes from outside a scope.
class ArenaAllocator final : public c10::Allocator {
 public:
  static c10::Allocator*& before() {
    static c10::Allocator* allocator = nullptr;
    return allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* const block = in_scope && bytes >= smallest ? arena.take(bytes) : nullptr;
    if (!block) return before()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give_back, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    if (!before()->raw_deleter()) return nullptr;
    return
        [](void* block) { arena.owns(block) ? give_back(block) : before()->raw_deleter()(block); };
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    before()->copy_data(to, from, bytes);
  }
};

[[maybe_unused]] const bool installed = [] {
  ArenaAllocator::before() = c10::GetCPUAllocator();
  c10::SetCPUAllocator(new ArenaAllocator, /*priority=*/1);
  // A forked process has only the thread that forked. A mutex that another thread held would stay
  // locked for ever.
  pthread_atfork([] { arena.mutex().lock(); }, [] { arena.mutex().unlock(); },
                 [] { arena.mutex().unlock(); });
  return true;
}();

#endif

}  // namespace

ArenaScope::ArenaScope() : outer_(std::exchange(in_scope, true)) {}
ArenaScope::~ArenaScope() { in_scope = outer_; }

int64_t empty_arena() {
#ifdef FUSEDCONVBN_ARENA
  return int64_t(arena.empty());
#else
  return 0;
#endif
}

}  // namespace fusedconvbn
