// Depthwise convolutions on CPU, in float and channels last (depthwise_loops.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/conv.h"

namespace fusedconvbn {

// Whether the functions below support this convolution once its tensors are cast to float. They are
// then faster than oneDNN. (In half types only oneDNN's weight gradient is slow.)
bool is_depthwise(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

// Whether they support it as it is.
bool depthwise_applies(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

at::Tensor depthwise(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);
at::Tensor depthwise_grad_input(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                const at::Tensor& weight);
at::Tensor depthwise_grad_weight(const Conv& conv, const at::Tensor& dout, const at::Tensor& input,
                                 const at::Tensor& weight);

}  // namespace fusedconvbn
