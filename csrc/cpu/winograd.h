// 3×3 convolutions of stride 1 on CPU in float, channels last, by Winograd's algorithm
// (winograd_loops.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/conv.h"

namespace fusedconvbn {

// Whether the functions below take a convolution of stride 1 in float, by its options and the sizes
// of its weight alone.
bool winograd_takes(const Conv& conv, at::IntArrayRef weight);

// Whether they also take this map, and win.
bool winograd_applies(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

at::Tensor winograd(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
at::Tensor winograd_grad_input(const Conv& conv, const at::Tensor& dout, const at::Tensor& weight);
at::Tensor winograd_grad_weight(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                const at::Tensor& weight);

}  // namespace fusedconvbn
