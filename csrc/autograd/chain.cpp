// The autograd function of a chain, and what vmap runs. It saves the chain's tensors, the saved
// maps and the statistics for backward.
#include "../chain/chain.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../chain/backward.h"
#include "../chain/dispatch.h"
#include "../chain/recompute_check.h"
#include "../chain/tensors.h"
#include "../chain/unfused.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether a call of the backward operator would do nothing before it reaches the kernel.
bool ends_in_kernel(const Tensor& dout, const variable_list& variables) {
  return !at::GradMode::is_enabled() && !any_has_tangent(dout) && is_plain(dout) &&
         is_plain(variables);
}

bool result_is_saved(at::IntArrayRef saved, size_t links) {
  return !saved.empty() && saved.back() == int64_t(links);
}

// How backward finds its tensors among the saved variables: the numbers of tensors, parts and saved
// maps, the index of the last residual if backward does not read it (`unread`), and the same index
// if dout is its gradient (`plain_residual`); -1 otherwise.
struct SavedLayout {
  int64_t tensors, parts, saved, unread = -1, plain_residual = -1;

  static constexpr size_t size = 5;
  static SavedLayout read(at::IntArrayRef v) { return {v[0], v[1], v[2], v[3], v[4]}; }
  std::array<int64_t, size> values() const {
    return {tensors, parts, saved, unread, plain_residual};
  }
};

struct ChainFunction : torch::autograd::Function<ChainFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd puts backward into its graph

  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, at::IntArrayRef links,
                        at::ArrayRef<double> scalars, std::string_view process_group,
                        at::IntArrayRef saved, const std::optional<Tensor>* known_statistics,
                        ChainResult* result) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *result = chain_forward(tensors, links, scalars, process_group, saved, *known_statistics);
    const auto& [output, saved_maps, statistics] = *result;
    const auto chain = unpack(links, scalars, tensors.size());
    auto variables = tensors.vec();
    SavedLayout layout{int64_t(tensors.size()), chain.parts, int64_t(saved.size())};
    if (const auto index = chain.back().residual;
        index >= 0 && !last_residual_is_read(chain, saved)) {
      variables[index] = output.new_empty({});
      layout.unread = index;
      if (chain.back().norm()->activation.none()) layout.plain_residual = index;
    }
    variables.insert(variables.end(), saved_maps.begin(), saved_maps.end());
    // A detached alias of the result. If the result itself were saved and a hook of
    // save_for_backward raised, as the early stop of torch.utils.checkpoint does, the result and
    // its node would own each other and never be freed.
    if (result_is_saved(saved, chain.size())) variables.push_back(output.tensor_data());
    variables.insert(variables.end(), statistics.begin(), statistics.end());
    ctx->save_for_backward(std::move(variables));
    // One list, because each entry of saved_data costs a hash and an allocation.
    const auto values = layout.values();
    std::vector<int64_t> integers(values.begin(), values.end());
    integers.insert(integers.end(), saved.begin(), saved.end());
    integers.insert(integers.end(), links.begin(), links.end());
    ctx->saved_data["integers"] = std::move(integers);
    if (!scalars.empty()) ctx->saved_data["scalars"] = scalars.vec();
    if (!process_group.empty()) ctx->saved_data["process_group"] = std::string(process_group);
    if (recompute_is_checked()) ctx->saved_data["layer"] = layer_name();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    // Forward settled the dtypes. Under the caller's autocast a recomputed map could get another.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto variables = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto integers = data["integers"].toIntVector();
    const auto layout = SavedLayout::read(integers);
    const auto lists = at::IntArrayRef(integers).slice(SavedLayout::size);
    const auto saved = lists.slice(0, layout.saved), links = lists.slice(layout.saved);
    const auto scalars =
        data.count("scalars") ? data["scalars"].toDoubleVector() : std::vector<double>();
    const auto process_group =
        data.count("process_group") ? data["process_group"].toStringRef() : std::string();
    if (layout.unread >= 0) {
      auto& residual = variables[layout.unread];
      residual = residual.expand_symint(grads[0].sym_sizes());
    }
    const auto all = at::TensorList(variables);
    const size_t count = layout.tensors, last_map = count + saved.size();
    variable_list result(count + 6);  // one for each argument of forward
    // Without an activation the gradient of the last residual is dout.
    const int64_t plain_residual = layout.plain_residual, parts = layout.parts;
    if (plain_residual >= 0 && ctx->needs_input_grad(plain_residual))
      result[plain_residual] = grads[0];
    std::vector<int64_t> needs_grad;
    for (int64_t i = 0; i < int64_t(count); ++i) {
      if (!ctx->needs_input_grad(i) || i == plain_residual) continue;
      const auto index = i < parts ? 0 : i;
      if (needs_grad.empty() || needs_grad.back() != index) needs_grad.push_back(index);
    }
    if (needs_grad.empty()) return result;

    const auto name = data.count("layer") ? data["layer"].toStringRef() : std::string();
    const auto restore_name =
        c10::make_scope_exit([outer = std::exchange(layer_name(), name)] { layer_name() = outer; });
    const auto call = [&](const auto& backward, auto&& dout) {
      return backward(std::forward<decltype(dout)>(dout), all.slice(0, count),
                      all.slice(count, saved.size()), all.slice(last_map), links, scalars,
                      process_group, saved, needs_grad);
    };
    std::vector<Tensor> computed;
    if (ends_in_kernel(grads[0], variables)) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      RECORD_FUNCTION("fusedconvbn::_chain_backward", {});
      computed = call(chain_backward_kernel, std::move(grads[0]));
    } else {
      computed = call(chain_backward, grads[0]);
    }
    for (size_t k = 0; k < needs_grad.size(); ++k) result[needs_grad[k]] = computed[k];
    if (parts > 1 && needs_grad[0] == 0) {
      const Tensor whole = std::move(result[0]);
      c10::SymInt first = 0;
      for (int64_t p = 0; p < parts; ++p) {
        const auto channels = variables[p].sym_size(1);
        result[p] = ctx->needs_input_grad(p) ? whole.narrow_symint(1, first, channels) : Tensor();
        first = first + channels;
      }
    }
    return result;
  }
};

ChainResult chain_forward_autograd(at::TensorList tensors, at::IntArrayRef links,
                                   at::ArrayRef<double> scalars, std::string_view process_group,
                                   at::IntArrayRef saved,
                                   const std::optional<Tensor>& known_statistics) {
  if (needs_unfused(tensors))
    return unfused_chain(tensors, links, scalars, process_group, saved, {});
  if (!any_requires_grad(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return chain_forward(tensors, links, scalars, process_group, saved, known_statistics);
  }
  ChainResult result;
  std::get<0>(result) = ChainFunction::apply(tensors, links, scalars, process_group, saved,
                                             &known_statistics, &result);
  return result;
}

// The gradients of the unfused chain: a backward that autograd can differentiate.
std::vector<Tensor> differentiable_backward(const Tensor& dout, at::TensorList tensors,
                                            at::TensorList saved_maps, at::TensorList,
                                            at::IntArrayRef links, at::ArrayRef<double> scalars,
                                            std::string_view process_group, at::IntArrayRef saved,
                                            at::IntArrayRef needs_grad) {
  check_indices("needs_grad", needs_grad, 0, int64_t(tensors.size()) - 1);
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  const auto chain = unpack(links, scalars, tensors.size());
  const bool has_result = result_is_saved(saved, chain.size());
  // T_0 as one tensor. The inputs are views, so that the gradient of a tensor that was computed
  // from another input does not flow on into that input.
  const auto parts = chain.parts;
  variable_list own{concatenated(tensors.slice(0, parts))};
  if (parts > 1)
    links = links.slice(2);
  else
    own[0] = own[0].view_as(own[0]);
  for (const auto& t : tensors.slice(parts)) own.push_back(t.view_as(t));
  variable_list inputs;
  for (const auto i : needs_grad) {
    auto& t = own[i == 0 ? 0 : i - parts + 1];
    inputs.push_back(t.requires_grad() ? t : t.requires_grad_());
  }
  const auto output = std::get<0>(unfused_chain(
      own, links, scalars, process_group, {}, has_result ? saved_maps.back().detach() : Tensor()));
  auto grads =
      torch::autograd::grad({output}, inputs, {dout}, /*retain_graph=*/create_graph, create_graph,
                            /*allow_unused=*/true);
  for (size_t k = 0; k < grads.size(); ++k)
    if (!grads[k].defined())  // of a bias that cancels; it must be in the graph, as the others are
      grads[k] = create_graph ? inputs[k] * 0 : at::zeros_like(inputs[k]);
  return grads;
}

std::vector<Tensor> chain_backward_autograd(const Tensor& dout, at::TensorList tensors,
                                            at::TensorList saved_maps, at::TensorList statistics,
                                            at::IntArrayRef links, at::ArrayRef<double> scalars,
                                            std::string_view process_group, at::IntArrayRef saved,
                                            at::IntArrayRef needs_grad) {
  if (any_requires_grad(tensors) || any_requires_grad(dout) || any_has_tangent(tensors) ||
      any_has_tangent(dout))
    return differentiable_backward(dout, tensors, saved_maps, statistics, links, scalars,
                                   process_group, saved, needs_grad);
  at::AutoDispatchBelowADInplaceOrView guard;
  return chain_backward(dout, tensors, saved_maps, statistics, links, scalars, process_group, saved,
                        needs_grad);
}

ChainResult chain_forward_vmap(at::TensorList tensors, at::IntArrayRef links,
                               at::ArrayRef<double> scalars, std::string_view process_group,
                               at::IntArrayRef saved, const std::optional<Tensor>&) {
  return unfused_chain(tensors, links, scalars, process_group, saved, {});
}

// Not differentiable: the chain that is given these statistics differentiates through its input.
Tensor channel_stats_autograd(const Tensor& input, std::string_view process_group) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return channel_stats(input, process_group);
}

// Under vmap the chain computes its own statistics and ignores these.
Tensor channel_stats_vmap(const Tensor& input, std::string_view) {
  return at::zeros({2, input.size(1)}, input.options());
}

}  // namespace

// torch.func.vmap
TORCH_LIBRARY_IMPL(fusedconvbn, FuncTorchBatchedDecomposition, m) {
  m.impl("_channel_stats", TORCH_FN(channel_stats_vmap));
  m.impl("_chain_forward", TORCH_FN(chain_forward_vmap));
  m.impl("_chain_backward", TORCH_FN(differentiable_backward));
}

// torch.autograd.grad(…, is_grads_batched=True)
TORCH_LIBRARY_IMPL(fusedconvbn, Batched, m) {
  m.impl("_chain_backward", TORCH_FN(differentiable_backward));
}

TORCH_LIBRARY_IMPL(fusedconvbn, Autograd, m) {
  m.impl("_channel_stats", TORCH_FN(channel_stats_autograd));
  m.impl("_chain_forward", TORCH_FN(chain_forward_autograd));
  m.impl("_chain_backward", TORCH_FN(chain_backward_autograd));
}

}  // namespace fusedconvbn
