// A packed chain in differentiable ATen operators. Second derivatives, forward-mode AD and
// torch.func run it.
#pragma once

#include "chain.h"

namespace fusedconvbn {

at::Tensor activate(const at::Tensor& u, const Activation& activation);

// Returns act(out [+ residual]).
at::Tensor finish(at::Tensor out, const std::optional<at::Tensor>& residual,
                  const Activation& activation);

// If `result`, the T_n of an earlier run, is given, the last activation becomes a product with the
// slopes that follow from `result`. The output then differs from T_n, but its derivatives are those
// of T_n. This holds even if the last residual is not the one of the earlier run.
ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const at::Tensor& result);

}  // namespace fusedconvbn
