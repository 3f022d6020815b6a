#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "unfused.h"

namespace fusedconvbn {

using at::Tensor;

Tensor finish(Tensor out, const std::optional<Tensor>& residual, const Activation& activation) {
  if (residual) out = out + residual->to(out.scalar_type());
  return activate(out, activation);
}

bool is_traced(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool any_requires_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

std::vector<int64_t> kept_result(const Norm& last, bool has_residual, int64_t links) {
  const bool kept = last.activation.slope_from_result() && (has_residual || !last.normalises());
  return kept ? std::vector<int64_t>{links} : std::vector<int64_t>{};
}

}  // namespace fusedconvbn
