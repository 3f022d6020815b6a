// What operators ask of the tensors that they are called with.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedconvbn {

// What reads the graph, to export or compile it, is to find plain convolutions in it where no
// gradient is asked for.
bool is_traced(const at::Tensor& t);

// Whether nothing stands between a call with these tensors and the kernel of their device but
// autograd and autocast: no tracing, subclass, mode, transform or lazy negation.
bool is_plain(at::TensorList tensors);

bool any_requires_grad(at::TensorList tensors);

bool any_has_tangent(at::TensorList tensors);

// A C++ autograd function has no rule for forward mode and none for torch.func.
bool needs_unfused(at::TensorList tensors);

}  // namespace fusedconvbn
