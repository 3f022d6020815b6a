// Stands in for CUDA's header of this name, so that the kernel sources compile as C++ and run on
// the CPU, one block after another. The threads of a block take turns, each until its next
// __syncthreads; with CUDA_SHIM_THREADS they are threads, so that a tool can look for races. (The
// kernels use no warp shuffles.)
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>
#if defined(CUDA_SHIM_THREADS)
#include <barrier>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // of the block that runs; all its threads see it

using cudaStream_t = void*;

// The device's memory is the process's own; a launch is over when it returns.
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaMemcpyDefault = 0;
inline cudaError_t cudaMalloc(void** at, size_t bytes) {
  return (*at = std::malloc(bytes)) ? cudaSuccess : 1;
}
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

constexpr int cudaDevAttrMultiProcessorCount = 0;
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = 132, cudaSuccess;
}  // an H100's

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads();

namespace cuda_shim {

// What was launched, in turn.
inline std::mutex notes_mutex;
inline std::vector<std::string> notes;

inline void note(std::string launched) {
  const std::lock_guard lock(notes_mutex);
  notes.push_back(std::move(launched));
}

inline std::vector<std::string> take_notes() {
  const std::lock_guard lock(notes_mutex);
  return std::exchange(notes, {});
}

// One thread's part of a launch: every block, with a barrier behind it, as the next one has the
// same shared memory.
template <typename Kernel>
void run_blocks(dim3 grid, dim3 block, unsigned t, const Kernel& kernel) {
  threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockDim = block, gridDim = grid, blockIdx = {x, y, z};
        kernel();
        __syncthreads();
      }
}

#if defined(CUDA_SHIM_THREADS)

inline std::barrier<>* barrier;

template <typename Kernel>
void launch(dim3 grid, dim3 block, const Kernel& kernel) {
  note(__PRETTY_FUNCTION__);
  const unsigned count = block.x * block.y * block.z;
  std::barrier<> all(count);
  barrier = &all;
  std::vector<std::thread> team;
  for (unsigned t = 0; t < count; ++t)
    team.emplace_back([=, &kernel] { run_blocks(grid, block, t, kernel); });
  for (auto& thread : team) thread.join();
}

#else

// Whoever comes to a barrier lets the next one run. All threads pass the same barriers: when it is
// the first one's turn again, all have come to this one. (A thread begins by its context and goes
// on by a jump, which asks no kernel.)
struct Thread {
  ucontext_t start;
  jmp_buf stopped;
  bool started = false;
};
struct Team {
  std::vector<Thread> threads;
  ucontext_t caller;
  size_t turn = 0;
  std::function<void(unsigned)> work;
};
inline Team* team;

inline void go_on() {
  auto& next = team->threads[team->turn];
  if (next.started) _longjmp(next.stopped, 1);
  next.started = true;
  setcontext(&next.start);
}

inline void pass_on() {
  auto& own = team->threads[team->turn];
  team->turn = (team->turn + 1) % team->threads.size();
  if (_setjmp(own.stopped) == 0) go_on();
}

inline void begin() {
  team->work(team->turn);
  if (++team->turn == team->threads.size()) setcontext(&team->caller);
  go_on();  // all end in the same round
}

template <typename Kernel>
void launch(dim3 grid, dim3 block, const Kernel& kernel) {
  note(__PRETTY_FUNCTION__);
  constexpr size_t stack_bytes = 1 << 16;
  const unsigned count = block.x * block.y * block.z;
  const auto stacks = std::make_unique_for_overwrite<char[]>(count * stack_bytes);
  Team all{.threads = std::vector<Thread>(count), .caller = {}, .turn = 0, .work = [&](unsigned t) {
             run_blocks(grid, block, t, kernel);
           }};
  team = &all;
  for (unsigned t = 0; t < count; ++t) {
    auto& start = all.threads[t].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.get() + t * stack_bytes;
    start.uc_stack.ss_size = stack_bytes;
    makecontext(&start, begin, 0);
  }
  all.threads[0].started = true;
  swapcontext(&all.caller, &all.threads[0].start);
}

#endif

}  // namespace cuda_shim

inline void __syncthreads() {
#if defined(CUDA_SHIM_THREADS)
  cuda_shim::barrier->arrive_and_wait();
#else
  const dim3 thread = threadIdx, block = blockIdx;
  cuda_shim::pass_on();
  threadIdx = thread, blockIdx = block;
#endif
}
