// Max pooling (pooling.h) on raw device pointers; each call puts its work on `stream` and returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "channel_launch.h"

namespace fusedconvbn::cuda {

// samples × height × width × channels values in memory. Contiguous planes are samples of one
// channel.
struct PoolMap {
  Dtype dtype;
  int64_t samples, height, width, channels, pooled_height, pooled_width;
};

// In rows and columns.
struct PoolWindow {
  int kernel[2], stride[2], padding[2], dilation[2];
};

void max_pool2d(const PoolMap&, const PoolWindow&, const void* input, void* output,
                uint8_t* offsets, cudaStream_t);
void max_pool2d_backward(const PoolMap&, const PoolWindow&, const void* dout,
                         const uint8_t* offsets, void* dinput, cudaStream_t);

}  // namespace fusedconvbn::cuda
