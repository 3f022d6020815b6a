// What the composite operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include "chain/chain.h"

namespace fusedconvbn {

// act(out [+ residual]) in ATen
at::Tensor finish(at::Tensor out, const std::optional<at::Tensor>& residual,
                  const Activation& activation);

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

// The place of the result of a chain of `links` links if it is to be kept: where it is all that
// act' of the last one needs of what else would have to be remade.
std::vector<int64_t> kept_result(const Norm& last, bool has_residual, int64_t links);

}  // namespace fusedconvbn
