// Properties of tensors that decide how an operator runs.
#include "tensors.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/DispatchKeyExtractor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace fusedconvbn {

using at::Tensor;

bool is_traced(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool is_plain(at::TensorList tensors) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  c10::DispatchKeySet keys;
  for (const auto& t : tensors) keys = keys | t.key_set();
  const auto all =
      c10::DispatchKeySet(c10::DispatchKeySet::FULL).remove(c10::DispatchKey::BackendSelect);
  const auto key = c10::impl::computeDispatchKeySet(keys, all).highestPriorityTypeId();
  return c10::toFunctionalityKey(key) == c10::DispatchKey::Dense && key != c10::DispatchKey::Meta;
}

bool any_requires_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

bool any_has_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); });
}

bool needs_unfused(at::TensorList tensors) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         any_has_tangent(tensors);
}

}  // namespace fusedconvbn
