// Collectives of torch.distributed, by the name of a process group.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

// The sum of `t` over all processes of the group.
at::Tensor all_reduce_sum(const at::Tensor& t, const std::string& process_group);

// The statistics (ops.h: 5 rows) of the maps of all processes, from the (2, C) mean and variance of
// the `count` values of this one.
at::Tensor joint_statistics(const at::Tensor& own, int64_t count, const std::string& process_group);

}  // namespace fusedconvbn
