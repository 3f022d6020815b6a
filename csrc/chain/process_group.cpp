// Collectives of torch.distributed, called through the dispatcher.
#include "process_group.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>

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

// The sums are in double, so Σ T and Σ T² of float maps lose nothing when |mean| ≫ std. For double
// maps the variance loses as many digits as (mean/std)² has.
at::Tensor joint_statistics(const at::Tensor& own, int64_t count,
                            const std::string& process_group) {
  const auto wide = own.to(at::kDouble);
  const auto mean = wide.select(0, 0), var = wide.select(0, 1);
  const auto sums = all_reduce_sum(
      at::stack({mean * count, (var + mean * mean) * count, at::full_like(mean, double(count))}),
      process_group);
  const auto n = sums.select(0, 2), divisor = n.clamp_min(1);
  const auto joint_mean = sums.select(0, 0) / divisor;
  const auto joint_var = (sums.select(0, 1) / divisor - joint_mean * joint_mean).clamp_min(0);
  return at::cat({at::stack({joint_mean, joint_var, n}).to(own.scalar_type()), own});
}

}  // namespace fusedconvbn
