// Properties of the arguments of an operator that decide how it runs.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedconvbn {

// Whether the call is traced, for example by export or compile. If no gradient is needed, the graph
// should then contain plain convolutions.
bool is_traced(const at::Tensor& t);

// Whether a call with these tensors passes only autograd and autocast before it reaches the kernel
// of their device: no tracing, subclass, mode, transform or lazy negation.
bool is_plain(at::TensorList tensors);

bool any_requires_grad(at::TensorList tensors);

bool any_has_tangent(at::TensorList tensors);

// Whether the chain must run unfused, because a C++ autograd function supports neither forward-mode
// AD nor torch.func.
bool needs_unfused(at::TensorList tensors);

}  // namespace fusedconvbn
