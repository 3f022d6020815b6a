#pragma once

#include <ATen/core/Tensor.h>

namespace fusedconvbn {

bool autocast_enabled(const at::Tensor& t);

}  // namespace fusedconvbn
