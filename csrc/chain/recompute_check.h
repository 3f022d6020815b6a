// fusedconvbn.check_recompute: are the maps that backward recomputes those of forward?
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

void check_recompute(bool enabled);
bool recompute_is_checked();

// The layer whose chain runs in this thread, for the message.
std::string& layer_name();

// An error when `found`, the (2, C) mean and variance of the recomputed map y, is not `saved`, what
// forward found. Another algorithm for the same convolution rounds differently, and is allowed for.
void check_recomputed(const at::Tensor& y, const at::Tensor& found, const at::Tensor& saved);

}  // namespace fusedconvbn
