// The forward of a chain, which backward also uses to recompute maps.
#include "forward.h"

#include <ATen/ops/_prelu_kernel.h>
#include <ATen/ops/empty_like.h>

#include "../cpu/arena.h"
#include "convolution.h"
#include "process_group.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

// The batch statistics of y, (2, C) or, if synchronised, (5, C) (dispatch.h).
Tensor batch_statistics(const Tensor& y, const std::string& process_group) {
  const auto own = stats(y);
  return process_group.empty() ? own : joint_statistics(own, y.numel() / y.size(1), process_group);
}

Tensor statistics_of(const State& state, size_t i, const Tensor& y) {
  const auto& link = state.chain[i];
  // A copy, because an operator must not return its argument.
  if (link.norm()->arithmetic == Arithmetic::running)
    return state.tensor(link.statistics)
        .to(statistics_dtype(y), /*non_blocking=*/false, /*copy=*/true,
            at::MemoryFormat::Contiguous);
  // A process without samples may take part in a synchronised batch.
  TORCH_CHECK_VALUE(y.numel() > 0 || !state.process_group.empty(),
                    "a norm link needs values, got shape ", y.sizes());
  return batch_statistics(y, state.process_group);
}

// Gives the first norm links that use batch statistics those that are side by side in `known`.
void set_statistics(State& state, const Tensor& known) {
  int64_t channels = 0, used = 0;
  for (const auto& part : state.tensors.slice(0, state.chain.parts)) channels += part.size(1);
  for (size_t i = 0; i < state.chain.size() && used < known.size(1); ++i) {
    const auto& link = state.chain[i];
    if (const auto* conv = link.conv()) {
      const auto& weight = state.tensor(link.weight);
      channels = conv->transposed ? weight.size(1) * conv->groups : weight.size(0);
    } else if (link.norm() && link.norm()->batch_statistics()) {
      TORCH_CHECK_VALUE(used + channels <= known.size(1),
                        "expected statistics of the first norm links, got shape ", known.sizes(),
                        " for a link of ", channels, " channels behind ", used);
      state.statistics[i] = known.narrow(1, used, channels).clone(at::MemoryFormat::Contiguous);
      used += channels;
    }
  }
}

Tensor convolved(const State& state, size_t i, const Tensor& in) {
  const auto& link = state.chain[i];
  const bool has_bias = link.bias >= 0 && !bias_cancels(state.chain, i);
  return convolution(*link.conv(), in, state.weight(i),
                     has_bias ? std::optional<Tensor>(state.tensor(link.bias)) : std::nullopt);
}

}  // namespace

void run_links(State& state, size_t first, size_t last, const std::vector<bool>& retain) {
  for (size_t i = first; i < last; ++i) {
    const auto& link = state.chain[i];
    const bool free_to_overwrite = !retain[i] && (i > first || !state.saved[i]);
    const Tensor in = retain[i] ? state.maps[i] : std::move(state.maps[i]);
    auto& out = state.maps[i + 1];
    if (link.conv()) {
      out = convolved(state, i, in);
      continue;
    }
    const auto y = dense_input(in, i);
    if (link.prelu()) {
      out = at::_prelu_kernel(y, state.slopes(i, y));
      continue;
    }
    if (link.normalises() && !state.statistics[i].defined())
      state.statistics[i] = statistics_of(state, i, y);
    out = free_to_overwrite || !y.is_same(in) ? y : at::empty_like(y);
    if (link.gate())
      apply_(out, y, state.gate(i, y), {}, {});
    else
      apply_(out, y, state.norm(i, y), link.norm()->activation, state.residual(i, y));
  }
}

ChainResult chain_forward_kernel(at::TensorList tensors, at::IntArrayRef links,
                                 at::ArrayRef<double> scalars, std::string_view process_group,
                                 at::IntArrayRef saved, const std::optional<Tensor>& known) {
  const ArenaScope scope;
  State state(tensors, links, scalars, process_group, saved);
  const auto& chain = state.chain;
  if (known && known->defined()) set_statistics(state, *known);
  state.make_input();
  run_links(state, 0, chain.size(), state.saved);

  ChainResult result;
  auto& [output, saved_maps, statistics] = result;
  output = state.maps.back();
  for (const auto i : saved)
    if (i < int64_t(chain.size())) saved_maps.push_back(state.maps[i]);
  for (const auto& s : state.statistics)
    if (s.defined()) statistics.push_back(s);
  return result;
}

Tensor channel_stats_kernel(const Tensor& y, std::string_view process_group) {
  TORCH_CHECK_VALUE(y.dim() >= 2 && y.size(1) > 0 && (y.numel() > 0 || !process_group.empty()),
                    "expected a map with values, got shape ", y.sizes());
  return batch_statistics(y.contiguous(y.suggest_memory_format()), std::string(process_group));
}

}  // namespace fusedconvbn
