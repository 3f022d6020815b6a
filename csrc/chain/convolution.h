// The convolution of a conv link and its gradients: ATen's, in a memory format that fake kernels
// can promise.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "../kernels/conv.h"

namespace fusedconvbn {

// The memory format in which a convolution returns its result and its gradients.
at::MemoryFormat conv_memory_format(const at::Tensor& input, const at::Tensor& weight);

// Whether every column of the result reads padding alone. oneDNN's float forward with a bias ends
// the process there (oneDNN#5942), and half types and a folded batch norm reach it because we send
// them.
bool reads_padding_alone(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

// Whether a strided 1×1 convolution steps over a map of few channels: oneDNN's weight gradient then
// writes behind its workspace (oneDNN#6035).
bool steps_over_few_channels(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

// Weight and bias may be wider than the input, and are cast to its dtype.
at::Tensor convolution(const Conv& conv, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

// The gradients of input, weight and bias, as far as `needs_grad`; the latter two are float where a
// convolution of a half type is run in float, and of the input's dtype elsewhere.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const Conv& conv,
                                                                    const at::Tensor& dout,
                                                                    const at::Tensor& input,
                                                                    const at::Tensor& weight,
                                                                    std::array<bool, 3> needs_grad);

}  // namespace fusedconvbn
