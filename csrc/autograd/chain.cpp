// Autograd of a chain: what is saved is its tensors, the kept maps and the statistics.
#include "../chain.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../ops.h"
#include "../unfused.h"

namespace fusedconvbn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool any_requires_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

bool any_has_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); });
}

// A C++ autograd function has no rule for forward mode and none for torch.func.
bool needs_unfused(at::TensorList tensors) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         any_has_tangent(tensors);
}

// Whether nothing stands between a call of the backward operator and its kernel: no derivative of it, no tracing, no
// subclass, no mode, no lazy negation.
bool ends_in_kernel(const Tensor& dout, at::TensorList saved) {
  if (at::GradMode::is_enabled() || any_has_tangent(dout)) return false;
  at::AutoDispatchBelowADInplaceOrView guard;
  auto keys = dout.key_set();
  for (const auto& t : saved) keys = keys | t.key_set();
  const auto all = c10::DispatchKeySet(c10::DispatchKeySet::FULL).remove(c10::DispatchKey::BackendSelect);
  const auto key = c10::impl::computeDispatchKeySet(keys, all).highestPriorityTypeId();
  return key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA;
}

struct ChainFunction : torch::autograd::Function<ChainFunction> {
  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> eps,
                        at::IntArrayRef kept, ChainResult* result) {
    at::AutoDispatchBelowADInplaceOrView guard;
    *result = chain_forward(tensors, links, eps, kept);
    const auto& [output, kept_maps, statistics] = *result;
    auto saved = tensors.vec();
    saved.insert(saved.end(), kept_maps.begin(), kept_maps.end());
    saved.insert(saved.end(), statistics.begin(), statistics.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["tensors"] = int64_t(tensors.size());
    ctx->saved_data["links"] = links.vec();
    ctx->saved_data["eps"] = eps.vec();
    ctx->saved_data["kept"] = kept.vec();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    // Forward settled the dtypes; under an autocast of the caller a remade map would have another one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const auto all = at::TensorList(saved);
    const auto links = ctx->saved_data["links"].toIntVector();
    const auto eps = ctx->saved_data["eps"].toDoubleVector();
    const auto kept = ctx->saved_data["kept"].toIntVector();
    const auto count = static_cast<size_t>(ctx->saved_data["tensors"].toInt());
    const auto last_kept = count + kept.size();
    std::vector<int64_t> wanted;
    for (size_t i = 0; i < count; ++i)
      if (ctx->needs_input_grad(i)) wanted.push_back(i);
    const auto call = [&](const auto& backward, auto&& dout) {
      return backward(std::forward<decltype(dout)>(dout), all.slice(0, count), all.slice(count, kept.size()),
                      all.slice(last_kept), links, eps, kept, wanted);
    };
    std::vector<Tensor> computed;
    if (ends_in_kernel(grads[0], saved)) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      RECORD_FUNCTION("fusedconvbn::_chain_backward", {});
      computed = call(chain_backward_kernel, std::move(grads[0]));
    } else {
      computed = call(chain_backward, grads[0]);
    }
    variable_list result(count + 4);  // one for each argument of forward
    for (size_t k = 0; k < wanted.size(); ++k) result[wanted[k]] = computed[k];
    return result;
  }
};

ChainResult chain_forward_autograd(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> eps,
                                   at::IntArrayRef kept) {
  if (needs_unfused(tensors)) return unfused_chain(tensors, links, eps, kept);
  if (!any_requires_grad(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return chain_forward(tensors, links, eps, kept);
  }
  ChainResult result;
  std::get<0>(result) = ChainFunction::apply(tensors, links, eps, kept, &result);
  return result;
}

// The backward of backward: the gradients of the unfused chain, which autograd can follow.
std::vector<Tensor> differentiable_backward(const Tensor& dout, at::TensorList tensors, at::IntArrayRef links,
                                            at::ArrayRef<double> eps, at::IntArrayRef wanted) {
  check_places("wanted", wanted, 0, int64_t(tensors.size()) - 1);
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  variable_list own;  // so that a tensor which was made from another one does not pass its gradient on
  for (const auto& t : tensors) own.push_back(t.view_as(t));
  const auto output = std::get<0>(unfused_chain(own, links, eps, {}));
  variable_list inputs;
  for (const auto i : wanted) inputs.push_back(own[i]);
  auto grads = torch::autograd::grad({output}, inputs, {dout}, /*retain_graph=*/create_graph, create_graph,
                                     /*allow_unused=*/true);
  for (size_t k = 0; k < grads.size(); ++k)
    if (!grads[k].defined()) grads[k] = inputs[k] * 0;  // of a bias that cancels; part of the graph like the others
  return grads;
}

std::vector<Tensor> chain_backward_batched(const Tensor& dout, at::TensorList tensors, at::TensorList, at::TensorList,
                                           at::IntArrayRef links, at::ArrayRef<double> eps, at::IntArrayRef,
                                           at::IntArrayRef wanted) {
  return differentiable_backward(dout, tensors, links, eps, wanted);
}

std::vector<Tensor> chain_backward_autograd(const Tensor& dout, at::TensorList tensors, at::TensorList kept_maps,
                                            at::TensorList statistics, at::IntArrayRef links, at::ArrayRef<double> eps,
                                            at::IntArrayRef kept, at::IntArrayRef wanted) {
  if (any_requires_grad(tensors) || any_requires_grad(dout) || any_has_tangent(tensors) || any_has_tangent(dout))
    return differentiable_backward(dout, tensors, links, eps, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return chain_backward(dout, tensors, kept_maps, statistics, links, eps, kept, wanted);
}

}  // namespace

// torch.func.vmap
TORCH_LIBRARY_IMPL(fusedconvbn, FuncTorchBatchedDecomposition, m) {
  m.impl("conv_bn", TORCH_FN(conv_bn));
  m.impl("_chain_forward", TORCH_FN(unfused_chain));
  m.impl("_chain_backward", TORCH_FN(chain_backward_batched));
}

// torch.autograd.grad(…, is_grads_batched=True)
TORCH_LIBRARY_IMPL(fusedconvbn, Batched, m) { m.impl("_chain_backward", TORCH_FN(chain_backward_batched)); }

TORCH_LIBRARY_IMPL(fusedconvbn, Autograd, m) {
  m.impl("_chain_forward", TORCH_FN(chain_forward_autograd));
  m.impl("_chain_backward", TORCH_FN(chain_backward_autograd));
}

}  // namespace fusedconvbn
