#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "kernels/pooling.h"

namespace fusedconvbn {

TORCH_LIBRARY(fusedconvbn, m) {
  m.def(
      "conv_bn(Tensor input, Tensor weight, Tensor? bias=None, Tensor? bn_weight=None, "
      "Tensor? bn_bias=None, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
      "Tensor(c!)? num_batches_tracked=None, Tensor? residual=None, "
      "bool training=True, float? momentum=0.1, float eps=1e-5, int[1]? stride=None, int[1]? "
      "padding=None, "
      "int[1]? dilation=None, bool transposed=False, int[1]? output_padding=None, int groups=1, "
      "str activation=\"none\", str arithmetic=\"batchnorm\", str process_group=\"\") -> Tensor");
  m.def(
      "conv_bn_chain(Tensor[] tensors, Tensor(a!)[] buffers, int[] links, float[] scalars, int[] "
      "buffer_counts, "
      "float[] momenta, int[] training, str process_group=\"\", int[] kept=[], Tensor? "
      "input_statistics=None) -> "
      "Tensor");
  m.def("_channel_stats(Tensor input, str process_group) -> Tensor");
  m.def(
      "_chain_forward(Tensor[] tensors, int[] links, float[] scalars, str process_group, int[] "
      "kept, "
      "Tensor? input_statistics=None) -> (Tensor output, Tensor[] kept_maps, Tensor[] statistics)");
  m.def(
      "_chain_backward(Tensor dout, Tensor[] tensors, Tensor[] kept_maps, Tensor[] statistics, "
      "int[] links, float[] scalars, str process_group, int[] kept, int[] wanted) -> Tensor[]");
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] "
      "dilation=1, "
      "bool ceil_mode=False) -> Tensor");
  m.def("_max_pool2d(Tensor input, int[] pool) -> (Tensor output, Tensor places)");
  m.def(
      "_max_pool2d_backward(Tensor dout, Tensor places, int[] pool, SymInt[] sizes, bool "
      "channels_last) -> Tensor");
  m.impl("max_pool2d", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(max_pool2d));
  m.impl("conv_bn", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(conv_bn));
  m.impl("conv_bn_chain", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(conv_bn_chain));
}

namespace {

// Looked up when the library is loaded: a static of a function may be half made when another thread
// forks.
template <typename F>
auto handle(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

const auto chain_forward_op = handle("fusedconvbn::_chain_forward", chain_forward);
const auto chain_backward_op = handle("fusedconvbn::_chain_backward", chain_backward);
const auto channel_stats_op = handle("fusedconvbn::_channel_stats", channel_stats);
const auto max_pool2d_with_places_op = handle("fusedconvbn::_max_pool2d", max_pool2d_with_places);
const auto max_pool2d_backward_op =
    handle("fusedconvbn::_max_pool2d_backward", max_pool2d_backward);

}  // namespace

ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef kept, const std::optional<Tensor>& input_statistics) {
  return chain_forward_op.call(tensors, links, scalars, process_group, kept, input_statistics);
}

Tensor channel_stats(const Tensor& input, std::string_view process_group) {
  return channel_stats_op.call(input, process_group);
}

std::vector<Tensor> chain_backward(const Tensor& dout, at::TensorList tensors,
                                   at::TensorList kept_maps, at::TensorList statistics,
                                   at::IntArrayRef links, at::ArrayRef<double> scalars,
                                   std::string_view process_group, at::IntArrayRef kept,
                                   at::IntArrayRef wanted) {
  return chain_backward_op.call(dout, tensors, kept_maps, statistics, links, scalars, process_group,
                                kept, wanted);
}

std::tuple<Tensor, Tensor> max_pool2d_with_places(const Tensor& input, at::IntArrayRef pool) {
  return max_pool2d_with_places_op.call(input, pool);
}

Tensor max_pool2d_backward(const Tensor& dout, const Tensor& places, at::IntArrayRef pool,
                           c10::SymIntArrayRef sizes, bool channels_last) {
  return max_pool2d_backward_op.call(dout, places, pool, sizes, channels_last);
}

}  // namespace fusedconvbn
