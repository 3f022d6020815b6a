// Feature maps as the channel kernels take them. The kernels read the two dense layouts
// (channel_layout) and at least one value; these functions take any map.
#pragma once

#include "../kernels/channel_kernels.h"

namespace fusedconvbn {

// The map itself, or a copy in the dense layout that is closer to it.
at::Tensor dense(const at::Tensor& t);

// The same of T_i. T_0 is always in the layout that the meta kernels promise.
at::Tensor dense_input(const at::Tensor& t, size_t i);

// `t` in the layout of `like`; an error, in which `t` is called `name`, unless it has its sizes,
// dtype and device.
at::Tensor dense_like(const char* name, const at::Tensor& t, const at::Tensor& like);

// The kernels of the same names. Of no values there is nothing to apply, and sums are 0.
void apply_(at::Tensor& out, const at::Tensor& y, const NormVectors& norm,
            const Activation& activation, const at::Tensor& residual);
at::Tensor grad_stats(const at::Tensor& dout, const at::Tensor& y, int64_t samples,
                      const NormVectors& norm, const Activation& activation,
                      const GradSource& source, const ParameterGrads& grads);
void grad_apply_(at::Tensor& out, const at::Tensor& dout, const at::Tensor& y,
                 const NormVectors& norm, const at::Tensor& sums, const Activation& activation);

// Whether nobody else can see what is written to `t`. (PyTorch's rule where it adds up gradients in
// place. Never on CUDA, where a kernel on another stream may still have to read it, and never where
// the memory is not PyTorch's own.)
bool nobody_else_has(const at::Tensor& t);

}  // namespace fusedconvbn
