// The public operators for C++ callers.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

namespace fusedconvbn {

// Conv → BatchNorm → activation; documented in fusedconvbn/functional.py.
at::Tensor conv_bn(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& bn_weight, const std::optional<at::Tensor>& bn_bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& num_batches_tracked, const std::optional<at::Tensor>& residual,
    bool training, std::optional<double> momentum, double eps, at::OptionalIntArrayRef stride,
    at::OptionalIntArrayRef padding, at::OptionalIntArrayRef dilation, bool transposed,
    at::OptionalIntArrayRef output_padding, int64_t groups, std::string_view activation,
    std::string_view arithmetic, std::string_view process_group);

// A chain with the running statistics of its norm links; documented in conv_bn_chain.cpp.
at::Tensor conv_bn_chain(at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
                         at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts,
                         at::ArrayRef<double> momenta, at::IntArrayRef training,
                         std::string_view process_group, at::IntArrayRef saved,
                         const std::optional<at::Tensor>& statistics);

// The operator _conv_bn_chain: the same, and the batch statistics of its norm links
// in training, side by side.
std::tuple<at::Tensor, at::Tensor> conv_bn_chain_with_statistics(
    at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
    at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts, at::ArrayRef<double> momenta,
    at::IntArrayRef training, std::string_view process_group, at::IntArrayRef saved,
    const std::optional<at::Tensor>& statistics);

// Like at::max_pool2d, which it calls if the window has more offsets than fit into a byte.
at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

}  // namespace fusedconvbn
