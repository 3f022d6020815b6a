// The dtype of a tensor in the enumeration of the CUDA kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "channel_launch.h"

namespace fusedconvbn::cuda {

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      TORCH_INTERNAL_ASSERT(t.scalar_type() == at::kHalf, "a tensor of ", t.scalar_type(),
                            " reached a kernel");
      return Dtype::f16;
  }
}

}  // namespace fusedconvbn::cuda
