// The forward of a chain on a device.
#pragma once

#include "state.h"

namespace fusedconvbn {

// Computes T_last from T_first. Statistics that are known are used, the others are computed. The
// link that reads a map outside `retain` frees or overwrites it.
void run_links(State& state, size_t first, size_t last, const std::vector<bool>& retain);

// Where _chain_forward and _channel_stats (ops.h) end on CPU and CUDA.
ChainResult chain_forward_kernel(at::TensorList tensors, at::IntArrayRef links,
                                 at::ArrayRef<double> scalars, std::string_view process_group,
                                 at::IntArrayRef saved,
                                 const std::optional<at::Tensor>& input_statistics);
at::Tensor channel_stats_kernel(const at::Tensor& y, std::string_view process_group);

}  // namespace fusedconvbn
