// A packed chain in differentiable ATen operators: what second derivatives, forward mode and
// torch.func run.
#pragma once

#include "chain.h"

namespace fusedconvbn {

at::Tensor activate(const at::Tensor& u, const Activation& activation);

// act(out [+ residual]) in ATen
at::Tensor finish(at::Tensor out, const std::optional<at::Tensor>& residual,
                  const Activation& activation);

// Given `result`, the T_n of an earlier run, the last activation is replaced by a product with the
// slopes that follow from it. The output is then not T_n, but it has the derivatives of T_n, even
// if the last residual is not the one of that run.
ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const at::Tensor& result);

}  // namespace fusedconvbn
