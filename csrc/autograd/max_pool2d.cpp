// The autograd function of max pooling, and what vmap and second derivatives run.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../chain/dispatch.h"
#include "../chain/tensors.h"
#include "../cpu/arena.h"
#include "../kernels/pool.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct MaxPool : torch::autograd::Function<MaxPool> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input,
                               const std::vector<int64_t>& pool) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const ArenaScope scope;
    const auto [output, offsets] = max_pool2d_with_offsets(input, pool);
    // Backward needs only the sizes of the input.
    const auto like = input.new_empty({}).expand_symint(input.sym_sizes());
    ctx->save_for_backward({like, offsets});
    ctx->saved_data["pool"] = pool;
    ctx->saved_data["channels_last"] =
        input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    ctx->mark_non_differentiable({offsets});
    ctx->set_materialize_grads(false);  // no zeros for the gradient of the offsets
    return {output, offsets};
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const auto &like = saved[0], &offsets = saved[1];
    const ArenaScope scope;
    return {max_pool2d_backward(grads[0], offsets, ctx->saved_data["pool"].toIntVector(),
                                like.sym_sizes(), ctx->saved_data["channels_last"].toBool()),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> max_pool2d_autograd(const Tensor& input, at::IntArrayRef pool) {
  if (any_requires_grad(input)) {
    const auto result = MaxPool::apply(input, pool.vec());
    return {result[0], result[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return max_pool2d_with_offsets(input, pool);
}

Tensor floor_divide(const Tensor& t, const at::Scalar& by) { return at::div(t, by, "floor"); }

// Converts offsets in the pooling windows to PyTorch's indices in the map, row·width + column.
Tensor indices_in_map(const Tensor& offsets, const Pool& pool, const c10::SymInt& width) {
  const auto firsts = [&](size_t dim) {  // the first row, or column, of each window
    const auto size = offsets.sym_size(int64_t(dim) - 2);
    return at::arange(size, offsets.options().dtype(at::kLong)) * pool.stride[dim] -
           pool.padding[dim];
  };
  const auto offset = offsets.to(at::kLong), row = floor_divide(offset, pool.kernel[1]);
  const auto column = offset - row * pool.kernel[1];
  return (row * pool.dilation[0] + firsts(0).unsqueeze(1)) * width +
         (column * pool.dilation[1] + firsts(1));
}

// The backward in operators that autograd and vmap know.
Tensor differentiable_backward(const Tensor& dout, const Tensor& offsets, at::IntArrayRef packed,
                               c10::SymIntArrayRef sizes, bool channels_last) {
  const auto pool = Pool::unpack(packed);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto input = at::empty_symint(sizes, dout.options().memory_format(format));
  return pool.backward_of_indices(dout, indices_in_map(offsets, pool, sizes[3]), input);
}

Tensor max_pool2d_backward_autograd(const Tensor& dout, const Tensor& offsets,
                                    at::IntArrayRef packed, c10::SymIntArrayRef sizes,
                                    bool channels_last) {
  if (any_requires_grad(dout) || any_has_tangent(dout))
    return differentiable_backward(dout, offsets, packed, sizes, channels_last);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return max_pool2d_backward(dout, offsets, packed, sizes, channels_last);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedconvbn, Autograd, m) {
  m.impl("_max_pool2d", TORCH_FN(max_pool2d_autograd));
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
