#include "pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>

namespace fusedconvbn {

using at::Tensor;

Pool Pool::of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
              at::IntArrayRef dilation, bool ceil_mode) {
  const auto pair = [](at::IntArrayRef v) { return std::array<int64_t, 2>{v[0], v[v.size() - 1]}; };
  return {pair(kernel), pair(stride.empty() ? kernel : stride), pair(padding), pair(dilation),
          ceil_mode};
}

Pool Pool::unpack(at::IntArrayRef v) {
  TORCH_CHECK_VALUE(
      v.size() == 9 && v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[6] > 0 && v[7] > 0,
      "expected the kernel, stride, padding and dilation of a window in two dimensions and "
      "ceil_mode, "
      "got ",
      v);
  const Pool pool{{v[0], v[1]}, {v[2], v[3]}, {v[4], v[5]}, {v[6], v[7]}, v[8] != 0};
  TORCH_CHECK_VALUE(pool.offsets() <= most_offsets, "expected a window of at most ", most_offsets,
                    " values, got ", v);
  return pool;
}

std::vector<int64_t> Pool::packed() const {
  return {kernel[0],  kernel[1],   stride[0],   stride[1], padding[0],
          padding[1], dilation[0], dilation[1], ceil_mode};
}

std::tuple<Tensor, Tensor> Pool::with_indices(const Tensor& input) const {
  return at::max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode);
}

Tensor Pool::backward_of_indices(const Tensor& dout, const Tensor& indices,
                                 c10::SymIntArrayRef sizes, bool channels_last) const {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto input = at::empty_symint(sizes, dout.options().memory_format(format));  // not read
  return at::max_pool2d_with_indices_backward(dout, input, kernel, stride, padding, dilation,
                                              ceil_mode, indices);
}

}  // namespace fusedconvbn
