// Max pooling (kernels/pool.h) on raw device pointers. The calls queue their work on the stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "channel_launch.h"

namespace fusedconvbn::cuda {

// samples × height × width × channels values in memory. The planes of a contiguous map count as
// samples of one channel.
struct PoolMap {
  Dtype dtype;
  int64_t samples, height, width, channels, pooled_height, pooled_width;
};

// [0] is for rows, [1] for columns.
struct PoolWindow {
  int kernel[2], stride[2], padding[2], dilation[2];
};

void max_pool2d(const PoolMap&, const PoolWindow&, const void* input, void* output,
                uint8_t* offsets, cudaStream_t);
void max_pool2d_backward(const PoolMap&, const PoolWindow&, const void* dout,
                         const uint8_t* offsets, void* dinput, cudaStream_t);

}  // namespace fusedconvbn::cuda
