#include "recompute_check.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/sqrt.h>
#include <torch/library.h>

#include <atomic>

namespace fusedconvbn {

namespace {

std::atomic<bool> checked = false;

}  // namespace

bool recompute_is_checked() { return checked; }

std::string& layer_name() {
  static thread_local std::string name;
  return name;
}

void check_recomputed(const at::Tensor& remade, const at::Tensor& saved, at::ScalarType dtype) {
  // Another algorithm for the same convolution rounds differently, but means over a channel agree far better than that.
  const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 1e-4;
  const auto mean = saved.select(0, 0), var = saved.select(0, 1);
  const auto bound_mean = tolerance * (at::sqrt(var) + mean.abs()), bound_var = tolerance * (var + mean * mean * 1e-6);
  const auto right =
      (remade.select(0, 0) - mean).abs().le(bound_mean).logical_and((remade.select(0, 1) - var).abs().le(bound_var));
  const auto wrong = right.logical_or(mean.isfinite().logical_not()).logical_not();  // a NaN that was there is right
  const auto count = wrong.sum().item<int64_t>();
  TORCH_CHECK(count == 0, "check_recompute: ", layer_name().empty() ? "conv_bn" : layer_name(), ": the statistics of ",
              count, " of ", wrong.numel(),
              " channels are not those of forward. Its input or weight was changed before backward where autograd does "
              "not see it, as by a write to .data");
}

TORCH_LIBRARY_FRAGMENT(fusedconvbn, m) {
  m.def("_check_recompute(bool enabled) -> ()", [](bool enabled) { checked = enabled; });
  m.def("_set_layer_name(str name) -> ()", [](std::string_view name) { layer_name() = name; });
}

}  // namespace fusedconvbn
