// The backward of a norm link behind a 1×1 convolution without T = W·X, the map between them, which is wider than X.
//
//   C = X − mean of X      T − μ = W·C      G = Σ du·Cᵀ      K = Σ C·Cᵀ
//
//   S2 = Σ du·(T − μ) = Σ W·G, over the channels of X
//   dT = a·du + slope·(T − μ) + offset                        slope, offset: channel_vectors.h
//   dW = Σ dT·Xᵀ = Σ dT·Cᵀ = a·G + slope·(W·K)                as Σ dT = 0
//   dX = Wᵀ·dT = (a·W)ᵀ·du + Wᵀ·(slope·W)·C + Wᵀ·offset
//
// K and the second term of dX have as many rows as X has channels, where T has many more: together they take less time
// than T does to be made again.
#pragma once

#include <ATen/core/Tensor.h>

#include "convolution.h"

namespace fusedconvbn {

// Whether it can be done, and takes less time, for a convolution whose result has a gradient like `dout`.
bool pointwise_applies(const Conv& conv, const at::Tensor& dout, const at::Tensor& weight);

class Pointwise {
 public:
  Pointwise(const Conv& conv, const at::Tensor& du, const at::Tensor& centred, const at::Tensor& weight);

  at::Tensor dots() const;  // S2
  at::Tensor grad_weight(const at::Tensor& scale, const at::Tensor& slope) const;
  at::Tensor grad_input(const at::Tensor& scale, const at::Tensor& slope, const at::Tensor& offset) const;

 private:
  at::Tensor products(const at::Tensor& a) const;  // Σ a·Cᵀ

  const Conv& conv_;
  at::Tensor du_, centred_, weight_, products_;  // W and G as matrices
};

}  // namespace fusedconvbn
