// fusedconvbn.check_recompute: checks that backward recomputes the maps of forward.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

void check_recompute(bool enabled);
bool recompute_is_checked();

// The layer whose chain runs in this thread, for the message.
std::string& layer_name();

// Raises an error unless `found`, the (2, C) mean and variance of the recomputed map y, equals
// `saved`, which forward computed. The bound allows for another algorithm of the same convolution,
// which rounds differently.
void check_recomputed(const at::Tensor& y, const at::Tensor& found, const at::Tensor& saved);

}  // namespace fusedconvbn
