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
               const std::optional<Tensor>& num_batches_tracked,
               const std::optional<Tensor>& residual, bool training, std::optional<double> momentum,
               double eps, at::OptionalIntArrayRef stride, at::OptionalIntArrayRef padding,
               at::OptionalIntArrayRef dilation, bool transposed,
               at::OptionalIntArrayRef output_padding, int64_t groups, std::string_view activation,
               std::string_view arithmetic, std::string_view process_group);

// A chain with the running statistics of its norm links; docs in csrc/conv_bn_chain.cpp.
Tensor conv_bn_chain(at::TensorList tensors, at::TensorList buffers, at::IntArrayRef links,
                     at::ArrayRef<double> scalars, at::IntArrayRef buffer_counts,
                     at::ArrayRef<double> momenta, at::IntArrayRef training,
                     std::string_view process_group, at::IntArrayRef kept,
                     const std::optional<Tensor>& input_statistics);

// The statistics of a map as _chain_forward returns them.
Tensor channel_stats(const Tensor& input, std::string_view process_group);

// Runs a packed chain (chain.h), synchronised among the processes of the group of this name, if it
// has one. Returns T_n, the inner maps T_i named by `kept` (which may also have n: T_n is not
// returned twice), and of each norm link that normalises the (2, C) mean and biased variance, or,
// synchronised, (5, C): mean, biased variance and number of values of all processes, then mean and
// biased variance of this one. `input_statistics` are those of T_0, for a first link that
// normalises by the batch; they are computed where not given.
using ChainResult = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef kept, const std::optional<Tensor>& input_statistics);

// The gradients of tensors[i] for each i in `wanted` (ascending), from that of T_n. Place 0 is that
// of T_0, also where it has parts. A residual that is not read (`last_residual_is_read`) may be any
// tensor.
std::vector<Tensor> chain_backward(const Tensor& dout, at::TensorList tensors,
                                   at::TensorList kept_maps, at::TensorList statistics,
                                   at::IntArrayRef links, at::ArrayRef<double> scalars,
                                   std::string_view process_group, at::IntArrayRef kept,
                                   at::IntArrayRef wanted);

// What the dispatcher ends in on CPU and CUDA. The caller that gives its dout away has it freed, or
// written over, as soon as it is used up.
std::vector<Tensor> chain_backward_kernel(Tensor dout, at::TensorList tensors,
                                          at::TensorList kept_maps, at::TensorList statistics,
                                          at::IntArrayRef links, at::ArrayRef<double> scalars,
                                          std::string_view process_group, at::IntArrayRef kept,
                                          at::IntArrayRef wanted);

// Of a packed Pool (pooling.h) the values and a byte for each, the place in the window that it was
// found at; and the gradient of an input of `sizes`.
std::tuple<Tensor, Tensor> max_pool2d_with_places(const Tensor& input, at::IntArrayRef pool);
Tensor max_pool2d_backward(const Tensor& dout, const Tensor& places, at::IntArrayRef pool,
                           c10::SymIntArrayRef sizes, bool channels_last);

}  // namespace fusedconvbn
