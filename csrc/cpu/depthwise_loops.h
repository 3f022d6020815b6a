// Depthwise convolutions of channels-last maps in float, on raw pointers.
//
// depthwise_loops_impl.h is compiled once per instruction set; depthwise_loops returns the table
// of one.
#pragma once

#include <cstdint>

#include "isa.h"
#include "most_channels.h"

namespace fusedconvbn::cpu {

// A square kernel and one stride; the padding may differ. `channels` is at least a vector, of 16
// values.
struct DepthwiseShape {
  int64_t batch, channels, height, width, out_height, out_width, kernel, stride, pad_height,
      pad_width;
};

// Weights and their sums are (kernel, kernel, channels).
struct DepthwiseLoops {
  // Rows [begin, end) of all samples of the result.
  void (*forward)(const DepthwiseShape&, int64_t begin, int64_t end, const float* in,
                  const float* weight, float* out);
  // Rows [begin, end) of all samples of the input gradient.
  void (*grad_input)(const DepthwiseShape&, int64_t begin, int64_t end, const float* dout,
                     const float* weight, float* din);
  // sums += what rows [begin, end) of dout contribute to the weight gradient
  void (*grad_weight)(const DepthwiseShape&, int64_t begin, int64_t end, const float* dout,
                      const float* in, double* sums);
};

// For a kernel of 3 or 5 and a stride of 1 or 2.
template <Isa isa>  // avx2 or avx512
DepthwiseLoops depthwise_loops(int64_t kernel, int64_t stride);

}  // namespace fusedconvbn::cpu
