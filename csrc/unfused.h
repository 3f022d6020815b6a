// A packed chain in differentiable ATen operators: what second derivatives, forward mode and torch.func run.
#pragma once

#include "ops.h"

namespace fusedconvbn {

ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> eps,
                          at::IntArrayRef kept);

}  // namespace fusedconvbn
