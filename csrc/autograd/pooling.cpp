#include "../kernels/pooling.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/max_pool2d.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../composite.h"
#include "../cpu/arena.h"
#include "../ops.h"

namespace fusedconvbn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct MaxPool : torch::autograd::Function<MaxPool> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Pool& pool) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const ArenaScope scope;
    const auto [output, places] = max_pool2d_with_places(input, pool.packed());
    // What backward asks of the input is its sizes.
    const auto like = input.new_empty({}).expand_symint(input.sym_sizes());
    ctx->save_for_backward({like, places});
    ctx->saved_data["pool"] = pool.packed();
    ctx->saved_data["channels_last"] =
        input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &like = saved[0], &places = saved[1];
    const ArenaScope scope;
    return {max_pool2d_backward(grads[0], places, ctx->saved_data["pool"].toIntVector(),
                                like.sym_sizes(), ctx->saved_data["channels_last"].toBool()),
            Tensor()};
  }
};

Tensor floor_divide(const Tensor& t, const at::Scalar& by) { return at::div(t, by, "floor"); }

// Where PyTorch would have found the values, row·width + column.
Tensor places_in_map(const Tensor& places, const Pool& pool, const c10::SymInt& width) {
  const auto firsts = [&](size_t dim) {  // the first row, or column, of each window
    const auto size = places.sym_size(int64_t(dim) - 2);
    return at::arange(size, places.options().dtype(at::kLong)) * pool.stride[dim] -
           pool.padding[dim];
  };
  const auto place = places.to(at::kLong), row = floor_divide(place, pool.kernel[1]);
  const auto column = place - row * pool.kernel[1];
  return (row * pool.dilation[0] + firsts(0).unsqueeze(1)) * width +
         (column * pool.dilation[1] + firsts(1));
}

// In operators that autograd and vmap know.
Tensor differentiable_backward(const Tensor& dout, const Tensor& places, at::IntArrayRef packed,
                               c10::SymIntArrayRef sizes, bool channels_last) {
  const auto pool = Pool::unpack(packed);
  return pool.backward_of_indices(dout, places_in_map(places, pool, sizes[3]), sizes,
                                  channels_last);
}

Tensor max_pool2d_backward_autograd(const Tensor& dout, const Tensor& places,
                                    at::IntArrayRef packed, c10::SymIntArrayRef sizes,
                                    bool channels_last) {
  if (any_requires_grad(dout) || any_has_tangent(dout))
    return differentiable_backward(dout, places, packed, sizes, channels_last);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return max_pool2d_backward(dout, places, packed, sizes, channels_last);
}

}  // namespace

Tensor max_pool2d(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto known = [](at::IntArrayRef v) { return v.size() == 1 || v.size() == 2; };
  if (any_requires_grad(input) && input.dim() == 4 && !needs_unfused(input) && known(kernel_size) &&
      (stride.empty() || known(stride)) && known(padding) && known(dilation)) {
    const auto pool = Pool::of(kernel_size, stride, padding, dilation, ceil_mode);
    if (pool.places() <= Pool::most_places) return MaxPool::apply(input, pool);
  }
  return at::max_pool2d(input, kernel_size, stride, padding, dilation,
                        ceil_mode);  // and its errors
}

TORCH_LIBRARY_IMPL(fusedconvbn, Autograd, m) {
  m.impl("_max_pool2d_backward", TORCH_FN(max_pool2d_backward_autograd));
}

// torch.func.vmap, and torch.autograd.grad(…, is_grads_batched=True)
TORCH_LIBRARY_IMPL(fusedconvbn, FuncTorchBatchedDecomposition, m) {
  m.impl("_max_pool2d_backward", TORCH_FN(differentiable_backward));
}
TORCH_LIBRARY_IMPL(fusedconvbn, Batched, m) {
  m.impl("_max_pool2d_backward", TORCH_FN(differentiable_backward));
}

}  // namespace fusedconvbn
