// Launches a kernel: kernel<<<grid, block, 0, stream>>>(args…) or, in plain C++, the launch of the
// test shim.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace fusedconvbn::cuda {

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
            [[maybe_unused]] cudaStream_t stream, Args&&... args) {
#if defined(__CUDACC__)
  kernel<<<grid, block, 0, stream>>>(std::forward<Args>(args)...);
#else
  cuda_shim::launch(grid, block, [&] { kernel(args...); });
#endif
}

}  // namespace fusedconvbn::cuda
