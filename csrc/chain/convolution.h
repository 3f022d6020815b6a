// The convolution of a conv link and its gradients, in a memory format that is known beforehand.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "../kernels/conv.h"

namespace fusedconvbn {

// The memory format in which a convolution returns its result and its gradients.
at::MemoryFormat conv_memory_format(const at::Tensor& input, const at::Tensor& weight);

// Whether every column of the result reads only padding. oneDNN's float forward with a bias then
// ends the process (oneDNN#5942). Half types and a folded batch norm would get there only because
// this library runs them in float with a bias.
bool reads_padding_alone(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

// Whether this is a strided 1×1 convolution over a map of few channels. oneDNN's weight gradient
// then writes beyond the end of its workspace (oneDNN#6035).
bool steps_over_few_channels(const Conv& conv, const at::Tensor& input, const at::Tensor& weight);

// Weight and bias may be wider than the input; they are cast to its dtype.
at::Tensor convolution(const Conv& conv, const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

// The gradients of input, weight and bias, those that `needs_grad` names. For weight and
// bias they are float if a convolution of a half type runs in float, else of the input's dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const Conv& conv,
                                                                    const at::Tensor& dout,
                                                                    const at::Tensor& input,
                                                                    const at::Tensor& weight,
                                                                    std::array<bool, 3> needs_grad);

}  // namespace fusedconvbn
