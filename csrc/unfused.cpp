#include "unfused.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/var_mean.h>

#include "chain.h"
#include "channel_kernels.h"

namespace fusedconvbn {

namespace {

Tensor activate(const Tensor& u, Activation activation) {
  switch (activation) {
    case Activation::none:
      return u;
    case Activation::relu:
      return at::relu(u);
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

ChainResult unfused_chain(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> eps,
                          at::IntArrayRef kept) {
  const auto chain = unpack(links, eps, tensors.size());
  check_places("kept", kept, 1, int64_t(chain.size()) - 1);
  std::vector<Tensor> maps{tensors[0]}, kept_maps, statistics;
  for (size_t i = 0; i < chain.size(); ++i) {
    const auto t = maps.back();
    const auto tensor = [&](int64_t place) { return place < 0 ? std::nullopt : std::optional<Tensor>(tensors[place]); };
    const auto weight = tensor(chain[i].weight), bias = tensor(chain[i].bias);
    if (const auto* conv = chain[i].conv()) {
      maps.push_back(at::convolution(t, *weight, bias_cancels(chain, i) ? std::nullopt : bias, conv->stride,
                                     conv->padding, conv->dilation, conv->transposed, conv->output_padding,
                                     conv->groups));
      continue;
    }
    const auto& norm = *chain[i].norm();
    std::vector<int64_t> dims{0}, per_channel(t.dim(), 1);
    for (int64_t d = 2; d < t.dim(); ++d) dims.push_back(d);
    per_channel[1] = -1;
    const auto u = t.to(statistics_dtype(t));
    const auto [var, mean] = at::var_mean(u, dims, /*correction=*/0, /*keepdim=*/false);
    auto scale = inverse_std(norm, var, t.sym_numel() / t.sym_size(1));
    if (weight) scale = scale * *weight;
    auto out = (u - mean.reshape(per_channel)) * scale.reshape(per_channel);
    if (bias) out = out + bias->reshape(per_channel);
    maps.push_back(activate(out, norm.activation).to(t.scalar_type()));
    statistics.push_back(at::stack({mean, var}));
  }
  for (const auto i : kept) kept_maps.push_back(maps[i]);
  return {maps.back(), kept_maps, statistics};
}

}  // namespace fusedconvbn
