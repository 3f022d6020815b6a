// The state of a chain that runs: reads the tensors of each link and checks them.
#include "state.h"

namespace fusedconvbn {

using at::Tensor;

State::State(at::TensorList tensors, at::IntArrayRef links, at::ArrayRef<double> scalars,
             std::string_view process_group, at::IntArrayRef saved_indices)
    : tensors(tensors),
      chain(unpack(links, scalars, tensors.size())),
      process_group(process_group),
      maps(chain.size() + 1),
      saved(chain.size() + 1),
      statistics(chain.size()),
      cast_weights(chain.size()) {
  if (chain.parts == 1) maps[0] = tensors[0];
  saved[0] = chain.parts == 1;
  check_indices("saved", saved_indices, 1, int64_t(chain.size()));
  for (const auto i : saved_indices) saved[i] = true;
}

const Tensor& State::weight(size_t i) const {
  return cast_weights[i].defined() ? cast_weights[i] : tensor(chain[i].weight);
}

void State::make_input() {
  if (!maps[0].defined()) maps[0] = concatenated(tensors.slice(0, chain.parts));
}

Tensor State::residual(size_t i, const Tensor& y) const {
  const auto index = chain[i].residual;
  return index < 0 ? Tensor() : dense_like("residual", tensor(index), y);
}

NormVectors State::gate(size_t i, const Tensor& y) const {
  const auto& s = tensor(chain[i].weight);
  auto per_channel = y.sizes().vec();
  std::fill(per_channel.begin() + 2, per_channel.end(), 1);
  const at::IntArrayRef sizes(per_channel);
  TORCH_CHECK_VALUE(s.sizes() == sizes && s.device() == y.device(), "expected a gate of shape ",
                    sizes, " on ", y.device(), ", got ", s.toString(), s.sizes());
  return {.statistics = {},
          .weight = s.to(statistics_dtype(y)).reshape({-1}).contiguous(),
          .bias = {},
          .how = {}};
}

// s of a prelu, in a shape that broadcasts to y.
Tensor State::slopes(size_t i, const Tensor& y) const {
  const auto& s = tensor(chain[i].weight);
  TORCH_CHECK_VALUE(
      s.dim() == 1 && (s.size(0) == 1 || s.size(0) == y.size(1)) && s.device() == y.device(),
      "expected one slope or ", y.size(1), " on ", y.device(), ", got ", s.toString(), s.sizes());
  std::vector<int64_t> sizes(y.dim(), 1);
  sizes[1] = s.size(0);
  return s.to(y.scalar_type()).view(sizes);
}

// γ or β of the norm link that reads y; undefined if absent.
Tensor State::channel_vector(int64_t index, const Tensor& y) const {
  if (index < 0) return {};
  const auto& t = tensors[index];
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == y.size(1) && t.device() == y.device(),
                    "expected a vector of ", y.size(1), " values on ", y.device(), ", got ",
                    t.toString(), t.sizes());
  return t.to(statistics_dtype(y)).contiguous();
}

NormVectors State::norm(size_t i, const Tensor& y) const {
  const auto& norm = *chain[i].norm();
  if (!norm.normalises()) return {};
  const auto& found = statistics[i];
  const int64_t rows = synchronised(norm) ? 5 : 2;
  TORCH_CHECK_VALUE(found.sizes() == at::IntArrayRef({rows, y.size(1)}) &&
                        found.scalar_type() == statistics_dtype(y) && found.device() == y.device(),
                    "expected the statistics of a map of shape ", y.sizes(), " to be of shape [",
                    rows, ", ", y.size(1), "], ", statistics_dtype(y), " and on ", y.device(),
                    ", got ", found.sizes(), ", ", found.scalar_type(), " and ", found.device());
  const bool tutorial = norm.arithmetic == Arithmetic::tutorial;
  TORCH_CHECK_VALUE(!tutorial || process_group.empty(),
                    "the tutorial's arithmetic is not synchronised");
  return {found, channel_vector(chain[i].weight, y), channel_vector(chain[i].bias, y),
          Normalisation{norm.eps, tutorial, double(y.numel() / y.size(1)), synchronised(norm)}};
}

}  // namespace fusedconvbn
