#include "running.h"

#include <ATen/Dispatch.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/function.h>

#include "composite.h"

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

// running = (1 − momentum)·running + momentum·batch, where no momentum stands for 1/n of the n-th batch. (Not
// running + momentum·(batch − running): that of an infinite one is NaN.)
Tensor moved(const Tensor& running, const Tensor& batch, const std::optional<double>& momentum, const Tensor& count) {
  const auto wide = running.to(batch.scalar_type());
  if (momentum) return (wide * (1 - *momentum)).add(batch, *momentum);
  const auto part = count.to(batch.scalar_type()).reciprocal();
  return wide * (1 - part) + batch * part;
}

// torch.utils.checkpoint, but for its reentrant form, makes a forward again inside of backward, under hooks that take
// what is saved, and stops it by an error as soon as it has all: behind most chains, in the middle of the last one.
// That is no other batch.
bool is_recomputation() {
  return torch::autograd::get_current_node() != nullptr && at::SavedTensorDefaultHooks::get_hooks();
}

bool is_batched(const Tensor& t) { return t.key_set().has(c10::DispatchKey::FuncTorchBatched); }

// Whether t is a few values in memory, for which a dozen operators would take longer than the layer.
bool in_memory(const Tensor& t, at::ScalarType dtype) {
  return t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && !t.requires_grad() && is_plain(t);
}

// The same there, with factor·statistics + bias for the batch.
template <typename T>
void move(const Tensor& running, const T* statistics, double factor, const Optional& bias, double momentum) {
  auto* value = running.mutable_data_ptr<T>();
  const auto* shift = bias ? bias->const_data_ptr<T>() : nullptr;
  for (int64_t c = 0; c < running.numel(); ++c) {
    const T batch = statistics[c] * T(factor) + (shift ? shift[c] : T(0));
    value[c] = T((1 - momentum) * value[c] + momentum * batch);
  }
}

// As PyTorch's own batch norm writes them: without a new version, as that has them saved for backward where it runs on
// the same statistics.
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

void RunningUpdates::count(const NormArguments& norm) {
  if (!counted_) return;
  count_ = norm.num_batches_tracked ? *norm.num_batches_tracked + 1 : Tensor();
  if (count_.defined())
    writes_.push_back([counter = *norm.num_batches_tracked, count = count_] { counter.copy_(count); });
}

void RunningUpdates::add(const NormArguments& norm, const Tensor& statistics, c10::SymIntArrayRef sizes,
                         const Optional& bias, bool synchronised) {
  if (!counted_ || !norm.running_mean) return;
  const auto &running_mean = *norm.running_mean, &running_var = *norm.running_var;
  TORCH_CHECK_VALUE(!is_batched(statistics) || (is_batched(running_mean) && is_batched(running_var)),
                    "conv_bn: expected running_mean and running_var that vmap maps over, as the statistics of each of "
                    "its calls are others, got one for all; map over them too, or give none "
                    "(torch.func.replace_all_batch_norm_modules_ takes them away)");
  c10::SymInt values = sizes[0];
  for (const auto& size : sizes.slice(2)) values = values * size;
  const auto unbiased = c10::SymFloat(values) / c10::SymFloat(values - 1);
  const auto dtype = statistics.scalar_type();
  if (!synchronised && norm.momentum && in_memory(statistics, dtype) && in_memory(running_mean, dtype) &&
      in_memory(running_var, dtype) && (!bias || (is_plain(*bias) && in_memory(bias->detach(), dtype)))) {
    writes_.push_back([=, momentum = *norm.momentum, factor = unbiased.expect_float()] {
      AT_DISPATCH_FLOATING_TYPES(dtype, "running statistics", [&] {
        const auto* batch = statistics.const_data_ptr<scalar_t>();
        move<scalar_t>(running_mean, batch, 1, bias, momentum);
        move<scalar_t>(running_var, batch + running_var.numel(), factor, {}, momentum);
      });
    });
    return;
  }
  const auto batch = statistics.detach();
  auto mean = batch.select(0, 0), var = batch.select(0, 1);
  if (bias) mean = mean + bias->detach();
  const auto counts = synchronised ? batch.select(0, 2) : Tensor();
  var = synchronised ? var * (counts / (counts - 1).clamp_min(1)) : var * at::Scalar(unbiased);
  const auto write = [&](const Tensor& running, const Tensor& batch) {
    auto value = moved(running, batch, norm.momentum, count_);
    if (synchronised)
      value = at::where(counts > 0, value, running.to(value.scalar_type()));  // else nobody has a sample
    writes_.push_back([running, value] { write_to(running, value); });
  };
  write(running_mean, mean);
  write(running_var, var);
}

void RunningUpdates::write() const {
  for (const auto& write : writes_) write();
}

}  // namespace fusedconvbn
