// Wrappers that let the channel kernels of a chain take maps of any strides, and empty ones. The
// kernels themselves take the two dense layouts (channel_layout) and at least one value.
#pragma once

#include "../kernels/channel_kernels.h"

namespace fusedconvbn {

// The map itself if it is dense, or a copy in the memory format that it suggests.
at::Tensor dense(const at::Tensor& t);

// The same for map T_i of a chain. T_0, the input, is always in the memory format that it suggests,
// as csrc/meta predicts the strides of the results from it.
at::Tensor dense_input(const at::Tensor& t, size_t i);

// `t` in the layout of `like`. An error, whose message uses `name` for `t`, unless both have the
// same sizes, dtype and device.
at::Tensor dense_like(const char* name, const at::Tensor& t, const at::Tensor& like);

// The kernels of the same names. If the map is empty, apply_ and grad_apply_ do nothing; stats and
// grad_stats return zeros, and grad_stats writes zeros to the dγ and dβ that are needed.
at::Tensor stats(const at::Tensor& y);
void apply_(at::Tensor& out, const at::Tensor& y, const NormVectors& norm,
            const Activation& activation, const at::Tensor& residual);
at::Tensor grad_stats(const at::Tensor& dout, const at::Tensor& y, int64_t samples,
                      const NormVectors& norm, const Activation& activation,
                      const GradSource& source, const ParameterGrads& grads);
void grad_apply_(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y,
                 const NormVectors& norm, const at::Tensor& sums, const Activation& activation);

// Whether `t` can be overwritten because nobody else refers to its memory, by the rule by which
// PyTorch accumulates gradients in place. False on CUDA, where a kernel on another stream may still
// read `t`, and false for memory that PyTorch did not allocate.
bool nobody_else_has(const at::Tensor& t);

}  // namespace fusedconvbn
