// Running statistics. In eval mode they are folded into the convolution in front of the norm, in
// training they are updated.
#pragma once

#include <functional>

#include "arguments.h"
#include "kernels/channel_kernels.h"

namespace fusedconvbn {

// Folds a norm into a convolution. With given statistics the norm is a scale and a shift per
// channel, so the two are one convolution with
//   weight' = a·weight      bias' = β + (bias − running_mean)·a
// Returns both. They are differentiable, and float for half types.
std::tuple<at::Tensor, at::Tensor> fold(const ConvArguments& conv, const NormArguments& norm);

// The operator _fold, for Python.
std::tuple<at::Tensor, at::Tensor> fold_batch_norm(const at::Tensor& weight, const Optional& bias,
                                                   const Optional& bn_weight,
                                                   const Optional& bn_bias,
                                                   const at::Tensor& running_mean,
                                                   const at::Tensor& running_var, double eps,
                                                   bool transposed, int64_t groups);

// The updates of the running statistics of any number of norms. They are written together, after
// every allocation, so that none can fail after the first write. Nothing is updated in a forward
// that torch.utils.checkpoint recomputes.
class RunningUpdates {
 public:
  RunningUpdates();

  // Adds an update. `statistics` are those that chain_forward returns for a map of `sizes`,
  // computed without the convolution's `bias`. A batch without samples has no statistics; it is
  // only counted.
  void add(const NormArguments& norm, const at::Tensor& statistics = {},
           c10::SymIntArrayRef sizes = {}, const Optional& bias = {}, bool synchronised = false);

  void write() const;

 private:
  // The update in ATen operators, for tracing and for dtypes that the kernels do not take.
  void add_in_aten(const RunningUpdate& update, const std::optional<double>& momentum,
                   const c10::SymInt& values, bool synchronised);

  const bool counted_;
  std::vector<RunningUpdate> updates_;
  std::vector<std::function<void()>> writes_;
};

}  // namespace fusedconvbn
