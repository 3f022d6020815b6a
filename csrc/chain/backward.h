// The backward of a chain on a device.
#pragma once

#include "chain.h"

namespace fusedconvbn {

// The kernel of _chain_backward (dispatch.h) on CPU and CUDA. If the caller moves its only
// reference to dout in, the kernel frees or overwrites dout as soon as it has read it.
std::vector<at::Tensor> chain_backward_kernel(at::Tensor dout, at::TensorList tensors,
                                              at::TensorList saved_maps, at::TensorList statistics,
                                              at::IntArrayRef links, at::ArrayRef<double> scalars,
                                              std::string_view process_group, at::IntArrayRef saved,
                                              at::IntArrayRef needs_grad);

}  // namespace fusedconvbn
