// Meta kernels: the shapes, dtypes and strides of the results of the private operators.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../chain/chain.h"
#include "../chain/convolution.h"
#include "../chain/dispatch.h"
#include "../kernels/channel_kernels.h"
#include "../kernels/pool.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

ChainResult chain_forward_meta(at::TensorList tensors, at::IntArrayRef links,
                               at::ArrayRef<double> scalars, std::string_view process_group,
                               at::IntArrayRef saved, const std::optional<Tensor>&) {
  const auto chain = unpack(links, scalars, tensors.size());
  check_indices("saved", saved, 1, int64_t(chain.size()));
  std::vector<Tensor> maps{concatenated(tensors.slice(0, chain.parts))}, saved_maps, statistics;
  for (const auto& link : chain) {
    const auto t = maps.back();
    if (const auto* conv = link.conv()) {
      const auto& weight = tensors[link.weight];
      maps.push_back(at::empty_symint(conv->output_sizes(t.sym_sizes(), weight.sym_sizes()),
                                      t.options().memory_format(conv_memory_format(t, weight))));
    } else {
      maps.push_back(at::empty_like(t, t.options().memory_format(t.suggest_memory_format())));
      if (!link.normalises()) continue;
      const int64_t rows = process_group.empty() || !link.norm()->batch_statistics() ? 2 : 5;
      statistics.push_back(
          at::empty_symint({rows, t.sym_size(1)}, t.options().dtype(statistics_dtype(t))));
    }
  }
  for (const auto i : saved)
    if (i < int64_t(chain.size())) saved_maps.push_back(maps[i]);
  return {maps.back(), saved_maps, statistics};
}

std::vector<Tensor> chain_backward_meta(const Tensor&, at::TensorList tensors, at::TensorList,
                                        at::TensorList, at::IntArrayRef links,
                                        at::ArrayRef<double> scalars, std::string_view,
                                        at::IntArrayRef, at::IntArrayRef needs_grad) {
  // A convolution returns the gradients of input and weight in the memory format of its result.
  const auto chain = unpack(links, scalars, tensors.size());
  check_indices("needs_grad", needs_grad, 0, int64_t(tensors.size()) - 1);
  auto grads = tensors.vec();
  auto t = concatenated(tensors.slice(0, chain.parts));
  grads[0] =
      chain[0].conv() ? t : at::empty_like(t, t.options().memory_format(t.suggest_memory_format()));
  for (size_t i = 0; i < chain.size(); ++i) {
    if (const auto* conv = chain[i].conv()) {
      auto& weight = grads[chain[i].weight];
      const auto format = conv_memory_format(t, weight);
      if (i == 0) grads[0] = at::empty_like(t, t.options().memory_format(format));
      t = at::empty_symint(conv->output_sizes(t.sym_sizes(), weight.sym_sizes()),
                           t.options().memory_format(format));
      weight = at::empty_like(weight, weight.options().memory_format(format));
    } else {
      t = at::empty_like(t, t.options().memory_format(t.suggest_memory_format()));
      if (chain[i].residual >= 0) grads[chain[i].residual] = t;
    }
  }
  std::vector<Tensor> result;
  for (const auto i : needs_grad) result.push_back(at::empty_like(grads[i]));
  return result;
}

Tensor channel_stats_meta(const Tensor& input, std::string_view process_group) {
  const int64_t rows = process_group.empty() ? 2 : 5;
  return at::empty_symint({rows, input.sym_size(1)},
                          input.options().dtype(statistics_dtype(input)));
}

std::tuple<Tensor, Tensor> max_pool2d_meta(const Tensor& input, at::IntArrayRef packed) {
  auto [output, indices] = Pool::unpack(packed).with_indices(input);
  return {output, at::empty_like(indices, indices.options().dtype(at::kByte))};
}

Tensor max_pool2d_backward_meta(const Tensor& dout, const Tensor&, at::IntArrayRef,
                                c10::SymIntArrayRef sizes, bool channels_last) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return at::empty_symint(sizes, dout.options().memory_format(format));
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, Meta, m) {
  m.impl("_channel_stats", TORCH_FN(channel_stats_meta));
  m.impl("_chain_forward", TORCH_FN(chain_forward_meta));
  m.impl("_chain_backward", TORCH_FN(chain_backward_meta));
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_meta));
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_meta));
}

}  // namespace fusedconvbn
