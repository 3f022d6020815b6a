// Under autocast a chain runs in the lower precision, as a convolution does. Norm parameters are
// not cast. Convolutions cast their weights where they use them, so autograd saves the parameter
// and not a copy of it.
#include "../chain/chain.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../chain/dispatch.h"
#include "autocast.h"

namespace fusedconvbn {

using at::Tensor;

bool autocast_enabled(const Tensor& t) {
  return !t.is_meta() && at::autocast::is_autocast_enabled(t.device().type());
}

at::ScalarType conv_dtype(const Tensor& input) {
  const auto device = input.device().type();
  const bool eligible = autocast_enabled(input) && input.scalar_type() != at::kDouble;
  return eligible ? at::autocast::get_autocast_dtype(device) : input.scalar_type();
}

namespace {

template <c10::DeviceType device, c10::DispatchKey key>
ChainResult chain_forward_autocast(at::TensorList tensors, at::IntArrayRef links,
                                   at::ArrayRef<double> scalars, std::string_view process_group,
                                   at::IntArrayRef saved, const std::optional<Tensor>& statistics) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  const auto dtype = at::autocast::get_autocast_dtype(device);
  auto cast = tensors.vec();
  const auto lower = [&](int64_t i) {
    if (i >= 0) cast[i] = at::autocast::cached_cast(dtype, cast[i], device);
  };
  const auto chain = unpack(links, scalars, tensors.size());
  // A chain without convolutions runs in the dtype of its input, as batch norm does.
  if (std::any_of(chain.begin(), chain.end(), [](const Link& link) { return link.conv(); })) {
    for (int64_t part = 0; part < chain.parts; ++part) lower(part);
    for (const auto& link : chain) {
      lower(link.residual);
      if (link.gate()) lower(link.weight);
      if (link.conv()) lower(link.bias);
    }
  }
  return chain_forward(cast, links, scalars, process_group, saved, statistics);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, AutocastCPU, m) {
  m.impl("_chain_forward", (chain_forward_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>));
}

TORCH_LIBRARY_IMPL(fusedconvbn, AutocastCUDA, m) {
  m.impl("_chain_forward", (chain_forward_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>));
}

}  // namespace fusedconvbn
