#include "process_group.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace fusedconvbn {

at::Tensor all_reduce_sum(const at::Tensor& t, const std::string& process_group) {
  // Boxed: the type of the group's name in the schema differs between versions of torch.
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto all_reduce = dispatcher.findSchemaOrThrow("_c10d_functional::all_reduce", "");
  const auto wait = dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, t, std::string("sum"), process_group);
  all_reduce.callBoxed(stack);
  wait.callBoxed(stack);
  return torch::jit::pop(stack).toTensor();
}

}  // namespace fusedconvbn
