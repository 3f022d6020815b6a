// The device code of chains: four kernels over a feature map with channel dimension 1, and
// one that updates running statistics.
//
//   channel_stats         mean and (biased) var of y
//   channel_apply_        out = act(u),  u = (y − mean)·a + β [+ residual]
//   channel_grad_stats    S1 = Σ du,  S2 = Σ du·(y − mean),  du = act'(u)·dout;  dγ, dβ and du are
//                         written if requested
//   channel_grad_apply_   out = a·du − κ·S2·(y − mean) − (a/R)·S1
//
// Every feature map of a call has the sizes and strides of y. y is dense, with the channels either
// outside the positions (contiguous) or innermost (channels last): see `channel_layout`. `out` may
// be y or dout itself. An absent map or vector is an undefined tensor.
//
// A vector has one value for each of G = samples·C groups: one per channel for a batch norm
// (samples is 1), one per sample and channel for a gate (samples is N). Vectors are contiguous and
// have the dtype `statistics_dtype(y)`.
#pragma once

#include <ATen/core/Tensor.h>

#include "activation.h"
#include "channel_vectors.h"

// Exported, so that another library can register kernels for another device.
namespace [[gnu::visibility("default")]] fusedconvbn {

// A norm of G groups. Without statistics, mean is 0 and r is 1: a gate is a norm with γ = s only.
// If all tensors are undefined, u = y.
struct NormVectors {
  at::Tensor statistics;    // (2 or more, G): mean, var and, if how.counted, R of all processes
  at::Tensor weight, bias;  // γ, β
  Normalisation how;
};

// The number of samples with vectors of their own: N, or 1 if all samples share the vectors.
int64_t samples_of(const at::Tensor& y, const NormVectors&);

// How grad_stats gets act': from `result`, which is act(u), if it is defined; otherwise from u,
// which the kernel recomputes with `residual`, if that is defined. If `du` is defined, du is
// written to it; it may be dout itself. See `writes_du`.
struct GradSource {
  at::Tensor residual, result, du;
};

// Whether grad_stats must write du: if there is a residual, because du is its gradient, and on CPU
// for an expensive activation, so that act' is computed only once.
bool writes_du(const at::Tensor& y, const Activation& activation, const GradSource& source);

// dγ and dβ; each is written if it is defined.
struct ParameterGrads {
  at::Tensor weight, bias;
};

// An update of the running statistics of a norm by one batch (RunningChannel in channel_vectors.h).
struct RunningUpdate {
  at::Tensor mean, var;         // (C); may both be undefined
  at::Tensor counter;           // num_batches_tracked; may be undefined
  at::Tensor statistics, bias;  // of the batch, and the bias that is missing from their mean
  double momentum;              // NaN for the average of all batches
  double values;                // R, or 0 if row 2 of the statistics has it
};

struct ChannelKernels {
  at::Tensor (*stats)(const at::Tensor& y, int64_t samples);  // (2, G): mean, var
  void (*apply_)(at::Tensor& out, const at::Tensor& y, const NormVectors&, const Activation&,
                 const at::Tensor& residual);
  // (2, G): S1, S2
  at::Tensor (*grad_stats)(const at::Tensor& dout, const at::Tensor& y, int64_t samples,
                           const NormVectors&, const Activation&, const GradSource&,
                           const ParameterGrads&);
  // `sums` are S1 and S2 of all processes; undefined if the statistics do not depend on y.
  void (*grad_apply_)(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y,
                      const NormVectors&, const at::Tensor& sums, const Activation&);
  void (*update_running)(at::ArrayRef<RunningUpdate>);
};

// Registers the kernels of a device. The static initialisers of each device's files construct one,
// so a build without a device only leaves out files.
struct RegisterChannelKernels {
  RegisterChannelKernels(c10::DeviceType device, const ChannelKernels& kernels);
};

// The kernels of the device of `y`. Raises an error if this build has none.
const ChannelKernels& channel_kernels(const at::Tensor& y);

// The dtype of statistics and vectors: double for a double map, float for any other.
c10::ScalarType statistics_dtype(const at::Tensor& y);

// A feature map as samples × outer × C × inner values (contiguous) or samples × outer × C values
// (channels last, inner is 1), with vectors for each sample. In a contiguous map, samples with
// vectors of their own count as channels and `samples` is 1.
struct ChannelLayout {
  int64_t samples, outer, channels, inner;
  bool channels_last;
  int64_t count() const { return outer * inner; }  // values per group
  int64_t groups() const { return samples * channels; }
};

// The layout of y if all samples share the vectors; nullopt if y is in neither dense layout.
std::optional<ChannelLayout> channel_layout(const at::Tensor& y);

// The layout of a dense map in which `samples` samples (1 or all) have vectors of their own.
ChannelLayout dense_layout(const at::Tensor& y, int64_t samples = 1);

}  // namespace fusedconvbn
