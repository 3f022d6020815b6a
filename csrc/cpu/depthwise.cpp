// Depthwise convolutions and their gradients: slices the work for the loops of depthwise_loops.h.
#include "depthwise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

#include "depthwise_loops.h"

namespace fusedconvbn {
namespace {

using at::Tensor;
using cpu::DepthwiseShape;

constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
constexpr int64_t grain = 1 << 15;   // products that are worth a thread
constexpr int64_t most_slices = 16;  // of a weight gradient; they are summed in order

using LoopsFor = cpu::DepthwiseLoops (*)(int64_t kernel, int64_t stride);

// nullptr if the CPU has neither AVX2 nor AVX-512
const LoopsFor loops = cpu::with_isa([]<cpu::Isa isa>() -> LoopsFor {
  if constexpr (isa == cpu::Isa::baseline)
    return nullptr;
  else
    return cpu::depthwise_loops<isa>;
});

DepthwiseShape shape_of(const Conv& conv, const Tensor& input, const Tensor& weight) {
  const auto sizes = conv.output_sizes(input.sym_sizes(), weight.sym_sizes());
  return {input.size(0),         input.size(1),         input.size(2),  input.size(3),
          sizes[2].expect_int(), sizes[3].expect_int(), weight.size(2), conv.stride[0],
          conv.padding[0],       conv.padding[1]};
}

// The weight (C, 1, kernel, kernel) as (kernel, kernel, C), rotated by 180° if `rotated`.
Tensor channels_innermost(const Tensor& weight, bool rotated) {
  const auto taps = weight.permute({2, 3, 1, 0});
  return (rotated ? taps.flip({0, 1}) : taps).contiguous();
}

template <typename F>
void for_rows(const DepthwiseShape& s, int64_t rows, int64_t width, const F& f) {
  const int64_t products = width * s.channels * s.kernel * s.kernel;
  at::parallel_for(0, s.batch * rows, std::max<int64_t>(grain / products, 1), f);
}

Tensor convolve(const DepthwiseShape& s, const Tensor& in, const Tensor& weight, bool rotated) {
  auto out = at::empty({s.batch, s.channels, s.out_height, s.out_width},
                       in.options().memory_format(channels_last));
  const auto taps = channels_innermost(weight, rotated);
  for_rows(s, s.out_height, s.out_width, [&](int64_t begin, int64_t end) {
    loops(s.kernel, s.stride)
        .forward(s, begin, end, in.const_data_ptr<float>(), taps.const_data_ptr<float>(),
                 out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace

bool depthwise_applies(const Conv& conv, const Tensor& input, const Tensor& weight) {
  return input.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
         is_depthwise(conv, input, weight);
}

bool is_depthwise(const Conv& conv, const Tensor& input, const Tensor& weight) {
  if (!input.is_cpu() || input.dim() != 4 || conv.transposed) return false;
  const int64_t channels = input.size(1), kernel = weight.size(2), stride = conv.stride[0];
  return conv.groups == channels && weight.size(0) == channels && weight.size(1) == 1 &&
         channels >= 16 && channels <= cpu::most_channels && (kernel == 3 || kernel == 5) &&
         weight.size(3) == kernel && (stride == 1 || stride == 2) && conv.stride[1] == stride &&
         conv.dilation[0] == 1 && conv.dilation[1] == 1 && conv.padding[0] < kernel &&
         conv.padding[1] < kernel && input.is_contiguous(channels_last) && input.numel() > 0 &&
         loops;
}

Tensor depthwise(const Conv& conv, const Tensor& input, const Tensor& weight) {
  return convolve(shape_of(conv, input, weight), input, weight, /*rotated=*/false);
}

Tensor depthwise_grad_input(const Conv& conv, const Tensor& dout, const Tensor& input,
                            const Tensor& weight) {
  const auto gradient = dout.contiguous(channels_last);
  auto s = shape_of(conv, input, weight);
  if (s.stride == 1) {  // the convolution of dout with the rotated weight
    std::swap(s.height, s.out_height);
    std::swap(s.width, s.out_width);
    s.pad_height = s.kernel - 1 - s.pad_height;
    s.pad_width = s.kernel - 1 - s.pad_width;
    return convolve(s, gradient, weight, /*rotated=*/true);
  }
  auto din = at::empty_like(input);
  const auto taps = channels_innermost(weight, /*rotated=*/false);
  for_rows(s, s.height, s.width, [&](int64_t begin, int64_t end) {
    loops(s.kernel, s.stride)
        .grad_input(s, begin, end, gradient.const_data_ptr<float>(), taps.const_data_ptr<float>(),
                    din.mutable_data_ptr<float>());
  });
  return din;
}

Tensor depthwise_grad_weight(const Conv& conv, const Tensor& dout, const Tensor& input,
                             const Tensor& weight) {
  const auto gradient = dout.contiguous(channels_last);
  const auto s = shape_of(conv, input, weight);
  const int64_t kernel = s.kernel;
  const int64_t rows = s.batch * s.out_height, size = kernel * kernel * s.channels;
  const int64_t slices =
      std::clamp<int64_t>(rows * s.out_width * size / grain, 1, std::min(rows, most_slices));
  const int64_t length = at::divup(rows, slices);
  std::vector<double> sums(slices * size);
  at::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice)
      loops(kernel, s.stride)
          .grad_weight(s, std::min(rows, slice * length), std::min(rows, (slice + 1) * length),
                       gradient.const_data_ptr<float>(), input.const_data_ptr<float>(),
                       sums.data() + slice * size);
  });
  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[slice * size + i];
  auto dweight = at::empty(weight.sizes(), weight.options().memory_format(channels_last));
  auto* const to = dweight.mutable_data_ptr<float>();
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t q = 0; q < kernel * kernel; ++q)
      to[c * kernel * kernel + q] = float(sums[q * s.channels + c]);
  return dweight;
}

}  // namespace fusedconvbn
