// A packed chain in differentiable ATen operators: what second derivatives, forward mode and
// torch.func run.
#pragma once

#include "../kernels/activation.h"
#include "../ops.h"

namespace fusedconvbn {

Tensor activate(const Tensor& u, const Activation& activation);

// With `result`, T_n of before, the last activation is replaced by the slopes that show in it: T_n
// comes out wrong, its derivatives right, whatever its residual is.
ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef kept, const Tensor& result);

}  // namespace fusedconvbn
