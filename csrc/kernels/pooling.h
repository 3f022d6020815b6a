// Max pooling in two dimensions that keeps for backward one byte for each value of its result: the
// place in the window that it was found at, row·kernel[1] + column. PyTorch keeps the input, and
// eight bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

namespace [[gnu::visibility("default")]] fusedconvbn {

// As at::max_pool2d, which it is where the window has more places than a byte can tell apart.
at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

// Of at::max_pool2d_with_indices: its options in both dimensions.
struct Pool {
  static constexpr int64_t most_places = 256;  // that a byte can tell apart

  std::array<int64_t, 2> kernel, stride, padding, dilation;
  bool ceil_mode;

  int64_t places() const { return kernel[0] * kernel[1]; }
  // Where the window of a pooled value begins in a map of `width`; in the padding, that may be in
  // front of it.
  int64_t first(int64_t row, int64_t column, int64_t width) const {
    return (row * stride[0] - padding[0]) * width + column * stride[1] - padding[1];
  }

  static Pool of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation, bool ceil_mode);
  static Pool unpack(at::IntArrayRef packed);  // as it crosses the dispatcher
  std::vector<int64_t> packed() const;

  // Values and indices, as PyTorch's.
  std::tuple<at::Tensor, at::Tensor> with_indices(const at::Tensor& input) const;
  // Of an input of `sizes`; in operators that autograd knows.
  at::Tensor backward_of_indices(const at::Tensor& dout, const at::Tensor& indices,
                                 c10::SymIntArrayRef sizes, bool channels_last) const;
};

}  // namespace fusedconvbn
