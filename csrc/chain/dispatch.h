// The private operators as C++ callers see them; each call goes through the dispatcher. They are
// defined in ops.cpp, where the operators are registered.
#pragma once

#include "chain.h"

namespace fusedconvbn {

// The statistics of a map as _chain_forward returns them.
at::Tensor channel_stats(const at::Tensor& input, std::string_view process_group);

// Runs a packed chain (chain.h), synchronised among the processes of the group of this name,
// if it has one. Returns
//   T_n,
//   the inner maps T_i whose indices are in `saved` (n may be among them: T_n is not returned
//   twice), and for each norm link that normalises the (2, C) mean and biased variance or,
//   synchronised, (5, C): mean, biased variance and number of values of all processes, then mean
//   and biased variance of this one.
// `input_statistics` are those of T_0, for a first link that normalises by the batch; they are
// computed where not given.
ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const std::optional<at::Tensor>& input_statistics);

// The gradients of tensors[i] for each i in `needs_grad` (ascending), from that of T_n. Index 0 is
// T_0, also where it has parts. A residual that is not read (`last_residual_is_read`) may be any
// tensor.
std::vector<at::Tensor> chain_backward(const at::Tensor& dout, at::TensorList tensors,
                                       at::TensorList saved_maps, at::TensorList statistics,
                                       at::IntArrayRef links, at::ArrayRef<double> scalars,
                                       std::string_view process_group, at::IntArrayRef saved,
                                       at::IntArrayRef needs_grad);

// Of a packed Pool (../kernels/pool.h) the values and the offset of each; and the gradient of an
// input of `sizes`.
std::tuple<at::Tensor, at::Tensor> max_pool2d_with_offsets(const at::Tensor& input,
                                                           at::IntArrayRef pool);
at::Tensor max_pool2d_backward(const at::Tensor& dout, const at::Tensor& offsets,
                               at::IntArrayRef pool, c10::SymIntArrayRef sizes, bool channels_last);

}  // namespace fusedconvbn
