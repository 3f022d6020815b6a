#include "running.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

namespace fusedconvbn {

using at::Tensor;

std::pair<Tensor, Tensor> fold(const ConvArguments& conv, const NormArguments& norm) {
  const auto &weight = conv.weight, &running_var = *norm.running_var;
  const auto wide = running_var.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto scale = inverse_running_std(norm.norm, running_var.to(wide));
  if (norm.weight) scale = scale * *norm.weight;
  const auto mean = norm.running_mean->to(wide);
  auto shift = (conv.bias ? *conv.bias - mean : -mean) * scale;
  if (norm.bias) shift = shift + *norm.bias;
  // The output channels are dimension 0; of a transposed weight (in, out/groups, …), those of each group in turn.
  if (!conv.conv.transposed) {
    std::vector<int64_t> per_channel(weight.dim(), 1);
    per_channel[0] = -1;
    return {weight * scale.reshape(per_channel), shift};
  }
  std::vector<int64_t> per_channel(weight.dim() + 1, 1);
  per_channel[0] = conv.conv.groups;
  per_channel[2] = -1;
  return {(weight.unflatten(0, {conv.conv.groups, -1}) * scale.reshape(per_channel)).flatten(0, 1), shift};
}

namespace {

// running = (1 − momentum)·running + momentum·batch, where no momentum stands for 1/n of the n-th batch
Tensor moved(const Tensor& running, const Tensor& batch, const std::optional<double>& momentum, const Tensor& count) {
  const auto wide = running.to(batch.scalar_type());
  return momentum ? wide.lerp(batch, *momentum) : wide.lerp(batch, count.to(batch.scalar_type()).reciprocal());
}

}  // namespace

void RunningUpdates::count(const NormArguments& norm) {
  count_ = norm.num_batches_tracked ? *norm.num_batches_tracked + 1 : Tensor();
  if (count_.defined()) writes_.emplace_back(*norm.num_batches_tracked, count_);
}

void RunningUpdates::add(const NormArguments& norm, const Tensor& statistics, c10::SymIntArrayRef sizes,
                         const Optional& bias, bool synchronised) {
  if (!norm.running_mean) return;
  const auto batch = statistics.detach();
  auto mean = batch.select(0, 0), var = batch.select(0, 1);
  if (bias) mean = mean + bias->detach();
  if (synchronised) {
    const auto values = batch.select(0, 2);
    var = var * (values / (values - 1).clamp_min(1));
    mean = at::where(values > 0, mean, norm.running_mean->to(mean.scalar_type()));  // no process has a sample
    var = at::where(values > 0, var, norm.running_var->to(var.scalar_type()));
  } else {
    c10::SymInt values = sizes[0];
    for (const auto& size : sizes.slice(2)) values = values * size;
    var = var * at::Scalar(c10::SymFloat(values) / c10::SymFloat(values - 1));
  }
  writes_.emplace_back(*norm.running_mean, moved(*norm.running_mean, mean, norm.momentum, count_));
  writes_.emplace_back(*norm.running_var, moved(*norm.running_var, var, norm.momentum, count_));
}

void RunningUpdates::write() const {
  for (const auto& [target, value] : writes_) target.copy_(value);
}

}  // namespace fusedconvbn
