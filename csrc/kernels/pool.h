// 2-d max pooling that saves one byte for each value of its result: the offset of the maximum in
// its window, row·kernel[1] + column. PyTorch saves the input, and eight bytes for each value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>

#include <array>
#include <tuple>
#include <vector>

namespace [[gnu::visibility("default")]] fusedconvbn {

// The options of at::max_pool2d_with_indices, for both dimensions.
struct Pool {
  static constexpr int64_t most_offsets = 256;  // that fit into a byte

  std::array<int64_t, 2> kernel, stride, padding, dilation;
  bool ceil_mode;

  int64_t offsets() const { return kernel[0] * kernel[1]; }  // in a window
  // The index, in a map of `width`, at which the window of a pooled value begins. Negative if the
  // window begins in the padding before the map.
  int64_t first(int64_t row, int64_t column, int64_t width) const {
    return (row * stride[0] - padding[0]) * width + column * stride[1] - padding[1];
  }

  static Pool of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation, bool ceil_mode);
  // The form in which a Pool crosses the dispatcher.
  static Pool unpack(at::IntArrayRef packed);
  std::vector<int64_t> packed() const;

  // Values and indices, as PyTorch returns them.
  std::tuple<at::Tensor, at::Tensor> with_indices(const at::Tensor& input) const;
  // The gradient of the input, of which the sizes and the layout are read.
  at::Tensor backward_of_indices(const at::Tensor& dout, const at::Tensor& indices,
                                 const at::Tensor& input) const;
};

inline Pool Pool::of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, bool ceil_mode) {
  const auto pair = [](at::IntArrayRef v) { return std::array<int64_t, 2>{v[0], v[v.size() - 1]}; };
  return {pair(kernel), pair(stride.empty() ? kernel : stride), pair(padding), pair(dilation),
          ceil_mode};
}

inline Pool Pool::unpack(at::IntArrayRef v) {
  TORCH_CHECK_VALUE(
      v.size() == 9 && v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[6] > 0 && v[7] > 0,
      "expected the kernel, stride, padding and dilation of a window in two dimensions and "
      "ceil_mode, got ",
      v);
  const Pool pool{{v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}, v[8] != 0};
  TORCH_CHECK_VALUE(pool.offsets() <= most_offsets, "expected a window of at most ", most_offsets,
                    " values, got ", v);
  return pool;
}

inline std::vector<int64_t> Pool::packed() const {
  return {kernel[0],  kernel[1],   stride[0],   stride[1], padding[0],
          padding[1], dilation[0], dilation[1], ceil_mode};
}

inline std::tuple<at::Tensor, at::Tensor> Pool::with_indices(const at::Tensor& input) const {
  return at::max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode);
}

inline at::Tensor Pool::backward_of_indices(const at::Tensor& dout, const at::Tensor& indices,
                                            const at::Tensor& input) const {
  return at::max_pool2d_with_indices_backward(dout, input, kernel, stride, padding, dilation,
                                              ceil_mode, indices);
}

}  // namespace fusedconvbn
