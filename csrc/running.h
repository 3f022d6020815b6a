// Running statistics: read in eval mode, where they are folded into the convolution in front, and
// updated in training.
#pragma once

#include <functional>

#include "arguments.h"
#include "kernels/channel_kernels.h"

namespace fusedconvbn {

// BN with given statistics is a scale and a shift per output channel: one convolution with
//   weight' = a·weight      bias' = β + (bias − running_mean)·a
// Both differentiable, in float for half types.
std::tuple<at::Tensor, at::Tensor> fold(const ConvArguments& conv, const NormArguments& norm);

// The operator _fold.
std::tuple<at::Tensor, at::Tensor> fold_batch_norm(const at::Tensor& weight, const Optional& bias,
                                                   const Optional& bn_weight,
                                                   const Optional& bn_bias,
                                                   const at::Tensor& running_mean,
                                                   const at::Tensor& running_var, double eps,
                                                   bool transposed, int64_t groups);

// The running statistics of any number of norms, written together: what allocates, and so may fail,
// comes before the first write. Of a forward that torch.utils.checkpoint recomputes they are left
// alone.
class RunningUpdates {
 public:
  RunningUpdates();

  // `statistics` as _chain_forward returns them, of a map of `sizes`, less `bias`, which the
  // convolution left out. Of a batch without samples there are none, and it is counted alone.
  void add(const NormArguments& norm, const at::Tensor& statistics = {},
           c10::SymIntArrayRef sizes = {}, const Optional& bias = {}, bool synchronised = false);

  void write() const;

 private:
  // What is traced, or of other types than the kernels': as operators.
  void add_in_aten(const RunningUpdate& update, const std::optional<double>& momentum,
                   const c10::SymInt& values, bool synchronised);

  const bool counted_;
  std::vector<RunningUpdate> updates_;
  std::vector<std::function<void()>> writes_;
};

}  // namespace fusedconvbn
