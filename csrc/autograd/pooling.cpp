#include "../pooling.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../composite.h"
#include "../cpu/arena.h"

namespace fusedconvbn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct MaxPool : torch::autograd::Function<MaxPool> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const PoolWindow& window, bool ceil_mode) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const ArenaScope scope;
    const auto [output, indices] =
        at::max_pool2d_with_indices(input, window.kernel, window.stride, window.padding, window.dilation, ceil_mode);
    // What backward asks of the input is its sizes.
    const auto like = input.new_zeros({}).expand_symint(input.sym_sizes());
    ctx->save_for_backward({like, places_in_window(indices, window.packed(), input.sym_size(3))});
    ctx->saved_data["window"] = window.packed();
    ctx->saved_data["ceil_mode"] = ceil_mode;
    ctx->saved_data["channels_last"] = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &like = saved[0], &places = saved[1];
    const auto packed = ctx->saved_data["window"].toIntVector();
    const auto window = PoolWindow::unpack(packed);
    const auto format =
        ctx->saved_data["channels_last"].toBool() ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const ArenaScope scope;
    const auto indices = places_in_map(places, packed, like.sym_size(3));
    const auto input = at::empty_like(like, like.options(), format);  // not read
    return {at::max_pool2d_with_indices_backward(grads[0], input, window.kernel, window.stride, window.padding,
                                                 window.dilation, ctx->saved_data["ceil_mode"].toBool(), indices),
            Tensor(), Tensor()};
  }
};

}  // namespace

Tensor max_pool2d(const Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation, bool ceil_mode) {
  const auto known = [](at::IntArrayRef v) { return v.size() == 1 || v.size() == 2; };
  if (any_requires_grad(input) && input.dim() == 4 && !needs_unfused(input) && known(kernel_size) &&
      (stride.empty() || known(stride)) && known(padding) && known(dilation)) {
    const auto window = PoolWindow::of(kernel_size, stride, padding, dilation);
    if (window.places() <= PoolWindow::most_places) return MaxPool::apply(input, window, ceil_mode);
  }
  return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);  // and its errors
}

}  // namespace fusedconvbn
