// A chain in differentiable ATen operators.
#include "unfused.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/var_mean.h>

#include "../kernels/channel_kernels.h"
#include "chain.h"

namespace fusedconvbn {

using at::Tensor;

Tensor activate(const Tensor& u, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::none:
      return u;
    case ActivationKind::relu:
      return at::relu(u);
    case ActivationKind::relu6:
      return at::hardtanh(u, 0, 6);
    case ActivationKind::leaky_relu:
      return at::leaky_relu(u, activation.parameter);
    case ActivationKind::elu:
      return at::elu(u, activation.parameter);
    case ActivationKind::silu:
      return at::silu(u);
    case ActivationKind::hardswish:
      return at::hardswish(u);
    case ActivationKind::gelu:
      return at::gelu(u);
    case ActivationKind::gelu_tanh:
      return at::gelu(u, "tanh");
    case ActivationKind::mish:
      return at::mish(u);
    case ActivationKind::sigmoid:
      return at::sigmoid(u);
    case ActivationKind::tanh:
      return at::tanh(u);
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor finish(Tensor out, const std::optional<Tensor>& residual, const Activation& activation) {
  if (residual) out = out + residual->to(out.scalar_type());
  return activate(out, activation);
}

ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const Tensor& result) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      process_group.empty(),
      "fusedconvbn: second derivatives, forward mode and torch.func are not there for "
      "synchronised batch norm");
  const auto chain = unpack(links, scalars, tensors.size());
  check_indices("saved", saved, 1, int64_t(chain.size()));
  std::vector<Tensor> maps{concatenated(tensors.slice(0, chain.parts))}, saved_maps, statistics;
  for (size_t i = 0; i < chain.size(); ++i) {
    const auto t = maps.back();
    const auto tensor = [&](int64_t index) {
      return index < 0 ? std::nullopt : std::optional<Tensor>(tensors[index]);
    };
    const auto weight = tensor(chain[i].weight), bias = tensor(chain[i].bias);
    if (const auto* conv = chain[i].conv()) {
      const auto dtype = t.scalar_type();
      const auto added =
          bias && !bias_cancels(chain, i) ? std::optional<Tensor>(bias->to(dtype)) : std::nullopt;
      maps.push_back(at::convolution(t, weight->to(dtype), added, conv->stride, conv->padding,
                                     conv->dilation, conv->transposed, conv->output_padding,
                                     conv->groups));
      continue;
    }
    if (chain[i].gate()) {
      maps.push_back(t * weight->to(t.scalar_type()));
      continue;
    }
    if (chain[i].prelu()) {
      maps.push_back(at::prelu(t, weight->to(t.scalar_type())));
      continue;
    }
    const auto& norm = *chain[i].norm();
    auto u = t.to(statistics_dtype(t));
    if (norm.normalises()) {
      std::vector<int64_t> dims{0}, per_channel(t.dim(), 1);
      for (int64_t d = 2; d < t.dim(); ++d) dims.push_back(d);
      per_channel[1] = -1;
      Tensor var, mean;
      if (norm.batch_statistics()) {
        std::tie(var, mean) = at::var_mean(u, dims, /*correction=*/0, /*keepdim=*/false);
      } else {
        const auto running = tensors[chain[i].statistics].to(u.scalar_type());
        mean = running.select(0, 0), var = running.select(0, 1);
      }
      auto scale = inverse_std(norm, var, t.sym_numel() / t.sym_size(1));
      if (weight) scale = scale * *weight;
      auto centre = mean;
      // A bias that cancels stays in the graph, so that its gradient is 0 and not undefined.
      if (i > 0 && bias_cancels(chain, i - 1) && chain[i - 1].bias >= 0)
        centre = mean + tensors[chain[i - 1].bias].to(mean.scalar_type()) * 0;
      u = (u - centre.reshape(per_channel)) * scale.reshape(per_channel);
      if (bias) u = u + bias->reshape(per_channel);
      statistics.push_back(at::stack({mean, var}));
    }
    if (const auto residual = tensor(chain[i].residual)) u = u + *residual;
    const bool slopes_known =
        result.defined() && i + 1 == chain.size() && norm.activation.slope_from_result();
    maps.push_back(
        (slopes_known ? u * result.gt(0) : activate(u, norm.activation)).to(t.scalar_type()));
  }
  for (const auto i : saved)
    if (i < int64_t(chain.size())) saved_maps.push_back(maps[i]);
  return {maps.back(), saved_maps, statistics};
}

}  // namespace fusedconvbn
