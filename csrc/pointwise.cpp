#include "pointwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

namespace fusedconvbn {

using at::Tensor;

namespace {

Tensor column(const Tensor& t) { return t.unsqueeze(1); }

// As the weight of a 1×1 convolution of `map`.
Tensor kernel(const Tensor& matrix, const Tensor& map) {
  auto sizes = matrix.sizes().vec();
  sizes.resize(map.dim(), 1);
  return matrix.view(sizes);
}

}  // namespace

bool pointwise_applies(const Conv& conv, const Tensor& dout, const Tensor& weight) {
  const bool plain = !conv.transposed && conv.groups == 1 && all(conv.stride, 1) && all(conv.padding, 0) &&
                     all(weight.sizes().slice(2), 1);
  // Not where products are rounded (to a half type, or, on a GPU, to TF32): of G and of K a difference is taken.
  const bool exact = dout.is_cpu() && (dout.scalar_type() == at::kFloat || dout.scalar_type() == at::kDouble);
  if (!plain || !exact) return false;
  // Beside the products that make T: those of K and with Wᵀ·W, and, per channel and not per value, W·K and Wᵀ·W.
  const double in = weight.size(1), out = weight.size(0), count = double(dout.numel()) / out;
  return 2 * in / out + 2 * in / count < 0.9;
}

Pointwise::Pointwise(const Conv& conv, const Tensor& du, const Tensor& centred, const Tensor& weight)
    : conv_(conv), du_(du), centred_(centred), weight_(weight.flatten(1)), products_(products(du)) {}

Tensor Pointwise::products(const Tensor& a) const {
  const auto like = kernel(at::empty({a.size(1), centred_.size(1)}, weight_.options()), centred_);
  return std::get<1>(convolution_backward(conv_, a, centred_, like, {false, true, false})).flatten(1);
}

Tensor Pointwise::dots() const { return (weight_ * products_).sum(1); }

Tensor Pointwise::grad_weight(const Tensor& scale, const Tensor& slope) const {
  return kernel(column(scale) * products_ + column(slope) * at::mm(weight_, products(centred_)), centred_);
}

Tensor Pointwise::grad_input(const Tensor& scale, const Tensor& slope, const Tensor& offset) const {
  const auto square = at::mm(weight_.t(), column(slope) * weight_);
  auto [din, dweight, dbias] =
      convolution_backward(conv_, du_, centred_, kernel(column(scale) * weight_, centred_), {true, false, false});
  return din.add_(convolution(conv_, centred_, kernel(square, centred_), at::mv(weight_.t(), offset)));
}

}  // namespace fusedconvbn
