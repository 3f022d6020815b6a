// fusedconvbn.check_recompute: are the maps that backward remade those of forward?
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fusedconvbn {

bool recompute_is_checked();

// The layer whose chain runs in this thread, for the message.
std::string& layer_name();

// An error when `remade`, (2, C) of mean and variance, is not what forward found. `dtype` is that of the map.
void check_recomputed(const at::Tensor& remade, const at::Tensor& saved, at::ScalarType dtype);

}  // namespace fusedconvbn
