// Max pooling in two dimensions that keeps for backward one byte for each value of its result: the place in the window
// that it was found at. PyTorch keeps the input, and eight bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace fusedconvbn {

// As at::max_pool2d, which it is where the window has more than 256 places.
at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

// Of at::max_pool2d_with_indices: its options in both dimensions.
struct PoolWindow {
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  static PoolWindow of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation);
  static PoolWindow unpack(at::IntArrayRef packed);
  std::vector<int64_t> packed() const;
};

// Between places in a map of `width`, row·width + column in int64, and those in the window, row·kernel[1] + column, a
// byte. Both tensors have the sizes and strides of the pooled map.
at::Tensor places_in_window(const at::Tensor& indices, at::IntArrayRef window, c10::SymInt width);
at::Tensor places_in_map(const at::Tensor& places, at::IntArrayRef window, c10::SymInt width);

}  // namespace fusedconvbn
