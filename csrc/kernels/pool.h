// Max pooling in two dimensions that saves one byte for each value of its result: the offset of the
// maximum in its window, row·kernel[1] + column. PyTorch saves the input, and eight bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

namespace [[gnu::visibility("default")]] fusedconvbn {

// Of at::max_pool2d_with_indices: its options in both dimensions.
struct Pool {
  static constexpr int64_t most_offsets = 256;  // that a byte can tell apart

  std::array<int64_t, 2> kernel, stride, padding, dilation;
  bool ceil_mode;

  int64_t offsets() const { return kernel[0] * kernel[1]; }  // of its window
  // The index in a map of `width` at which the window of a pooled value begins; negative where
  // padding comes first.
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
