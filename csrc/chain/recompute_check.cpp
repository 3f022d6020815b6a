// The comparison of recomputed statistics with those of forward, and its bounds.
#include "recompute_check.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/sqrt.h>

#include <atomic>
#include <cmath>
#include <limits>

namespace fusedconvbn {

namespace {

std::atomic<bool> checked = false;

// How much two algorithms for the same convolution may differ in all values of a channel alike,
// relative to the size of the values.
double shared_error(const at::Tensor& y) {
  const auto dtype = y.scalar_type();
  if (dtype != at::kFloat) return dtype == at::kDouble ? 1e-12 : 1e-4;
  const auto backend = y.is_cuda() ? at::Float32Backend::CUDA : at::Float32Backend::MKLDNN;
  switch (at::globalContext().float32Precision(backend, at::Float32Op::CONV)) {
    case at::Float32Precision::TF32:  // one of the algorithms may round its operands to 11 bits
      return 0x1p-9;
    case at::Float32Precision::BF16:  // to 8
      return 0x1p-6;
    default:  // cuDNN has Winograd and FFT algorithms
      return y.is_cuda() ? 3e-5 : 1e-6;
  }
}

// The relative rounding error of a value in the dtype of the map. It is independent in each value.
double own_error(const at::Tensor& y) {
  switch (y.scalar_type()) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kFloat:
      return std::numeric_limits<float>::epsilon();
    default:
      return y.scalar_type() == at::kHalf ? 0x1p-10 : 0x1p-7;
  }
}

}  // namespace

void check_recompute(bool enabled) { checked = enabled; }
bool recompute_is_checked() { return checked; }

std::string& layer_name() {
  static thread_local std::string name;
  return name;
}

// With s = std + |mean|, a value may differ by d = (shared + own)·s. The own errors of R values
// average out:
//   |mean' − mean| ≤ e = (shared + 3·own/√R)·s      |var' − var| ≤ 2·std·e + d²
void check_recomputed(const at::Tensor& y, const at::Tensor& found, const at::Tensor& saved) {
  const double shared = shared_error(y), own = own_error(y), values = double(y.numel() / y.size(1));
  const auto mean = saved.select(0, 0), var = saved.select(0, 1), std = at::sqrt(var);
  const auto size = std + mean.abs();
  const auto bound_mean = (shared + 3 * own / std::sqrt(values)) * size,
             bound = (shared + own) * size;
  const auto right =
      (found.select(0, 0) - mean)
          .abs()
          .le(bound_mean)
          .logical_and((found.select(0, 1) - var).abs().le(2 * std * bound_mean + bound * bound));
  // A channel that was not finite in forward cannot be compared, and passes.
  const auto wrong = right.logical_or(mean.isfinite().logical_not()).logical_not();
  const auto count = wrong.sum().item<int64_t>();
  TORCH_CHECK(count == 0, "check_recompute: ", layer_name().empty() ? "conv_bn" : layer_name(),
              ": the statistics of ", count, " of ", wrong.numel(),
              " channels are not those of forward. Its input or weight was changed before backward "
              "where autograd does not see it, as by a write to .data");
}

}  // namespace fusedconvbn
