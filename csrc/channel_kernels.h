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
#pragma once

#include <ATen/core/Tensor.h>

#include "activation.h"

namespace fusedconvbn {

struct Affine {
  at::Tensor mean, scale, shift;
};

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
  void (*grad_apply_)(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y, const Affine&,
                      const at::Tensor& slope, const at::Tensor& offset, const Activation&);
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

}  // namespace fusedconvbn
