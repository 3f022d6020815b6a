// The only device code of the project: four kernels over a feature map with channel dimension 1.
//
//   channel_stats        mean_c, var_c               of y  (var is the biased one)
//   channel_apply_       out = act(u)                u = (y − mean)·scale + shift [+ residual]
//   channel_grad_stats   Σ du, Σ du·(y − mean)       du = act'(u)·dout, written where asked for
//   channel_grad_apply_  out = scale·du + slope·(y − mean) + offset
//
// Every feature map of a call has the sizes and strides of y, which is dense with the channels either
// outside the positions (contiguous) or innermost (channels last): see `channel_layout`. Vectors have
// C values of `statistics_dtype(y)`. `out` may be y or dout itself. A residual or a result that is not there is
// undefined.
//
// Beside them two for the C-sized arithmetic in between, which would be a dozen launches a link (channel_vectors.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "activation.h"
#include "channel_vectors.h"

namespace fusedconvbn {

// Rows of C values: of `statistics` the first is the mean, of `vectors` the first two are scale and shift.
struct Affine {
  at::Tensor statistics, vectors;
};

// Row i of a contiguous (rows, C) tensor.
inline const void* row(const at::Tensor& t, int64_t i) {
  return static_cast<const char*>(t.const_data_ptr()) + i * t.size(1) * t.element_size();
}

// act' is taken where `result`, act(u), says, or else at u, which is made again with `residual`, if there is one. `du`,
// where it is asked for (with a residual it is), may be dout itself.
struct Joined {
  at::Tensor residual, result, du;
};

struct ChannelKernels {
  at::Tensor (*stats)(const at::Tensor& y);  // (2, C): mean, var
  void (*apply_)(at::Tensor& out, const at::Tensor& y, const Affine&, const Activation&, const at::Tensor& residual);
  at::Tensor (*grad_stats)(const at::Tensor& dout, const at::Tensor& y, const Affine&, const Activation&,
                           const Joined&);
  // Of `linear` the first two rows are slope and offset.
  void (*grad_apply_)(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y, const Affine&,
                      const at::Tensor& linear, const Activation&);

  // (3, C): scale, shift, r. A weight or bias that is not there is undefined.
  at::Tensor (*affine_vectors)(const at::Tensor& statistics, const at::Tensor& weight, const at::Tensor& bias,
                               const Normalisation&);
  // (3, C): slope, offset, dγ. Row 2 of the statistics counts the values where `counted`.
  at::Tensor (*grad_vectors)(const at::Tensor& sums, const at::Tensor& total, const Affine&, bool counted,
                             const Normalisation&);
};

// Called once per device by the library's static initialisers, so a build without a device lacks only files.
struct RegisterChannelKernels {
  RegisterChannelKernels(c10::DeviceType device, const ChannelKernels& kernels);
};

// The kernels of the device of `y`; an error when this build has none.
const ChannelKernels& channel_kernels(const at::Tensor& y);

// Statistics and C-sized vectors are float for float and narrower, double for double.
c10::ScalarType statistics_dtype(const at::Tensor& y);

// A feature map as `outer` × C × `inner` values (contiguous), or `outer` × C (channels last, inner 1).
struct ChannelLayout {
  int64_t outer, channels, inner;
  bool channels_last;
  int64_t count() const { return outer * inner; }  // values per channel
};

// The layout of y, or nothing when y is neither dense form.
std::optional<ChannelLayout> channel_layout(const at::Tensor& y);

// The same of a map that is dense.
ChannelLayout dense_layout(const at::Tensor& y);

}  // namespace fusedconvbn
