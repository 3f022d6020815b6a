// The arguments of a convolution and of a batch norm, and their checks. An error names the
// operator, the argument, the rule and the value that breaks it.
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

// Checks that t is a strided floating-point tensor on the device of `input`.
void check_tensor(const std::string& op, const char* name, const at::Tensor& t,
                  const at::Tensor& input);

// Whether autocast casts both tensors to its dtype or neither: it does not cast float64.
bool casts(const at::Tensor& t, const at::Tensor& input);

// Returns the sizes of the result for a map of `sizes`. The map has the dtype and the device of
// `input`, which the first convolution reads.
std::vector<c10::SymInt> check_conv(const std::string& op, const at::Tensor& input,
                                    c10::SymIntArrayRef sizes, const ConvArguments& arguments);

// `sizes` are those of the map to be normalised; `prefix` precedes "weight" and "bias" in messages.
void check_norm(const std::string& op, const std::string& prefix, const at::Tensor& input,
                c10::SymIntArrayRef sizes, const NormArguments& arguments, bool synchronised);

}  // namespace fusedconvbn
