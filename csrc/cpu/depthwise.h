// Depthwise convolutions on CPU in float, channels last (depthwise_loops.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/conv.h"

namespace fusedconvbn {

// Whether the functions below take this convolution once its tensors are float. They win then; in
// half types the weight gradient is where oneDNN is slow.
bool is_depthwise(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
bool depthwise_applies(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

at::Tensor depthwise(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
at::Tensor depthwise_grad_input(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                const at::Tensor& weight);
at::Tensor depthwise_grad_weight(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                 const at::Tensor& weight);

}  // namespace fusedconvbn
