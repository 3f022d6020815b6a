// What a convolution and a batch norm are called with, and the checks of it. An error names the
// operator, the argument, the rule and what was found.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "chain/chain.h"

namespace fusedconvbn {

using Optional = std::optional<at::Tensor>;

struct ConvArguments {
  Conv conv;
  at::Tensor weight;
  Optional bias;
};

struct NormArguments {
  Norm norm;
  Optional weight, bias, running_mean, running_var, num_batches_tracked, residual;
  bool training;
  std::optional<double> momentum;
};

// A strided floating-point tensor on the device of `input`.
void check_tensor(const std::string& op, const char* name, const at::Tensor& t,
                  const at::Tensor& input);

// Autocast lowers both of them, or neither is what it lowers.
bool casts(const at::Tensor& t, const at::Tensor& input);

// Returns the sizes of the result for a map of `sizes`. dtype and device are those of `input`, the
// map of the first convolution.
std::vector<c10::SymInt> check_conv(const std::string& op, const at::Tensor& input,
                                    c10::SymIntArrayRef sizes, const ConvArguments& arguments);

// `sizes` are those of the map that is normalised; `prefix` stands before the names of γ and β.
void check_norm(const std::string& op, const std::string& prefix, const at::Tensor& input,
                c10::SymIntArrayRef sizes, const NormArguments& arguments, bool synchronised);

}  // namespace fusedconvbn
