// Collectives of torch.distributed, by the name of a process group.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

// The sum of `t` over all processes of the group.
at::Tensor all_reduce_sum(const at::Tensor& t, const std::string& process_group);

// The five rows of synchronised statistics (dispatch.h), from the (2, C) mean and variance of the
// `count` values per channel of this process.
at::Tensor joint_statistics(const at::Tensor& own, int64_t count, const std::string& process_group);

}  // namespace fusedconvbn
