// Collectives of torch.distributed, by the name of a process group.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

// The sum of `t` over all processes of the group.
at::Tensor all_reduce_sum(const at::Tensor& t, const std::string& process_group);

}  // namespace fusedconvbn
