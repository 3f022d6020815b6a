// Depthwise convolutions on CPU in float, channels last (depthwise_loops.h).
#pragma once

#include "../convolution.h"

namespace fusedconvbn {

// Whether the functions below take this convolution, and win.
bool depthwise_applies(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

at::Tensor depthwise(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
at::Tensor depthwise_grad_input(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                const at::Tensor& weight);
at::Tensor depthwise_grad_weight(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                 const at::Tensor& weight);

}  // namespace fusedconvbn
