// The private operators for C++ callers; each call goes through the dispatcher. ops.cpp defines
// these functions and registers the operators.
#pragma once

#include "chain.h"

namespace fusedconvbn {

// The statistics of a map, as chain_forward returns them.
at::Tensor channel_stats(const at::Tensor& input, std::string_view process_group);

// Runs a packed chain (chain.h). `process_group` names the group whose processes share the batch
// statistics; "" for none. Returns
//   - T_n,
//   - the inner maps T_i whose indices are in `saved` (which may contain n; T_n is not returned
//     twice),
//   - of each norm link that normalises, the (2, C) mean and biased variance. In a synchronised
//     chain (5, C): mean, biased variance and number of values of all processes, then mean and
//     biased variance of this one.
// `statistics` are those of the first norm links that use batch statistics, side by side. Those of
// the other links are computed.
ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const std::optional<at::Tensor>& statistics);

// The gradient of tensors[i] for each i in `needs_grad` (ascending), from dout, the gradient of
// T_n. Index 0 stands for the whole T_0, even if T_0 has parts. A residual that is not read
// (`last_residual_is_read`) may be any tensor.
std::vector<at::Tensor> chain_backward(const at::Tensor& dout, at::TensorList tensors,
                                       at::TensorList saved_maps, at::TensorList statistics,
                                       at::IntArrayRef links, at::ArrayRef<double> scalars,
                                       std::string_view process_group, at::IntArrayRef saved,
                                       at::IntArrayRef needs_grad);

// Max pooling by a packed Pool (../kernels/pool.h): the values and the offset of each in its
// window. The backward returns the gradient of an input of `sizes`.
std::tuple<at::Tensor, at::Tensor> max_pool2d_with_offsets(const at::Tensor& input,
                                                           at::IntArrayRef pool);
at::Tensor max_pool2d_backward(const at::Tensor& dout, const at::Tensor& offsets,
                               at::IntArrayRef pool, c10::SymIntArrayRef sizes, bool channels_last);

}  // namespace fusedconvbn
