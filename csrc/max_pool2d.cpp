// The public operator max_pool2d, which saves a byte for each value of its result (kernels/pool.h).
// It is composite, as conv_bn is.
#include <ATen/ops/max_pool2d.h>

#include "chain/dispatch.h"
#include "chain/tensors.h"
#include "kernels/pool.h"
#include "ops.h"

namespace fusedconvbn {

using at::Tensor;

Tensor max_pool2d(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto known = [](at::IntArrayRef v) { return v.size() == 1 || v.size() == 2; };
  if (any_requires_grad(input) && input.dim() == 4 && !needs_unfused(input) && known(kernel_size) &&
      (stride.empty() || known(stride)) && known(padding) && known(dilation)) {
    const auto pool = Pool::of(kernel_size, stride, padding, dilation, ceil_mode);
    if (pool.offsets() <= Pool::most_offsets)
      return std::get<0>(max_pool2d_with_offsets(input, pool.packed()));
  }
  // at::max_pool2d also raises the errors for arguments that are wrong.
  return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
}

}  // namespace fusedconvbn
