// Whether autocast is enabled where an operator is called, and its dtype.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedconvbn {

bool autocast_enabled(const at::Tensor& t);

// The dtype in which a convolution of `input` runs: its own, or that of an enabled autocast.
at::ScalarType conv_dtype(const at::Tensor& input);

}  // namespace fusedconvbn
