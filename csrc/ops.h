// The operators as C++ callers see them; each call goes through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace fusedconvbn {

using at::Tensor;

// Conv → BatchNorm → activation; docs in fusedconvbn/functional.py.
Tensor conv_bn(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
               const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
               const std::optional<Tensor>& num_batches_tracked, const std::optional<Tensor>& residual, bool training,
               std::optional<double> momentum, double eps, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
               std::string_view activation, std::string_view arithmetic, std::string_view process_group);

// Runs a packed chain (chain.h), synchronised among the processes of the group of this name, if it has one. Returns
// T_n, the inner maps T_i named by `kept` (which may also have n: T_n is not returned twice), and of each norm link
// that normalises the (2, C) mean and biased variance, or, synchronised, (5, C): mean, biased variance and number of
// values of all processes, then mean and biased variance of this one.
using ChainResult = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> scalars,
                          std::string_view process_group, at::IntArrayRef kept);

// The gradients of tensors[i] for each i in `wanted` (ascending), from that of T_n. A residual that is not read
// (`last_residual_is_read`) may be any tensor.
std::vector<Tensor> chain_backward(const Tensor& dout, at::TensorList tensors, at::TensorList kept_maps,
                                   at::TensorList statistics, at::IntArrayRef links, at::ArrayRef<double> scalars,
                                   std::string_view process_group, at::IntArrayRef kept, at::IntArrayRef wanted);

// What the dispatcher ends in on CPU and CUDA. The caller that gives its dout away has it freed, or written over, as
// soon as it is used up.
std::vector<Tensor> chain_backward_kernel(Tensor dout, at::TensorList tensors, at::TensorList kept_maps,
                                          at::TensorList statistics, at::IntArrayRef links,
                                          at::ArrayRef<double> scalars, std::string_view process_group,
                                          at::IntArrayRef kept, at::IntArrayRef wanted);

}  // namespace fusedconvbn
