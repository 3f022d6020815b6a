// Depthwise convolutions of channels-last maps in float, on raw pointers.
//
// depthwise_loops_impl.h is compiled once per instruction set. depthwise_loops returns the table of
// one instruction set.
#pragma once

#include <cstdint>

#include "isa.h"
#include "most_channels.h"

namespace fusedconvbn::cpu {

// The kernel is square and the stride the same in both dimensions; the padding may differ.
// `channels` is at least 16, the values of the widest vector.
struct DepthwiseShape {
  int64_t batch, channels, height, width, out_height, out_width, kernel, stride, pad_height,
      pad_width;
};

// Weights and their sums are (kernel, kernel, channels).
struct DepthwiseLoops {
  // Computes rows [begin, end) of the result, counted over all samples.
  void (*forward)(const DepthwiseShape&, int64_t begin, int64_t end, const float* in,
                  const float* weight, float* out);
  // Computes rows [begin, end) of the input gradient, counted over all samples.
  void (*grad_input)(const DepthwiseShape&, int64_t begin, int64_t end, const float* dout,
                     const float* weight, float* din);
  // Adds the contribution of rows [begin, end) of dout to the weight gradient.
  void (*grad_weight)(const DepthwiseShape&, int64_t begin, int64_t end, const float* dout,
                      const float* in, double* sums);
};

// `kernel` is 3 or 5, `stride` 1 or 2.
template <Isa isa>  // avx2 or avx512
DepthwiseLoops depthwise_loops(int64_t kernel, int64_t stride);

}  // namespace fusedconvbn::cpu
