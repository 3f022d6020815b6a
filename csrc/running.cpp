// Folding of running statistics into a convolution, and their updates.
#include "running.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/function.h>

#include <limits>

#include "chain/tensors.h"

namespace fusedconvbn {

using at::Tensor;

std::tuple<Tensor, Tensor> fold(const ConvArguments& conv, const NormArguments& norm) {
  const auto &weight = conv.weight, &running_var = *norm.running_var;
  const auto wide = running_var.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto scale = inverse_running_std(norm.norm, running_var.to(wide));
  if (norm.weight) scale = scale * *norm.weight;
  const auto mean = norm.running_mean->to(wide);
  auto shift = (conv.bias ? *conv.bias - mean : -mean) * scale;
  if (norm.bias) shift = shift + *norm.bias;
  // The output channels are dimension 0 of the weight. A transposed weight is (in, out/groups, …),
  // where the output channels of each group follow one another.
  if (!conv.conv.transposed) {
    std::vector<int64_t> per_channel(weight.dim(), 1);
    per_channel[0] = -1;
    return {weight * scale.reshape(per_channel), shift};
  }
  std::vector<int64_t> per_channel(weight.dim() + 1, 1);
  per_channel[0] = conv.conv.groups;
  per_channel[2] = -1;
  return {(weight.unflatten(0, {conv.conv.groups, -1}) * scale.reshape(per_channel)).flatten(0, 1),
          shift};
}

std::tuple<Tensor, Tensor> fold_batch_norm(const Tensor& weight, const Optional& bias,
                                           const Optional& bn_weight, const Optional& bn_bias,
                                           const Tensor& running_mean, const Tensor& running_var,
                                           double eps, bool transposed, int64_t groups) {
  ConvArguments conv{{}, weight, bias};
  conv.conv.transposed = transposed;
  conv.conv.groups = groups;
  const Norm norm{eps, Arithmetic::batchnorm, {}};
  return fold(conv, {norm, bn_weight, bn_bias, running_mean, running_var, {}, {}, false, {}});
}

namespace {

// RunningChannel::move (kernels/channel_vectors.h) in ATen.
Tensor moved(const Tensor& running, const Tensor& batch, const std::optional<double>& momentum,
             const Tensor& count) {
  const auto wide = running.to(batch.scalar_type());
  if (momentum) return (wide * (1 - *momentum)).add(batch, *momentum);
  const auto part = count.to(batch.scalar_type()).reciprocal();
  return wide * (1 - part) + batch * part;
}

// Whether torch.utils.checkpoint, in its non-reentrant form, recomputes a forward. It does so
// inside of backward, under hooks that take the saved tensors, and aborts the recomputation once
// all are saved. The first forward has already counted this batch.
bool is_recomputation() {
  return torch::autograd::get_current_node() != nullptr && at::SavedTensorDefaultHooks::get_hooks();
}

bool is_batched(const Tensor& t) { return t.key_set().has(c10::DispatchKey::FuncTorchBatched); }

// Whether a kernel can read and write the values of t directly.
bool in_memory(const Tensor& t, at::ScalarType dtype, c10::Device device) {
  return !t.defined() || (t.device() == device && t.scalar_type() == dtype && t.is_contiguous() &&
                          !t.requires_grad());
}

bool in_memory(const RunningUpdate& update) {
  const auto& statistics = update.statistics;
  if (!statistics.defined()) return false;
  std::vector<Tensor> all{statistics};
  for (const auto& t : {update.mean, update.var, update.bias, update.counter})
    if (t.defined()) all.push_back(t);
  const auto fits = [&](const Tensor& t) {
    return in_memory(t, statistics.scalar_type(), statistics.device());
  };
  return is_plain(all) && fits(statistics) && fits(update.mean) && fits(update.var) &&
         fits(update.bias) && in_memory(update.counter, at::kLong, statistics.device());
}

// Does not bump the version counter, as PyTorch's batch norm does not: a backward that has saved
// the same running statistics still passes the check for changes in place.
void write_to(const Tensor& running, const Tensor& value) {
  if (!is_plain(running)) {
    running.copy_(value);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  running.copy_(value);
}

}  // namespace

RunningUpdates::RunningUpdates() : counted_(!is_recomputation()) {}

void RunningUpdates::add(const NormArguments& norm, const Tensor& statistics,
                         c10::SymIntArrayRef sizes, const Optional& bias, bool synchronised) {
  if (!counted_) return;
  const auto counter = norm.num_batches_tracked.value_or(Tensor());
  const bool moves = norm.running_mean && statistics.defined();
  if (!moves && !counter.defined()) return;
  RunningUpdate update{.mean = {},
                       .var = {},
                       .counter = counter,
                       .statistics = {},
                       .bias = {},
                       .momentum = 0,
                       .values = 0};
  c10::SymInt values = 0;
  if (moves) {
    TORCH_CHECK_VALUE(
        !is_batched(statistics) ||
            (is_batched(*norm.running_mean) && is_batched(*norm.running_var)),
        "conv_bn: expected running_mean and running_var that vmap maps over, as each of its calls "
        "has statistics of its own, got one tensor for all calls; map over them too, or pass None "
        "(torch.func.replace_all_batch_norm_modules_ removes them)");
    values = sizes[0];
    for (const auto& size : sizes.slice(2)) values = values * size;
    update = {.mean = *norm.running_mean,
              .var = *norm.running_var,
              .counter = counter,
              .statistics = statistics.detach(),
              .bias = bias ? bias->detach() : Tensor(),
              .momentum = norm.momentum.value_or(std::numeric_limits<double>::quiet_NaN()),
              .values = synchronised ? 0. : double(values.maybe_as_int().value_or(0))};
  }
  if (moves && in_memory(update))
    updates_.push_back(std::move(update));
  else
    add_in_aten(update, norm.momentum, values, synchronised);
}

void RunningUpdates::add_in_aten(const RunningUpdate& update, const std::optional<double>& momentum,
                                 const c10::SymInt& values, bool synchronised) {
  const auto count = update.counter.defined() ? update.counter + 1 : Tensor();
  if (count.defined())
    writes_.push_back([counter = update.counter, count] { counter.copy_(count); });
  if (!update.mean.defined()) return;
  auto mean = update.statistics.select(0, 0), var = update.statistics.select(0, 1);
  if (update.bias.defined()) mean = mean + update.bias;
  const auto counts = synchronised ? update.statistics.select(0, 2) : Tensor();
  var = synchronised ? var * (counts / (counts - 1).clamp_min(1))
                     : var * at::Scalar(c10::SymFloat(values) / c10::SymFloat(values - 1));
  const auto write = [&](const Tensor& running, const Tensor& batch) {
    auto value = moved(running, batch, momentum, count);
    // No process has a sample if the count is 0.
    if (synchronised) value = at::where(counts > 0, value, running.to(value.scalar_type()));
    writes_.push_back([running, value] { write_to(running, value); });
  };
  write(update.mean, mean);
  write(update.var, var);
}

void RunningUpdates::write() const {
  for (const auto& write : writes_) write();
  if (updates_.empty()) return;
  for (const auto& update : updates_)
    if (update.counter.defined() && !update.counter.is_inference())
      update.counter.unsafeGetTensorImpl()->bump_version();
  channel_kernels(updates_[0].statistics).update_running(updates_);
}

}  // namespace fusedconvbn
