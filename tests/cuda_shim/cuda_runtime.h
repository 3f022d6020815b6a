// Stands in for CUDA's header of this name, so that the kernel sources compile as C++ and run on the CPU: the threads
// of a block are threads, __syncthreads is a barrier, and the blocks run one after another. (The kernels use no warp
// shuffles.)
#pragma once

#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // of the block that runs; all its threads see it

using cudaStream_t = void*;

// The device's memory is the process's own; a launch is over when it returns.
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaMemcpyDefault = 0;
inline cudaError_t cudaMalloc(void** at, size_t bytes) { return (*at = std::malloc(bytes)) ? cudaSuccess : 1; }
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

inline std::barrier<>* barrier;

template <typename Kernel>
void launch(dim3 grid, dim3 block, const Kernel& kernel) {
  const unsigned count = block.x * block.y * block.z;
  std::barrier<> all(count);
  barrier = &all;
  std::vector<std::thread> team;
  for (unsigned t = 0; t < count; ++t) {
    team.emplace_back([&, t] {
      threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      blockDim = block;
      gridDim = grid;
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y, z};
            kernel();
            all.arrive_and_wait();  // the next block has the same shared memory
          }
    });
  }
  for (auto& thread : team) thread.join();
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::barrier->arrive_and_wait(); }
