// Feature maps in the layouts that the channel kernels take.
#include "maps.h"

#include <ATen/CachedTensorUtils.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace fusedconvbn {

using at::Tensor;

Tensor dense(const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() >= 2 && t.size(1) > 0, "a norm link needs channels, got shape ",
                    t.sizes());
  return t.numel() == 0 || channel_layout(t) ? t : t.contiguous(t.suggest_memory_format());
}

Tensor dense_input(const Tensor& t, size_t i) {
  return dense(i == 0 ? t.contiguous(t.suggest_memory_format()) : t);
}

Tensor dense_like(const char* name, const Tensor& t, const Tensor& like) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type() &&
                        t.device() == like.device(),
                    "expected a ", name, " like the output, ", like.toString(), like.sizes(),
                    ", got ", t.toString(), t.sizes());
  if (t.numel() == 0) return t;
  const auto layout = channel_layout(t);
  if (layout && layout->channels_last == dense_layout(like).channels_last) return t;
  return at::empty_like(like).copy_(t);
}

Tensor stats(const Tensor& y) {
  return y.numel() ? channel_kernels(y).stats(y, /*samples=*/1)
                   : at::zeros({2, y.size(1)}, y.options().dtype(statistics_dtype(y)));
}

void apply_(Tensor& out, const Tensor& y, const NormVectors& norm, const Activation& activation,
            const Tensor& residual) {
  if (y.numel()) channel_kernels(y).apply_(out, y, norm, activation, residual);
}

Tensor grad_stats(const Tensor& dout, const Tensor& y, int64_t samples, const NormVectors& norm,
                  const Activation& activation, const GradSource& source,
                  const ParameterGrads& grads) {
  if (y.numel())
    return channel_kernels(y).grad_stats(dout, y, samples, norm, activation, source, grads);
  for (auto t : {grads.weight, grads.bias})
    if (t.defined()) t.zero_();
  return at::zeros({2, samples * y.size(1)},
                   y.options().dtype(statistics_dtype(y)).memory_format(std::nullopt));
}

void grad_apply_(Tensor& out, const Tensor& dout, const Tensor& y, const NormVectors& norm,
                 const Tensor& sums, const Activation& activation) {
  if (y.numel()) channel_kernels(y).grad_apply_(out, dout, y, norm, sums, activation);
}

bool nobody_else_has(const Tensor& t) {
  return t.is_cpu() && at::caching::adjusted_use_count(t) == 1 &&
         !at::caching::is_cached_tensor(t) && t.has_storage() && t.storage().use_count() == 1 &&
         t.storage().allocator();
}

}  // namespace fusedconvbn
