// The forward of a chain on a device, and of the links that backward recomputes.
#pragma once

#include "state.h"

namespace fusedconvbn {

// Computes T_last from T_first. It uses the statistics that the state has and computes the others.
// A map that is not in `retain` is freed or overwritten by the link that reads it.
void run_links(State& state, size_t first, size_t last, const std::vector<bool>& retain);

// The kernels of _chain_forward and _channel_stats (dispatch.h) on CPU and CUDA.
ChainResult chain_forward_kernel(at::TensorList tensors, at::IntArrayRef links,
                                 at::ArrayRef<double> scalars, std::string_view process_group,
                                 at::IntArrayRef saved,
                                 const std::optional<at::Tensor>& statistics);
at::Tensor channel_stats_kernel(const at::Tensor& y, std::string_view process_group);

}  // namespace fusedconvbn
