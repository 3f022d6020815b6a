// 3×3 convolutions of stride 1 on CPU by Winograd's algorithm (winograd_loops.h), in float and
// channels last.
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/conv.h"

namespace fusedconvbn {

// Whether the functions below support a float convolution with these options and weight sizes.
bool winograd_takes(const Conv& conv, at::IntArrayRef weight);

// Whether they also support this map and are faster than oneDNN.
bool winograd_applies(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

at::Tensor winograd(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
at::Tensor winograd_grad_input(const Conv& conv, const at::Tensor& dout, const at::Tensor& weight);
at::Tensor winograd_grad_weight(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                const at::Tensor& weight);

}  // namespace fusedconvbn
