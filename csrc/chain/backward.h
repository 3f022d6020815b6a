// The backward of a chain on a device.
#pragma once

#include "chain.h"

namespace fusedconvbn {

// Where _chain_backward (ops.h) ends on CPU and CUDA. The caller that gives its dout away has it
// freed, or overwritten, as soon as it has been read.
std::vector<at::Tensor> chain_backward_kernel(at::Tensor dout, at::TensorList tensors,
                                              at::TensorList saved_maps, at::TensorList statistics,
                                              at::IntArrayRef links, at::ArrayRef<double> scalars,
                                              std::string_view process_group, at::IntArrayRef saved,
                                              at::IntArrayRef needs_grad);

}  // namespace fusedconvbn
