// Defines all operators of the library and the C++ functions that call the private ones.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "chain/backward.h"
#include "chain/dispatch.h"
#include "chain/forward.h"
#include "chain/recompute_check.h"
#include "cpu/arena.h"
#include "cpu/winograd.h"
#include "running.h"

namespace fusedconvbn {

using at::Tensor;

namespace {

// Copies the reference to dout, so that the kernel does not overwrite the dout of the caller.
std::vector<Tensor> chain_backward_of_caller(const Tensor& dout, at::TensorList tensors,
                                             at::TensorList saved_maps, at::TensorList statistics,
                                             at::IntArrayRef links, at::ArrayRef<double> scalars,
                                             std::string_view process_group, at::IntArrayRef saved,
                                             at::IntArrayRef needs_grad) {
  return chain_backward_kernel(dout, tensors, saved_maps, statistics, links, scalars, process_group,
                               saved, needs_grad);
}

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const auto& entry : activation_table) names.emplace_back(entry.name);
  return names;
}

bool winograd_takes_sizes(at::IntArrayRef weight_sizes, at::IntArrayRef stride,
                          at::IntArrayRef dilation, bool transposed, int64_t groups) {
  return winograd_takes({.stride = stride.vec(),
                         .padding = std::vector<int64_t>(stride.size(), 0),
                         .dilation = dilation.vec(),
                         .output_padding = {},
                         .transposed = transposed,
                         .groups = groups},
                        weight_sizes);
}

}  // namespace

// All operators. Their Autograd, Autocast and Meta kernels are registered in the folders of these
// names, and the device kernels of max pooling in cpu and cuda.
TORCH_LIBRARY(fusedconvbn, m) {
  m.def(
      "conv_bn(Tensor input, Tensor weight, Tensor? bias=None, Tensor? bn_weight=None, "
      "Tensor? bn_bias=None, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
      "Tensor(c!)? num_batches_tracked=None, Tensor? residual=None, "
      "bool training=True, float? momentum=0.1, float eps=1e-5, int[1]? stride=None, "
      "int[1]? padding=None, int[1]? dilation=None, bool transposed=False, "
      "int[1]? output_padding=None, int groups=1, str activation=\"none\", "
      "str arithmetic=\"batchnorm\", str process_group=\"\") -> Tensor");
  m.def(
      "conv_bn_chain(Tensor[] tensors, Tensor(a!)[] buffers, int[] links, float[] scalars, "
      "int[] buffer_counts, float[] momenta, int[] training, str process_group=\"\", "
      "int[] saved=[], Tensor? statistics=None) -> Tensor");
  m.def(
      "_conv_bn_chain(Tensor[] tensors, Tensor(a!)[] buffers, int[] links, float[] scalars, "
      "int[] buffer_counts, float[] momenta, int[] training, str process_group=\"\", "
      "int[] saved=[], Tensor? statistics=None) -> (Tensor output, Tensor statistics)");
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> Tensor");

  m.def("_channel_stats(Tensor input, str process_group) -> Tensor");
  m.def(
      "_chain_forward(Tensor[] tensors, int[] links, float[] scalars, str process_group, "
      "int[] saved, Tensor? statistics=None) -> "
      "(Tensor output, Tensor[] saved_maps, Tensor[] statistics)");
  m.def(
      "_chain_backward(Tensor dout, Tensor[] tensors, Tensor[] saved_maps, Tensor[] statistics, "
      "int[] links, float[] scalars, str process_group, int[] saved, int[] needs_grad) -> "
      "Tensor[]");
  m.def("_max_pool2d(Tensor input, int[] pool) -> (Tensor output, Tensor offsets)");
  m.def(
      "_max_pool2d_backward(Tensor dout, Tensor offsets, int[] pool, SymInt[] sizes, "
      "bool channels_last) -> Tensor");
  m.def(
      "_fold(Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, float eps, bool transposed, int groups) -> "
      "(Tensor weight, Tensor bias)");

  for (const auto device : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    m.impl("_channel_stats", device, TORCH_FN(channel_stats_kernel));
    m.impl("_chain_forward", device, TORCH_FN(chain_forward_kernel));
    m.impl("_chain_backward", device, TORCH_FN(chain_backward_of_caller));
  }
  for (const auto key : {c10::DispatchKey::CompositeImplicitAutograd,
                         c10::DispatchKey::FuncTorchBatchedDecomposition}) {
    m.impl("conv_bn", key, TORCH_FN(conv_bn));
    m.impl("conv_bn_chain", key, TORCH_FN(conv_bn_chain));
    m.impl("_conv_bn_chain", key, TORCH_FN(conv_bn_chain_with_statistics));
  }
  m.impl("max_pool2d", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(max_pool2d));
  m.impl("_fold", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(fold_batch_norm));

  // For fusedconvbn/*.py: the names of the activations in the order of their numbers; whether a
  // convolution would use Winograd's algorithm if its map is large enough; and three calls that
  // change the library's state.
  m.def("_activations() -> str[]", activation_names);
  m.def(
      "_winograd_takes(int[] weight_sizes, int[] stride, int[] dilation, bool transposed, "
      "int groups) -> bool",
      winograd_takes_sizes);
  // torch.jit.trace writes down the operators that it meets, and has no type for this one's result.
  m.impl("_winograd_takes", c10::DispatchKey::Tracer, torch::CppFunction::makeFallthrough());
  m.def("_empty_cache() -> int", empty_arena);
  m.def("_check_recompute(bool enabled) -> ()", check_recompute);
  m.def("_set_layer_name(str name) -> ()", [](std::string_view name) { layer_name() = name; });
}

namespace {

// The handles are looked up when the library is loaded. A static of a function could be half
// initialised when another thread forks.
template <typename F>
auto handle(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

const auto chain_forward_op = handle("fusedconvbn::_chain_forward", chain_forward);
const auto chain_backward_op = handle("fusedconvbn::_chain_backward", chain_backward);
const auto channel_stats_op = handle("fusedconvbn::_channel_stats", channel_stats);
const auto max_pool2d_with_offsets_op = handle("fusedconvbn::_max_pool2d", max_pool2d_with_offsets);
const auto max_pool2d_backward_op =
    handle("fusedconvbn::_max_pool2d_backward", max_pool2d_backward);

}  // namespace

ChainResult chain_forward(at::TensorList tensors, at::IntArrayRef links,
                          at::ArrayRef<double> scalars, std::string_view process_group,
                          at::IntArrayRef saved, const std::optional<Tensor>& statistics) {
  return chain_forward_op.call(tensors, links, scalars, process_group, saved, statistics);
}

Tensor channel_stats(const Tensor& input, std::string_view process_group) {
  return channel_stats_op.call(input, process_group);
}

std::vector<Tensor> chain_backward(const Tensor& dout, at::TensorList tensors,
                                   at::TensorList saved_maps, at::TensorList statistics,
                                   at::IntArrayRef links, at::ArrayRef<double> scalars,
                                   std::string_view process_group, at::IntArrayRef saved,
                                   at::IntArrayRef needs_grad) {
  return chain_backward_op.call(dout, tensors, saved_maps, statistics, links, scalars,
                                process_group, saved, needs_grad);
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, at::IntArrayRef pool) {
  return max_pool2d_with_offsets_op.call(input, pool);
}

Tensor max_pool2d_backward(const Tensor& dout, const Tensor& offsets, at::IntArrayRef pool,
                           c10::SymIntArrayRef sizes, bool channels_last) {
  return max_pool2d_backward_op.call(dout, offsets, pool, sizes, channels_last);
}

}  // namespace fusedconvbn
