// The device code of chains: four kernels over a feature map with channel dimension 1.
//
//   channel_stats        mean, var                   of y  (var is the biased one)
//   channel_apply_       out = act(u)                u = (y − mean)·a + β [+ residual]
//   channel_grad_stats   S1 = Σ du, S2 = Σ du·(y − mean), dγ, dβ       du = act'(u)·dout, written
//   where asked for channel_grad_apply_  out = a·du − κ·S2·(y − mean) − (a/R)·S1
//
// Every feature map of a call has the sizes and strides of y, which is dense with the channels
// either outside the positions (contiguous) or innermost (channels last): see `channel_layout`.
// `out` may be y or dout itself. What is not there, of maps and vectors, is undefined.
//
// Vectors belong to groups, G = samples·C of them: those of a batch norm to a channel (samples 1),
// those of a gate to a sample and channel (samples N). They are contiguous, of G values of
// `statistics_dtype(y)`.
#pragma once

#include <ATen/core/Tensor.h>

#include "activation.h"
#include "channel_vectors.h"

// Exported: who has kernels for another device registers them from a library of its own.
namespace [[gnu::visibility("default")]] fusedconvbn {

// A norm of G groups. Without statistics it has mean 0 and r 1: a gate is one with γ = s, and where
// there is nothing at all u = y.
struct NormVectors {
  at::Tensor statistics;  // (2 or more, G): mean, var, and, where they are counted, the R values of
                          // all processes
  at::Tensor weight, bias;  // γ, β
  Normalisation how;
};

// The samples that have vectors of their own: all of them, or 1 where y has one vector a channel.
int64_t samples_of(const at::Tensor& y, const NormVectors&);

// act' is taken where `result`, act(u), says, or else at u, which is made again with `residual`, if
// there is one. `du`, where it is asked for (with a residual it is), may be dout itself.
struct GradSource {
  at::Tensor residual, result, du;
};

// Whether grad_stats writes du: with a residual or its result, whose gradient it is, and on CPU for
// an activation that takes long, so that it is computed once.
bool writes_du(const at::Tensor& y, const Activation& activation, const GradSource& source);

// dγ and dβ, written where they are asked for.
struct ParameterGrads {
  at::Tensor weight, bias;
};

// One batch for the running statistics of a norm, as the table of running.h has it.
struct RunningUpdate {
  at::Tensor mean, var,
      counter;  // (C), (C) and a number; the counter, or the others, may be undefined
  at::Tensor statistics, bias;  // of the batch, and what its mean is short of
  double momentum;              // NaN for the average of all batches
  double values;                // R, or 0 where row 2 of the statistics has it
};

struct ChannelKernels {
  at::Tensor (*stats)(const at::Tensor& y, int64_t samples);  // (2, G): mean, var
  void (*apply_)(at::Tensor& out, const at::Tensor& y, const NormVectors&, const Activation&,
                 const at::Tensor& residual);
  // (2, G): S1, S2
  at::Tensor (*grad_stats)(const at::Tensor& dout, const at::Tensor& y, int64_t samples,
                           const NormVectors&, const Activation&, const GradSource&,
                           const ParameterGrads&);
  // `sums` are S1 and S2 of all processes; undefined where the statistics do not depend on y.
  void (*grad_apply_)(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y,
                      const NormVectors&, const at::Tensor& sums, const Activation&);
  void (*update_running)(at::ArrayRef<RunningUpdate>);
};

// Called once per device by the library's static initialisers, so a build without a device lacks
// only files.
struct RegisterChannelKernels {
  RegisterChannelKernels(c10::DeviceType device, const ChannelKernels& kernels);
};

// The kernels of the device of `y`; an error when this build has none.
const ChannelKernels& channel_kernels(const at::Tensor& y);

// Statistics and C-sized vectors are float for float and narrower, double for double.
c10::ScalarType statistics_dtype(const at::Tensor& y);

// A feature map as `samples` × `outer` × C × `inner` values (contiguous), or `samples` × `outer` ×
// C (channels last, inner 1), with vectors for each sample. Contiguous samples with vectors of
// their own are as good as channels.
struct ChannelLayout {
  int64_t samples, outer, channels, inner;
  bool channels_last;
  int64_t count() const { return outer * inner; }  // values of a group
  int64_t groups() const { return samples * channels; }
};

// The layout of y with one vector for all samples, or nothing when y is neither dense form.
std::optional<ChannelLayout> channel_layout(const at::Tensor& y);

// The same of a map that is dense, with vectors for each of `samples`: 1 or all.
ChannelLayout dense_layout(const at::Tensor& y, int64_t samples = 1);

}  // namespace fusedconvbn
