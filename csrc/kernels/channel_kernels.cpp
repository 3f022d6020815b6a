// The registry of channel kernels by device, and the layout of the maps that they take.
#include "channel_kernels.h"

#include <array>

namespace fusedconvbn {

namespace {

auto& registry() {
  static std::array<const ChannelKernels*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> kernels{};
  return kernels;
}

}  // namespace

RegisterChannelKernels::RegisterChannelKernels(c10::DeviceType device,
                                               const ChannelKernels& kernels) {
  registry()[static_cast<size_t>(device)] = &kernels;
}

const ChannelKernels& channel_kernels(const at::Tensor& y) {
  const auto* kernels = registry()[static_cast<size_t>(y.device().type())];
  TORCH_CHECK(kernels, "fusedconvbn: this build has no kernels for device '", y.device(),
              "'; install it again where nvcc and a CUDA build of torch are found");
  return *kernels;
}

c10::ScalarType statistics_dtype(const at::Tensor& y) {
  return y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

int64_t samples_of(const at::Tensor& y, const NormVectors& norm) {
  for (const auto& t : {norm.statistics, norm.weight, norm.bias})
    if (t.defined()) return t.size(-1) / y.size(1);
  return 1;
}

bool writes_du(const at::Tensor& y, const Activation& activation, const GradSource& source) {
  const bool has_residual = source.residual.defined() || source.result.defined();
  return has_residual || (y.is_cpu() && !activation.cheap());
}

std::optional<ChannelLayout> channel_layout(const at::Tensor& y) {
  const int64_t batch = y.size(0), channels = y.size(1);
  const int64_t inner = y.numel() == 0 ? 0 : y.numel() / (batch * channels);
  const auto channels_innermost = [&] {
    int64_t stride = channels;
    for (int64_t d = y.dim() - 1; d >= 0; --d) {
      if (d == 1) continue;
      if (y.size(d) != 1 && y.stride(d) != stride) return false;
      stride *= y.size(d);
    }
    return channels == 1 || y.stride(1) == 1;
  };
  // A map with one value per plane, or with one channel, has both layouts. Take the one with the
  // longer runs.
  const bool contiguous = y.is_contiguous();
  if (contiguous && (inner > 1 || channels == 1))
    return ChannelLayout{1, batch, channels, inner, false};
  if (contiguous || channels_innermost()) return ChannelLayout{1, batch * inner, channels, 1, true};
  return std::nullopt;
}

ChannelLayout dense_layout(const at::Tensor& y, int64_t samples) {
  const auto found = channel_layout(y);
  TORCH_INTERNAL_ASSERT(found, "a map of strides ", y.strides(), " reached a kernel");
  auto layout = *found;
  (layout.channels_last ? layout.samples : layout.channels) *= samples;
  layout.outer /= samples;
  return layout;
}

}  // namespace fusedconvbn
